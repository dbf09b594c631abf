"""Padding-free execution gives the model's own answers and gradients, never mixes samples, and says where it cannot be used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetune_cli import packing
from finetune_cli.batching import Padded
from finetune_cli.config import DeviceConfig
from finetune_cli.device import DevicePlan, find
from finetune_cli.encoded import Ragged
from finetune_cli.packing import Dropout, Group, Packed, Packing, rows

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 90, "num_labels": 3}
SHAPES: dict[str, dict[str, Any]] = {
    "Bert": SMALL,
    "Roberta": SMALL,
    "XLMRoberta": SMALL,
    "Camembert": SMALL,
    "Electra": {**SMALL, "embedding_size": 16},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 90, "num_labels": 3},
}
LENGTHS = [5, 40, 3, 17, 40, 1, 9]


def network(family: str, **changes: Any) -> Any:
    """A small classifier with weights large enough that a mixed-up sample shows."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(**{**SHAPES[family], **changes})
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 else None
    return model


def columns(lengths: list[int], types: bool) -> dict[str, Ragged]:
    draw = np.random.default_rng(1)
    ids = [draw.integers(2, 90, n) for n in lengths]
    return {"input_ids": Ragged.of(ids)} | ({"token_type_ids": Ragged.of([np.arange(n) % 2 for n in lengths])} if types else {})


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def plan() -> DevicePlan:
    return find(DeviceConfig())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("apart", [False, True])
def test_packed_is_padded(family: str, multiple: int, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and every gradient, with dropout off: the model's own padded forward against the packed one."""
    monkeypatch.setattr(rows, "WORTH_A_GROUP", 1 if apart else 10**9)
    model = network(family)
    without_dropout(model)
    model.train()
    laid = columns(LENGTHS, types=family in ("Bert", "Electra"))
    weights = torch.randn(len(LENGTHS), 3, generator=torch.Generator().manual_seed(0))
    found = []
    assert packing.install(model) is None
    packed = Packed({"input_ids": 1}, multiple)
    assert len(packed.lay(laid)["packing"].groups) == (6 if apart else 1)
    for way in (Padded({"input_ids": model.config.pad_token_id}, 64), packed):
        model.zero_grad()
        logits = model(**way.lay(laid)).logits
        (logits * weights).sum().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (padded_logits, padded_gradients), (packed_logits, packed_gradients) = found
    torch.testing.assert_close(packed_logits, padded_logits, rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == padded_gradients.keys()
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_padding_token_inside_a_text_keeps_robertas_positions() -> None:
    model = network("Roberta").eval()
    ids = {"input_ids": Ragged.of([[5, 1, 7, 8], [9, 9]])}
    padded_mask = Padded({"input_ids": 1}, 64).lay(ids)
    assert packing.install(model) is None
    with torch.no_grad():
        torch.testing.assert_close(model(**Packed({}, 1).lay(ids)).logits, model(**padded_mask).logits, rtol=1e-5, atol=1e-5)


def test_mixed_samples_are_noticed_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention across samples raises nothing by itself: the proof refuses it and the model stays padded."""
    real = Packing.of.__func__  # type: ignore[attr-defined]

    def merged(cls: Any, lengths: np.ndarray, *, size: int, varlen: bool) -> Packing:
        true, one = real(cls, lengths, size=size), real(cls, np.array([int(lengths.sum())]), size=size)
        everything = one.groups[0]
        groups = (Group(len(lengths), everything.width, everything.tokens.repeat(len(lengths)), None, torch.arange(len(lengths))),)
        return replace(true, groups=groups, back=one.back, back_first=torch.arange(len(lengths)))

    monkeypatch.setattr(Packing, "of", classmethod(merged))
    model = network("Bert")
    layout, told = packing.layout(model, pad_id=0, limit=64, device=plan())
    assert isinstance(layout, Padded) and "differ" in told
    assert model(**layout.lay(columns(LENGTHS, types=True))).logits.shape == (len(LENGTHS), 3)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: transformers.GPT2ForSequenceClassification(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)), "no padding token"),
        (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, pad_token_id=0)), "gpt_neox"),
        (lambda: transformers.DebertaV2ForTokenClassification(transformers.DebertaV2Config(**SMALL)), "distances between tokens"),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=9)),
            "looks across",
        ),
        (lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**SMALL)), "BertForQuestionAnswering"),
        (lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, is_decoder=True)), "decoder"),
    ],
)
def test_what_cannot_be_packed_is_padded_and_says_so(model: Any, said: str) -> None:
    layout, told = packing.layout(model(), pad_id=0, limit=64, device=plan())
    assert isinstance(layout, Padded) and told.startswith("padded (") and said in told


@pytest.mark.parametrize(
    "model",
    [
        lambda: network("Bert"),
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    ],
)
def test_a_padded_run_stays_padded(model: Any) -> None:
    layout, told = packing.layout(model(), pad_id=0, limit=64, device=plan(), saved=False)
    assert isinstance(layout, Padded) and "began" in told
    layout, told = packing.layout(model(), pad_id=0, limit=64, device=plan(), saved=True)
    assert isinstance(layout, Packed) and told.startswith("packed")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.sampled_from([1, 8, 64]), st.sampled_from([1, 40, 1024]))
def test_every_token_attends_to_its_own_sample_and_comes_back(lengths: list[int], multiple: int, worth: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "WORTH_A_GROUP", worth)
        packed: Packing = Packed({}, multiple).lay({"input_ids": Ragged.of([[7] * n for n in lengths])})["packing"]
    total = sum(lengths)
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    cells = np.concatenate([g.tokens.numpy() for g in packed.groups])
    seen: list[int] = []
    for group in packed.groups:
        rectangle = group.tokens.view(group.rows, group.width).numpy()
        shown = np.ones_like(rectangle, bool) if group.bias is None else (group.bias.numpy()[:, 0, 0] == 0)
        assert (sample_of[rectangle] == group.samples.numpy()[:, None]).all()
        assert (shown.sum(1) == np.array(lengths)[group.samples.numpy()]).all()
        seen += rectangle[shown].tolist()
    assert sorted(seen) == list(range(total))
    assert (cells[packed.back.numpy()[:total]] == np.arange(total)).all()
    assert (np.concatenate([g.samples.numpy() for g in packed.groups])[packed.back_first.numpy()] == np.arange(len(lengths))).all()
    assert len(packed.position) % multiple == 0 and (packed.position.numpy()[packed.first.numpy()] == 0).all()


@pytest.mark.parametrize("p", [0.1, 0.37, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 500, requires_grad=True)
    y = Dropout(True, torch.device("cpu"))(x, nn.Dropout(p))
    share = float((y == 0).float().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 1 / 65536
    assert float(y.detach().max()) == pytest.approx(1 / (1 - p), rel=2e-5)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, y)


@given(
    st.integers(1, 70),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.sampled_from([None, torch.bfloat16]),
    st.booleans(),
)
def test_dropout_by_bits_is_selection_to_the_bit(size: int, p: float, dtype: torch.dtype, cast: torch.dtype | None, turned: bool) -> None:
    """Values and gradients, of NaN and infinity too, are those of picking every element by itself."""
    torch.manual_seed(size)
    x = torch.randn(size, 3, dtype=torch.float64).to(dtype)
    x.view(-1)[torch.randperm(x.numel())[: size // 3]] = torch.tensor(torch.nan, dtype=dtype)
    x.view(-1)[torch.randperm(x.numel())[: size // 3]] = torch.tensor(torch.inf, dtype=dtype)
    x = (x.t() if turned else x).requires_grad_()
    torch.manual_seed(7)
    found = Dropout(True, x.device).at(p, x, cast)
    torch.manual_seed(7)
    again, dropped = Dropout(True, x.device), round(p * 65536)
    assert found.dtype == (cast or dtype)
    if dropped == 65536:
        assert not found.nan_to_num().any() or p < 1
        return
    assert again.bits is not None
    words = torch.from_numpy(again.bits.random_raw(-(-x.numel() // 4)).view(np.int16)[: x.numel()].copy()).view(x.shape)
    kept, scale = words >= dropped - 32768, 65536 / (65536 - dropped)
    assert torch.equal(_bits(found), _bits(torch.where(kept, x * scale, 0.0).to(found.dtype)))
    gradient = torch.randn(found.shape).to(found.dtype)
    found.backward(gradient)
    assert x.grad is not None and torch.equal(_bits(x.grad), _bits(torch.where(kept, gradient.to(dtype) * scale, 0.0)))


def _bits(x: torch.Tensor) -> torch.Tensor:
    """What can be compared where one NaN must equal another and 0 must not equal -0."""
    x = x.detach().contiguous()
    return torch.where(x.isnan(), torch.nan, x).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def test_dropout_is_keyed_and_never_repeats_itself() -> None:
    def masks() -> list[torch.Tensor]:
        torch.manual_seed(5)
        made = []
        for _ in range(2):  # two forward passes under one seed, as a technique that compares them needs
            dropout = Dropout(True, torch.device("cpu"))
            made += [dropout(torch.ones(64, 63), nn.Dropout(0.3)) for _ in range(2)]
        return made

    first, again = masks(), masks()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_dropout_leaves_evaluation_and_zero_rates_alone() -> None:
    x = torch.randn(4, 4)
    assert Dropout(False, x.device)(x, nn.Dropout(0.5)) is x
    assert Dropout(True, x.device)(x, nn.Dropout(0.0)) is x and Dropout(True, x.device)(x, None) is x
    assert not Dropout(True, x.device)(x, nn.Dropout(1.0)).any()


def test_training_drops_where_the_model_does() -> None:
    """With dropout on, the packed forward is as noisy as the model's own: same mean, same spread of logits over many draws."""
    model = network("Bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2).train()
    laid = columns([6, 9], types=True)
    assert packing.install(model) is None
    drawn = []
    with torch.no_grad():
        for way in (Padded({"input_ids": 0}, 64), Packed({}, 1)):
            inputs = way.lay(laid)
            torch.manual_seed(1)
            drawn.append(torch.stack([model(**inputs).logits for _ in range(600)]))
    own, packed = drawn
    deviation = own.std(0)
    assert ((own.mean(0) - packed.mean(0)).abs() < 5 * deviation * (2 / 600) ** 0.5).all()
    assert ((packed.std(0) / deviation).log().abs() < 0.25).all()

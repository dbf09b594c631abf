"""Packed rows through the tasks themselves: collate, forward, loss and answers are those of padded rows, however a batch is split."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from ran import Ran, labelled_rows

from finetune_cli import models, packing
from finetune_cli.batching import Padded
from finetune_cli.config import DataConfig, ModelConfig
from finetune_cli.data.rows import of_table
from finetune_cli.encoded import Examples, Ragged
from finetune_cli.packing import Packed
from finetune_cli.packing import rows as rows_module
from finetune_cli.tasks import get
from finetune_cli.tasks.base import Flat, Task

pytestmark = pytest.mark.sampled(6)

ENCODERS: dict[str, dict[str, Any]] = {
    family: {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert")
}
ENCODERS["Electra"] = {**ENCODERS["Bert"], "embedding_size": 16}
ENCODERS["DistilBert"] = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
TEXTS = [row["text"] for row in labelled_rows(14)]
TEXTS += [" ".join(TEXTS[:3]), "a", TEXTS[0] + " and more"]


@dataclass(frozen=True)
class Case:
    """A task with examples of differing length."""

    task: Task[Any]
    examples: Examples
    targets: Any

    @classmethod
    def of(cls, task: Task[Any], rows: Any, roles: Any, *, varied: bool = True, max_length: int = 48) -> Case:
        examples = task.encode(rows, roles, task.tokenizer, max_length=max_length, first_row=0)
        assert len(set(examples.lengths().tolist())) > (3 if varied else 1), "samples of one length would prove little"
        return cls(task, examples, task.read_targets(DataConfig(), rows, roles))

    def batch(self, part: Any, layout: Any, key: int = 3) -> Any:
        some = self.examples.take(np.asarray(part))
        return self.task.collate(some.columns, self.targets[some.row], layout, key=key)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {kind: models.train_tokenizer(iter(TEXTS), ModelConfig(shape={"vocabulary": 120}), kind) for kind in ("encoder", "decoder")}


def arranged(kind: Any, columns: dict[str, Any], config: Any) -> Any:
    rows, roles, _ = kind.arrange(config, of_table(pa.table(columns), "rows.parquet"), DataConfig(), labelled=kind.labelled)
    return rows, roles


@pytest.fixture(scope="module")
def entities(tokenizers: dict[str, Any]) -> Case:
    kind = get("token-classification")
    words = [text.split() for text in TEXTS]
    tags = [["B-X" if i % 3 == 0 else "O" for i in range(len(row))] for row in words]
    rows, roles = arranged(kind, {"tokens": words, "tags": tags}, kind.Config())
    facts = kind.learn(kind.Config(), DataConfig(), rows, roles)
    return Case.of(kind(kind.Config(), facts).reading_with(tokenizers["encoder"]), rows, roles)


@pytest.fixture(scope="module")
def fills(tokenizers: dict[str, Any]) -> Case:
    kind = get("fill-mask")
    rows, roles = arranged(kind, {"text": TEXTS}, kind.Config())
    return Case.of(
        kind(kind.Config(), kind.learn(kind.Config(), DataConfig(), rows, roles)).reading_with(tokenizers["encoder"]), rows, roles
    )


@pytest.fixture(scope="module")
def chat(tokenizers: dict[str, Any]) -> Case:
    """Conversations, of which the answers are learnt."""
    said = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1][: 3 + i]}] for i, text in enumerate(TEXTS)]
    return writing(tokenizers["decoder"], {"messages": pa.array(said)}, chat=True)


@pytest.fixture(scope="module")
def prose(tokenizers: dict[str, Any]) -> Case:
    """Blocks of text whose documents see each other; the last is shorter."""
    return writing(tokenizers["decoder"], {"text": TEXTS}, chat=False)


@pytest.fixture(scope="module")
def documents(tokenizers: dict[str, Any]) -> Case:
    """Blocks of text whose documents are kept apart."""
    return writing(tokenizers["decoder"], {"text": TEXTS}, chat=False, attention_within_documents=True)


def writing(tokenizer: Any, columns: dict[str, Any], *, chat: bool, **options: Any) -> Case:
    kind = get("text-generation")
    config = kind.Config(**options)
    rows, roles = arranged(kind, columns, config)
    return Case.of(kind(config, {"chat": chat}).reading_with(tokenizer), rows, roles, varied=chat, max_length=160 if chat else 48)


def labelled(tokenizer: Any) -> Case:
    kind = get("text-classification")
    rows, roles = arranged(kind, {"text": TEXTS, "label": ["abc"[i % 3] for i in range(len(TEXTS))]}, kind.Config())
    return Case.of(kind(kind.Config(), kind.learn(kind.Config(), DataConfig(), rows, roles)).reading_with(tokenizer), rows, roles)


@pytest.fixture(scope="module")
def labels(tokenizers: dict[str, Any]) -> Case:
    return labelled(tokenizers["encoder"])


@pytest.fixture(scope="module")
def decoder_labels(tokenizers: dict[str, Any]) -> Case:
    return labelled(tokenizers["decoder"])


def network(case: Case, family: str, head: str, shape: dict[str, Any]) -> Any:
    """A small model for a case, without dropout, its weights large enough that a mixed-up sample shows."""
    torch.manual_seed(3)
    config = getattr(transformers, f"{family}Config")(vocab_size=len(case.task.tokenizer), pad_token_id=0, **shape)
    case.task.configure(config)
    model = getattr(transformers, f"{family}{head}")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def learnt(case: Case, model: Any, layout: Any, parts: list[Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, gradients) of a step whose rows pass in parts, as the training loop sums them."""
    model.zero_grad()
    batches = [case.batch(part, layout) for part in parts]
    weights = {name: sum(batch.weights[name] for batch in batches) for name in batches[0].weights}
    total = 0.0
    for batch in batches:
        sums = case.task.loss(case.task.forward(model, batch), batch)
        loss = torch.stack([value / weights[name] for name, value in sums.items()]).sum()
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def outputs(case: Case, model: Any, layout: Any, part: Any) -> dict[str, Any]:
    """What ``infer`` gives: arrays, and the lengths of flat ones."""
    model.eval()
    with torch.no_grad():
        found, sums = case.task.infer(model, case.batch(part, layout))
    told = {name: value.values if isinstance(value, Flat) else value for name, value in found.items()}
    lengths = {f"{name} lengths": torch.from_numpy(value.lengths) for name, value in found.items() if isinstance(value, Flat)}
    return told | lengths | {f"sum of {name}": value for name, value in sums.items()}


def held_equal(case: Case, model: Any, *, multiple: int, tight: float = 1e-5) -> None:
    """Loss, every gradient and every answer: packed, in one part or in three, against padded; rounded rows also fall into many groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "WORTH_A_GROUP", 10**9 if multiple == 1 else 1)
        _held_equal(case, model, multiple, tight)


def _held_equal(case: Case, model: Any, multiple: int, tight: float) -> None:
    padded, packed = Padded({"input_ids": 0}, 256), Packed({"input_ids": 0}, multiple)
    every = np.arange(len(case.examples))
    expected_loss, expected = learnt(case, model, padded, [every])
    for parts in ([every], np.array_split(every[::-1], 3)):
        loss, gradients = learnt(case, model, packed, list(parts))
        assert loss == pytest.approx(expected_loss, rel=tight)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(gradients[name], gradient, rtol=tight, atol=tight * scale, msg=lambda t, name=name: f"{name}: {t}")
    own, found = (outputs(case, model, way, every) for way in (padded, packed))
    assert own.keys() == found.keys()
    for name, value in own.items():
        torch.testing.assert_close(found[name], value, rtol=tight, atol=tight, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize(("fixture", "head"), [("entities", "ForTokenClassification"), ("fills", "ForMaskedLM")])
def test_heads_that_read_every_token(fixture: str, head: str, family: str, multiple: int, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(fixture)
    model = network(case, family, head, ENCODERS[family])
    assert packing.install(model) is None
    held_equal(case, model, multiple=multiple)


DECODER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
NEAR = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
INTERFACE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", DECODER),
    "llama 3 rotary": ("Llama", DECODER | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", DECODER | {"sliding_window": 7}),
    "mistral, no window": ("Mistral", DECODER | {"sliding_window": None}),
    "qwen2": ("Qwen2", DECODER),
    "qwen2, windows": ("Qwen2", DECODER | NEAR),
    "qwen3": ("Qwen3", DECODER | {"head_dim": 16}),
    "qwen3, windows": ("Qwen3", DECODER | NEAR),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt2, scaled": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "scale_attn_by_inverse_layer_idx": True}),
}
MODERNBERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48, "local_attention": 8}


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("fixture", ["chat", "prose", "documents"])
@pytest.mark.parametrize("name", INTERFACE)
def test_decoders_that_write(name: str, fixture: str, multiple: int, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(fixture)
    family, shape = INTERFACE[name]
    model = network(case, family, "LMHeadModel" if family == "GPT2" else "ForCausalLM", shape)
    assert packing.install(model) is None
    held_equal(case, model, multiple=multiple)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize(("fixture", "head"), [("decoder_labels", "ForSequenceClassification"), ("entities", "ForTokenClassification")])
@pytest.mark.parametrize("name", INTERFACE)
def test_decoders_that_label(name: str, fixture: str, head: str, multiple: int, request: pytest.FixtureRequest) -> None:
    family, shape = INTERFACE[name]
    case = request.getfixturevalue(fixture)
    model = network(case, family, head, shape)
    assert packing.install(model) is None
    held_equal(case, model, multiple=multiple)


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize(
    ("fixture", "head", "pooling"),
    [
        ("labels", "ForSequenceClassification", "cls"),
        ("labels", "ForSequenceClassification", "mean"),
        ("entities", "ForTokenClassification", "cls"),
        ("fills", "ForMaskedLM", "cls"),
    ],
)
def test_modernbert(fixture: str, head: str, pooling: str, multiple: int, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(fixture)
    model = network(case, "ModernBert", head, MODERNBERT | {"classifier_pooling": pooling})
    assert packing.install(model) is None
    held_equal(case, model, multiple=multiple)


def test_a_packed_model_that_is_copied_runs_on_its_own_weights(entities: Case) -> None:
    """An export looks at a deep copy, which must not answer with the weights of what it was copied from."""
    import copy

    model = network(entities, "Bert", "ForTokenClassification", ENCODERS["Bert"]).eval()
    assert packing.install(model) is None
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.base_model.parameters():
            parameter.zero_()
        for layout in (Padded({}, 64), Packed({}, 1)):
            inputs = layout.lay({"input_ids": Ragged.of([[5, 6, 7], [8, 9]])})
            assert not torch.equal(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(("fixture", "head"), [("entities", "ForTokenClassification"), ("fills", "ForMaskedLM")])
def test_mixed_samples_are_noticed(fixture: str, head: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed row whose samples see each other raises nothing; the proof at the start refuses the model."""
    case = request.getfixturevalue(fixture)
    real: Callable[..., Any] = rows_module.Packing.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(rows_module.Packing, "of", classmethod(lambda cls, n, **more: real(cls, np.array([int(n.sum())]), **more)))
    model = network(case, "Bert", head, {**ENCODERS["Bert"], "num_labels": 3})
    told = packing.install(model)
    assert told is not None and "differ" in told
    monkeypatch.undo()
    assert packing.install(model) is None


# what reaches attention -------------------------------------------------------------------------------------------------------


def test_attention_that_does_not_hear_of_the_samples_never_answers(chat: Case) -> None:
    """A layer that keeps the keyword to itself would mix samples and raise nothing."""
    model = network(chat, "Llama", "ForCausalLM", DECODER)
    layer = model.model.layers[1].self_attn
    own = layer.forward
    layer.forward = lambda *args, packing=None, **more: own(*args, **more)
    told = packing.install(model)
    assert told is not None and "nan" in told
    head = model.lm_head.forward
    model.lm_head.forward = lambda x: head(x) if len(x) > 1 else head(x) * torch.nan
    layer.forward = own
    told = packing.install(model)
    assert told is not None and "nan" in told, "also where the hidden states are right"
    with torch.no_grad():
        assert not outputs(chat, model, Padded({}, 256), [0, 1])["losses"].isnan().any(), "it goes on padded"
    del model.lm_head.forward
    assert packing.install(model) is None


@pytest.mark.parametrize(
    ("family", "head", "changes", "said"),
    [
        ("Llama", "ForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "longest row"),
        ("Llama", "ForCausalLM", {"attn_implementation": "eager"}, "eager"),
        ("GPT2", "LMHeadModel", {"add_cross_attention": True, "n_embd": 32, "n_layer": 2, "n_head": 4}, "across"),
        ("Llama", "ForQuestionAnswering", {}, "LlamaForQuestionAnswering"),
        ("Phi", "ForCausalLM", {}, "phi"),
    ],
)
def test_what_packed_rows_cannot_follow_is_refused_with_its_reason(
    family: str, head: str, changes: dict[str, Any], said: str, chat: Case
) -> None:
    model = network(chat, family, head, (DECODER if family != "GPT2" else {}) | changes)
    told = packing.install(model)
    assert told is not None and said in told
    assert "forward" not in vars(model) | vars(model.base_model)


def test_a_window_longer_than_the_proof_looks_is_still_kept(decoder_labels: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of windows is the model's own at every width, also where the samples of the proof are too short to show it."""
    from finetune_cli.packing import choosing

    monkeypatch.setattr(choosing, "SHORT_WINDOW", 0)
    for window in (1, 2, 5, 6, 30):
        model = network(decoder_labels, "Mistral", "ForSequenceClassification", DECODER | {"sliding_window": window})
        assert packing.install(model) is None
        held_equal(decoder_labels, model, multiple=1)


def test_the_proof_sees_a_wrong_window(decoder_labels: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_cli.packing import attention

    real = attention._seen
    monkeypatch.setattr(attention, "_seen", lambda width, window, causal, device: real(width, window and window + 1, causal, device))
    for family, shape in (("Mistral", DECODER | {"sliding_window": 90}), ("ModernBert", MODERNBERT)):
        told = packing.install(network(decoder_labels, family, "ForSequenceClassification", shape))
        assert told is not None and "differ" in told


def test_padding_tokens_inside_a_text_do_not_move_the_last_token(decoder_labels: Case) -> None:
    """A pooled decoder reads the last token that is no padding token, which a text may hold or end with."""
    ids = {"input_ids": Ragged.of([[5, 0, 6, 0], [0, 7], [0, 0], [8], [9, 9, 9, 0, 0]])}
    for family, shape in (("Llama", DECODER), ("GPT2", INTERFACE["gpt2"][1])):
        model = network(decoder_labels, family, "ForSequenceClassification", shape).eval()
        assert packing.install(model) is None
        with torch.no_grad():
            expected = model(**Padded({"input_ids": 0}, 64).lay(ids)).logits
            for multiple in (1, 64):
                torch.testing.assert_close(model(**Packed({}, multiple).lay(ids)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fixture", "family", "head", "shape"),
    [
        ("chat", "Llama", "ForCausalLM", DECODER),
        ("chat", "GPT2", "LMHeadModel", INTERFACE["gpt2"][1] | {"attn_pdrop": 0.1}),
        ("documents", "Qwen3", "ForCausalLM", DECODER | NEAR),
        ("decoder_labels", "Mistral", "ForSequenceClassification", DECODER | {"sliding_window": 7}),
        ("labels", "ModernBert", "ForSequenceClassification", MODERNBERT | {"classifier_pooling": "mean"}),
        ("entities", "ModernBert", "ForTokenClassification", MODERNBERT),
        ("entities", "Bert", "ForTokenClassification", ENCODERS["Bert"]),
        ("fills", "Roberta", "ForMaskedLM", ENCODERS["Roberta"]),
    ],
)
def test_a_pass_never_waits_for_the_device(
    fixture: str, family: str, head: str, shape: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, loss and backward read no value back: what an accelerator needs, held on a CPU by refusing every read."""
    case = request.getfixturevalue(fixture)
    model = network(case, family, head, shape)
    assert packing.install(model) is None
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch = case.batch(np.arange(5), Packed({}, 1))

    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pass read a tensor's value")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    sums = case.task.loss(case.task.forward(model, batch), batch)
    torch.stack([value / batch.weights[name] for name, value in sums.items()]).sum().backward()
    monkeypatch.undo()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "layers.1." in name)


@pytest.mark.parametrize("pad", [0, 17, 39, -1, None])
def test_any_padding_token_will_do(pad: int | None) -> None:
    """The last of the vocabulary is a usual one: it was added. The proof's samples hold every token but that one."""
    shape = DECODER | {"vocab_size": 40, "pad_token_id": pad}
    assert packing.install(transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))) is None
    assert (
        packing.install(transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**MODERNBERT, vocab_size=40, pad_token_id=pad)))
        is None
    )


# gradient checkpointing, adapters, generation, dropout ------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), [("Llama", "ForCausalLM"), ("GPT2", "LMHeadModel"), ("Qwen3", "ForCausalLM")])
def test_gradient_checkpointing_recomputes_the_same(family: str, head: str, chat: Case) -> None:
    """Also with dropout: the masks of the second pass are those of the first."""
    shape = INTERFACE["gpt2"][1] if family == "GPT2" else DECODER
    model = network(chat, family, head, shape)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    assert packing.install(model) is None
    found = []
    for _ in range(2):
        torch.manual_seed(8)
        found.append(learnt(chat, model, Packed({}, 1), [np.arange(9)]))
        models.checkpoint_gradients(model)
    assert found[0][0] == found[1][0]
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-6, atol=1e-6)
    assert packing.install(model) is None, "a model that checkpoints is packed too"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("fixture", "name"), [("chat", "llama"), ("chat", "gpt2"), ("fills", "modernbert"), ("entities", "bert")])
def test_adapters_train_alike(fixture: str, name: str, dora: bool, request: pytest.FixtureRequest) -> None:
    from finetune_cli import adapters
    from finetune_cli.config.choices import AdapterName

    case = request.getfixturevalue(fixture)
    shapes = {"bert": ("Bert", ENCODERS["Bert"]), "modernbert": ("ModernBert", MODERNBERT), **INTERFACE}
    head = {"entities": "ForTokenClassification", "fills": "ForMaskedLM"}.get(fixture, "LMHeadModel" if name == "gpt2" else "ForCausalLM")
    model = network(case, shapes[name][0], head, shapes[name][1])
    options = ModelConfig(adapter=AdapterName.lora, rank=4, dora=dora, adapter_dropout=0.0, targets="all-linear")
    assert adapters.attach(model, options, source=None, new=[], kept=Path("base"), seed=1) is not None
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2) if "lora_B" in parameter_name else None
    assert packing.install(model) is None
    held_equal(case, model, multiple=1, tight=3e-5)


def test_what_a_packed_model_writes_is_what_it_wrote_before(chat: Case) -> None:
    """Generation keeps its cache and its masks: token for token, prompts of differing length together and alone."""
    from finetune_cli.tasks.writing.generation import Wish, generate, pad_left

    for name in ("llama", "qwen3, windows", "gpt2"):
        family, shape = INTERFACE[name]
        model = network(chat, family, "LMHeadModel" if family == "GPT2" else "ForCausalLM", shape).eval()
        wish = Wish.of(chat.task.config, ends=frozenset({1}), pad=0)
        prompts = Ragged.of([[5, 6, 7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19]])
        ids, mask = pad_left(prompts, 0)
        told = [generate(model, ids, mask, np.arange(3), wish, chat.task.tokenizer)[0].values.tolist()]
        assert packing.install(model) is None
        told.append(generate(model, ids, mask, np.arange(3), wish, chat.task.tokenizer)[0].values.tolist())
        alone = [pad_left(prompts.take(np.array([i])), 0) for i in range(3)]
        parts = [generate(model, *one, np.arange(1), wish, chat.task.tokenizer)[0].values.tolist() for one in alone]
        assert told[0] == told[1] == [token for part in parts for token in part]


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_of_attention_keeps_the_mean_and_is_keyed(p: float, causal: bool) -> None:
    """Of values of one comes out the kept share of a token's weights, scaled: 1 in the mean, and spread as the binomial is."""
    from finetune_cli.packing.attention import Sight, inside_samples
    from finetune_cli.packing.rows import Packing

    lengths = np.array([40, 40, 23])
    where = Packing.of(lengths, size=103)
    q = torch.zeros(103, 4, 8)  # every weight of a token that sees n is 1 / n
    how = Sight(causal=causal, window=None, scale=1.0, dropout=p)

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return inside_samples(q, q, torch.ones(103, 4, 8), where, how)[:, :, 0]

    found = torch.stack([drawn(seed) for seed in range(300)])
    seen = where.position + 1 if causal else torch.from_numpy(lengths.repeat(lengths))
    spread = (p / (1 - p) / seen).sqrt()[None, :, None]  # of a kept share of n weights
    z = (found - 1) / spread
    assert abs(float(z.mean())) < 5 / z.numel() ** 0.5
    assert float(z.var()) == pytest.approx(1, abs=0.05)
    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))
    assert float((found[:, where.first[0]] == 0).float().mean()) == pytest.approx(p if causal else 0, abs=0.05)


@pytest.mark.parametrize("name", ["gpt2", "modernbert", "bert"])
def test_training_drops_where_the_model_does(name: str, request: pytest.FixtureRequest) -> None:
    """With every dropout on, packed logits are as noisy as the model's own: same mean, same spread over many draws."""
    case = request.getfixturevalue("chat" if name == "gpt2" else "entities")
    shapes = {"bert": ("Bert", ENCODERS["Bert"]), "modernbert": ("ModernBert", MODERNBERT), **INTERFACE}
    head = "LMHeadModel" if name == "gpt2" else "ForTokenClassification"
    model = network(case, shapes[name][0], head, shapes[name][1] | ({"attention_dropout": 0.2} if name == "modernbert" else {}))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    assert packing.install(model) is None
    ids = {"input_ids": Ragged.of([[5, 6, 7, 8, 9, 10], [11, 12, 13]])}
    drawn = []
    with torch.no_grad():
        for way in (Padded({"input_ids": 0}, 64), Packed({}, 1)):
            inputs = way.lay(ids)
            torch.manual_seed(1)
            logits = [model(**inputs).logits for _ in range(600)]
            drawn.append(torch.stack([found[0, 2:6] for found in logits]))  # tokens of the first sample
    own, packed = drawn
    deviation = own.std(0)
    assert float(deviation.min()) > 0.01
    assert ((own.mean(0) - packed.mean(0)).abs() < 5 * deviation * (2 / 600) ** 0.5).all()
    assert ((packed.std(0) / deviation).log().abs() < 0.3).all()


# PyTorch's kernel for sequences end to end -----------------------------------------------------------------------------------


def documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """``varlen_attn`` as PyTorch documents it, sequence by sequence: there is no CPU kernel to test with."""
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa == (query.shape[1] != key.shape[1]) and all(t.is_contiguous() for t in (query, key, value))
    before, after = window_size
    parts = []
    for start, end in pairwise(cu_seq_q.tolist()):
        q, k, v = (t[start:end].float().transpose(0, 1) for t in (query, key, value))
        k, v = (t.repeat_interleave(len(q) // len(k), 0) for t in (k, v))
        apart = torch.arange(end - start)[None, :] - torch.arange(end - start)[:, None]  # key minus query
        seen = ((apart >= -before) | (before < 0)) & ((apart <= after) | (after < 0))
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts).to(query.dtype)


KERNEL = {"llama": INTERFACE["llama"], "windows": INTERFACE["mistral"], "gpt2": INTERFACE["gpt2"], "modernbert": ("ModernBert", MODERNBERT)}

KERNEL_SIDES = {"llama": (-1, 0), "windows": (6, 0), "gpt2": (-1, 0), "modernbert": (4, 4)}


@pytest.mark.parametrize("name", KERNEL)
def test_the_kernel_is_asked_for_what_rectangles_give(name: str, decoder_labels: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_cli.packing import kernel

    model = network(decoder_labels, KERNEL[name][0], "ForSequenceClassification", KERNEL[name][1])
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", documented)
    assert kernel.difference(model, torch.device("cpu"), torch.bfloat16) <= kernel.TOLERANCE
    for wrong in (lambda start, _: (start, -1), lambda _, end: (-1, end), lambda start, end: (start + 1, max(end, 0))):
        if wrong(*KERNEL_SIDES[name]) == KERNEL_SIDES[name]:
            continue

        def other(*args: Any, window_size: Any, wrong: Any = wrong, **more: Any) -> Any:
            return documented(*args, window_size=wrong(*window_size), **more)

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", other)
        assert kernel.difference(model, torch.device("cpu"), torch.bfloat16) > kernel.TOLERANCE, "another window is noticed"


def test_a_kernel_that_fails_or_differs_is_not_used(chat: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_cli.config import DeviceConfig
    from finetune_cli.device import find
    from finetune_cli.packing import kernel

    model = network(chat, "Llama", "ForCausalLM", DECODER)
    here = replace(find(DeviceConfig()), deterministic=False, precision="bf16")
    told = kernel.obstacle(model, here)
    assert told is not None and "CUDA" in told
    cuda = replace(here, device=SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    monkeypatch.setattr(kernel, "difference", lambda *_: 0.5)
    told = kernel.obstacle(model, cuda)
    assert told is not None and "differs" in told

    def absent(*_: Any) -> float:
        raise RuntimeError("no kernel image\nfor this card")

    monkeypatch.setattr(kernel, "difference", absent)
    assert kernel.obstacle(model, cuda) == "the kernel does not run here: no kernel image"
    monkeypatch.setattr(kernel, "difference", lambda *_: 1e-3)
    assert kernel.obstacle(model, cuda) is None
    assert "deterministic" in str(kernel.obstacle(model, replace(cuda, deterministic=True)))


@pytest.mark.parametrize("name", KERNEL)
def test_half_precision_rows_go_to_the_kernel(name: str, decoder_labels: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, through the whole model; passes with dropout of attention, and in fp32, stay in rectangles. The answers are alike."""
    case = decoder_labels
    model = network(case, KERNEL[name][0], "ForSequenceClassification", KERNEL[name][1])
    assert packing.install(model) is None
    asked: list[int] = []

    def noted(*args: Any, **more: Any) -> Any:
        asked.append(len(args[3]))
        assert all(t.dtype == torch.bfloat16 for t in args[:3])
        return documented(*args, **more)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", noted)
    kernel, rectangles = (Packed({"input_ids": 0}, 1, varlen=varlen) for varlen in (True, False))
    exact = outputs(case, model, kernel, np.arange(6))["logits"]
    assert not asked
    with torch.autocast("cpu", torch.bfloat16):
        found = [outputs(case, model, way, np.arange(6))["logits"] for way in (kernel, rectangles, Padded({"input_ids": 0}, 256))]
        assert asked == [7] * model.config.num_hidden_layers
        size = float(exact.abs().max())
        for logits in found:
            torch.testing.assert_close(logits / size, exact / size, rtol=0, atol=0.05)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        model.train()
        case.task.forward(model, case.batch(np.arange(6), kernel))
    assert len(asked) == model.config.num_hidden_layers


# whole runs -------------------------------------------------------------------------------------------------------------------

TINY = ["model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32", "device=cpu", "device.threads=1", "train.steps=2"]


@pytest.mark.parametrize("keys", [["+exp=entities"], ["+exp=fillmask"], ["+exp=chat"], ["+exp=textgen"]], ids=lambda keys: keys[0][5:])
def test_shipped_experiments_are_packed_and_shuffled(keys: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    run = ftune_inside("train", *keys, "model=tiny", *TINY, "data.max_rows=64", "data.max_leaked=1", cwd=tmp_path).ok().run
    plan = json.loads((run / "manifest.json").read_text())["plan"]["batches"]
    assert plan["packed"] and plan["order"] == "shuffled" and plan["reasons"]["layout"].startswith("packed")


def test_an_unknown_architecture_says_that_it_is_padded(
    ftune_inside: Callable[..., Ran], tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    config = transformers.GPTNeoXConfig(vocab_size=260, pad_token_id=0, **ENCODERS["Bert"])
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "other")
    tokenizers["decoder"].save_pretrained(tmp_path / "other")
    keys = ["task=text-generation", "task.format=text", "data=reviews", "data.label=null", "model.path=other", "data.max_length=64"]
    ran = ftune_inside("train", *keys, "data.max_rows=64", "data.max_leaked=1", "train.steps=2", "device=cpu", cwd=tmp_path).ok()
    plan = json.loads((ran.run / "manifest.json").read_text())["plan"]["batches"]
    assert not plan["packed"] and plan["order"] == "buckets" and "no packed form is known for gpt_neox" in ran.err

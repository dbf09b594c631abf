"""Packed rows through the tasks themselves: collate, forward, loss and answers are those of padded rows, however a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from ran import labelled_rows

from finetune_cli import models, packing
from finetune_cli.batching import Padded
from finetune_cli.config import DataConfig, ModelConfig
from finetune_cli.data.rows import of_table
from finetune_cli.encoded import Examples, Ragged
from finetune_cli.packing import Packed
from finetune_cli.tasks import get
from finetune_cli.tasks.base import Flat, Task

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
    """Loss, every gradient and every answer: packed, in one part or in three, against padded."""
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
    from finetune_cli.packing import rows

    case = request.getfixturevalue(fixture)
    real: Callable[..., Any] = rows.Packing.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(rows.Packing, "of", classmethod(lambda cls, n, **more: real(cls, np.array([int(n.sum())]), **more)))
    model = network(case, "Bert", head, {**ENCODERS["Bert"], "num_labels": 3})
    told = packing.install(model)
    assert told is not None and "differ" in told
    monkeypatch.undo()
    assert packing.install(model) is None

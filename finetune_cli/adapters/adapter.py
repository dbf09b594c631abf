"""One adapter: put into a model, written beside its base's name, put back, and merged into plain weights.

The other adapters of peft that are injected in place (IA³, for one) are an entry of ``CONFIGS`` and their options in the schema.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from finetune_cli import console, models, randomness
from finetune_cli.adapters import quantised, targets
from finetune_cli.adapters.base import BASE_FILE, Base
from finetune_cli.config.choices import AdapterName, Quantised
from finetune_cli.config.schema import ModelConfig, out_of_range
from finetune_cli.errors import UserError
from finetune_cli.models import Source
from finetune_cli.storage import parsed
from finetune_cli.tasks.base import Task

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""peft's own names."""
PREFIX = "base_model.model."
"""How peft's files call the model that the adapter is in."""
NAME = "default"
NUMBERS = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Words for the numbers of peft's configs."""
OPTIONS = {"rank": "r", "alpha": "lora_alpha", "adapter_dropout": "lora_dropout", "rslora": "use_rslora", "dora": "use_dora"}
"""Our options to the keys of peft's configs that say them. Nothing else of a saved config is followed: peft imports modules, matches
patterns and opens files that a config names."""
NAMES = re.compile(r"[\w.-]+")
"""Of layers."""


def _lora(config: ModelConfig, layers: Sequence[str]) -> Any:
    """LoRA (Hu et al. 2021, arXiv:2106.09685)."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.adapter_dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=list(layers),
    )


CONFIGS: dict[AdapterName, Callable[[ModelConfig, Sequence[str]], Any]] = {AdapterName.lora: _lora}
"""Kind of adapter to peft's config of it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What there is to know of a model's adapter beside its weights."""

    config: dict[str, Any]
    """peft's config, as its file holds it; ``modules_to_save`` are the modules trained whole."""
    base: Base

    @property
    def told(self) -> str:
        """The adapter in words, for the first screen and the model card."""
        kind = str(self.config["peft_type"]).lower() + " (DoRA)" * bool(self.config.get("use_dora"))
        numbers = [f"{word} {self.config[key]}" for word, key in NUMBERS.items() if self.config.get(key)]
        numbers += ["rank-stabilised"] * bool(self.config.get("use_rslora"))
        layers = self.config["target_modules"]
        names = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        return f"{kind}, {', '.join(numbers)}, on {names} ({len(layers)} layers); trained whole: {', '.join(self.whole) or 'nothing'}"

    @property
    def whole(self) -> tuple[str, ...]:
        """Modules that are trained whole: the head, and what was new in the base."""
        return tuple(self.config["modules_to_save"] or ())

    def files(self, model: nn.Module, *, head: nn.Module | None = None) -> dict[str, bytes]:
        """peft's two files and ``base.json``; with ``head``, another model's head goes with the adapter."""
        tensors = self.tensors(model)
        if head is not None:
            tensors |= {PREFIX + name: tensor for name, tensor in _whole(head, self.whole).items()}
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        return {**self.small_files(), WEIGHTS_FILE: save(copies, metadata={"format": "pt"})}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What is trained, as it lies in the model now, by the names of peft's file."""
        return _trained(model, self.whole)

    def small_files(self) -> dict[str, bytes]:
        """peft's config and ``base.json``: the same from the first step to the last."""
        return {CONFIG_FILE: json.dumps(self.config, indent=1, sort_keys=True).encode(), BASE_FILE: self.base.to_json()}


def check(config: ModelConfig, device: str) -> None:
    """What can be known before data are read: the packages and the hardware. Raises UserError."""
    if config.adapter == AdapterName.none:
        return
    _require_peft(f"model.adapter={config.adapter.value}", "model.adapter")
    if config.quantised != Quantised.none:
        if config.path is None:
            raise UserError(
                "a model built from scratch has no trained weights to hold in fewer bits", where="model.quantised", fix="model.path=MODEL"
            )
        quantised.backend(config.quantised, device)


def loading(config: ModelConfig, task: Task[Any], model_config: Any, device: str) -> dict[str, Any]:
    """How the base's weights are held, for ``models.load``."""
    if config.quantised == Quantised.none:
        return {}
    return quantised.loading(config.quantised, device, targets.head(models.skeleton(config, task, model_config), ()))


def check_targets(config: ModelConfig, task: Task[Any], model_config: Any) -> None:
    """What the architecture alone can say of the targets, before weights are loaded. Raises UserError."""
    if config.adapter != AdapterName.none:
        model = models.skeleton(config, task, model_config)
        whole = targets.head(model, ())
        _check_rank(config, model, targets.choose(model, config.targets, whole)[0])


def _require_peft(what: str, where: str) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UserError(f"{what} needs the package peft", where=where, fix="pip install peft")


def _check_rank(config: ModelConfig, model: nn.Module, layers: Sequence[str]) -> None:
    """A rank above a matrix's smaller side would only add weights."""
    for name in layers:
        layer: Any = model.get_submodule(name)
        sides = (layer.in_features, layer.out_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)
        if config.rank > min(sides):
            raise UserError(
                f"model.rank={config.rank} is more than {name} has, a matrix of {sides[0]} x {sides[1]}",
                where="model.rank",
                fix=f"model.rank={min(8, min(sides))}",
            )


def attach(model: Any, config: ModelConfig, *, source: Source | None, new: Sequence[str], kept: Path, seed: int) -> Adapter | None:
    """Put the adapter that the config names into a loaded model, and freeze what is not trained; None where it names none.

    ``new`` are weights that the base did not have; ``kept`` is where a base without a name will be written.
    """
    if config.adapter == AdapterName.none:
        return None
    whole = targets.head(model, new)
    layers, told = targets.choose(model, config.targets, whole)
    _check_rank(config, model, layers)
    base = Base.of(source, config, model, whole, kept=kept)
    peft_config = CONFIGS[config.adapter](config, layers)
    torch.manual_seed(randomness.key(seed, "adapter"))
    _inject(model, peft_config, whole)
    saved = peft_config.to_dict() | {
        "target_modules": sorted(layers),
        "modules_to_save": list(whole),
        "base_model_name_or_path": models.BUNDLED_HUB_ID if base.name == models.BUNDLED else base.name,
        "inference_mode": True,
    }
    console.say(f"adapter on {told}")
    return Adapter({name: _plain(value) for name, value in saved.items()}, base)


def _plain(value: Any) -> Any:
    """A value of peft's config as JSON has it."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)


def _inject(model: Any, peft_config: Any, whole: Sequence[str]) -> None:
    """Put the adapter in and leave it and the head trainable, in fp32."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(peft_config, model, NAME)
    for name in whole:
        weights = model.get_submodule(name).parameters()
        if any(type(p.data) is not Tensor or not p.is_floating_point() for p in weights):
            what = f"{name} is new in the model and must be trained, but it was loaded in fewer bits"
            raise UserError(what, where="model.quantised", fix="model.quantised=none, or a model whose weights have it")
        model.get_submodule(name).requires_grad_(True)


def _whole(model: nn.Module, whole: Sequence[str]) -> dict[str, Tensor]:
    """Weights and buffers of the modules trained whole."""
    return {f"{name}.{key}": tensor for name in whole for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()}


def _trained(model: Any, whole: Sequence[str]) -> dict[str, Tensor]:
    """Everything that an adapter's checkpoint holds, by the names of peft's files."""
    from peft import get_peft_model_state_dict

    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    adapter = get_peft_model_state_dict(model, wanted, NAME, save_embedding_layers=False)
    found = {PREFIX + name: tensor for name, tensor in (adapter | _whole(model, whole)).items()}
    assert {id(p) for p in wanted.values()} <= {id(t) for t in found.values()}, "whatever is trained is saved"
    return found


# -- back from a checkpoint ----------------------------------------------------------------------
def is_adapted(directory: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (directory / CONFIG_FILE).is_file()


def restore(directory: Path, task: Task[Any], *, offline: bool, device: str) -> tuple[nn.Module, Adapter]:
    """The model of a checkpoint with its adapter in place: the base found, proved, and given the checkpoint's weights.

    Raises UserError where peft or the base is missing, the base is another, or the adapter's files are damaged.
    """
    _require_peft("the checkpoint holds an adapter and", str(directory))
    base = Base.read(directory)
    peft_config, saved = _read_config(directory)
    source = base.find(directory, offline=offline)
    kind = Quantised(base.quantised)
    if kind != Quantised.none:
        quantised.backend(kind, device)
    own = Source(str(directory), None, "")
    config = ModelConfig(path=source.name, pickled_weights=base.pickled_weights, quantised=kind)
    model_config = models.load_config(own, config, offline=True)
    whole = tuple(saved["modules_to_save"] or ())
    held = quantised.loading(kind, device, whole)
    model, _ = models.load(source, config, task, model_config, seed=0, offline=offline, held=held)
    base.prove(model, whole, source)
    try:
        _inject(model, peft_config, whole)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"the adapter does not fit its base: {error}"
        raise UserError(what, where=str(directory / CONFIG_FILE), fix="name another checkpoint") from error
    load_trained(model, directory, whole)
    _read_generation(model, directory)
    return model, Adapter(saved, base)


def _read_config(directory: Path) -> tuple[Any, dict[str, Any]]:
    """(peft's config as an object that can be trained on, the file as it is)."""
    try:
        saved = parsed((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        return _made_again(saved), saved
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{CONFIG_FILE} cannot be read: {error}"
        raise UserError(what, where=str(directory), fix="name another checkpoint") from error


def _made_again(saved: dict[str, Any]) -> Any:
    """peft's config, from what ftune's own options say of it. Raises ValueError and its like for a file that is not of ftune's making."""
    kind = AdapterName(str(saved["peft_type"]).lower())
    told = {name: saved[key] for name, key in OPTIONS.items() if key in saved}
    for option in fields(ModelConfig):
        value = told.get(option.name, option.default)
        wrong = option.name in told and not isinstance(value, (int, float))  # a bool is one
        if expected := "a number" if wrong else out_of_range(value, option.metadata):
            raise ValueError(f"{OPTIONS.get(option.name)} is {value!r}; expected {expected}")
    names = [*saved["target_modules"], *(saved["modules_to_save"] or ())]
    if isinstance(saved["target_modules"], str) or not all(isinstance(name, str) and NAMES.fullmatch(name) for name in names):
        raise ValueError("target_modules are no list of layers")
    return CONFIGS[kind](ModelConfig(adapter=kind, **told), saved["target_modules"])


def _read_generation(model: Any, directory: Path) -> None:
    """How the checkpoint's model writes, where it writes."""
    if (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(directory))


def load_trained(model: nn.Module, directory: Path, whole: Sequence[str]) -> None:
    """Put a checkpoint's adapter and head into a model that has them. Raises UserError where they do not fit."""
    wanted = _trained(model, whole)
    try:
        found = load_file(directory / WEIGHTS_FILE)
    except Exception as error:
        raise UserError(f"{WEIGHTS_FILE} cannot be read: {error}", where=str(directory), fix="name another checkpoint") from error
    wrong = sorted(set(found) ^ set(wanted)) or [name for name, tensor in wanted.items() if tensor.shape != found[name].shape]
    if wrong:
        what = f"the adapter's weights do not fit its config and base: {wrong[0].removeprefix(PREFIX)}"
        raise UserError(what, where=str(directory / WEIGHTS_FILE), fix="name another checkpoint")
    with torch.no_grad():
        for name, tensor in wanted.items():
            if not torch.isfinite(found[name]).all():
                raise models.not_finite(name.removeprefix(PREFIX), directory / WEIGHTS_FILE)
            tensor.copy_(found[name])


# -- plain again ---------------------------------------------------------------------------------
def in_full(model: Any, adapter: Adapter | None) -> nn.Module:
    """A copy on the CPU whose weights are all in fp32, its adapter still in place."""
    if adapter is None or not adapter.base.is_quantised:
        return copy.deepcopy(model).cpu()  # type: ignore[no-any-return]
    full = type(model)(quantised.in_full_config(model.config))
    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in quantised.weights_in_full(model).items() if ".lora_" not in name
    }
    missing = full.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= set(full.all_tied_weights_keys or {}), "every weight of the base is there"
    full.tie_weights()
    _inject(full, _made_again(adapter.config), adapter.whole)
    with torch.no_grad():
        trained = _trained(model, adapter.whole)
        for name, tensor in _trained(full, adapter.whole).items():
            tensor.copy_(trained[name])
    return full.eval()  # type: ignore[no-any-return]


def merge(model: nn.Module) -> None:
    """Add the adapter to the base's weights, in place: what is left is a plain model of its class."""
    _take_out(model, merged=True)


def bare(model: nn.Module) -> None:
    """Take the adapter out, in place: what is left is the base, and the head as it is."""
    _take_out(model, merged=False)


def _take_out(model: nn.Module, *, merged: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            if merged:
                layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(trace, None)

"""A located model, loaded: its config, the task's class with pretrained weights, and what is new in it.

Weights come from safetensors; pickled ones only where asked for, and then with ``weights_only``. Nothing of a model's own code runs
unless the user says so.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from finetune_cli import pooling, randomness
from finetune_cli.config.schema import ModelConfig
from finetune_cli.errors import UserError
from finetune_cli.models.faults import loading
from finetune_cli.models.imports import auto_class
from finetune_cli.models.source import Source
from finetune_cli.storage import checked_name, parsed
from finetune_cli.tasks.base import Task


def load_config(source: Source, config: ModelConfig, *, offline: bool) -> Any:
    """The transformers config of a located model."""
    from transformers import AutoConfig

    with loading(source):
        found = AutoConfig.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=config.trust_remote_code, local_files_only=offline or not source.hub
        )
    _refuse_foreign_kernels(found, source.name)
    if not source.hub:
        _refuse_giants(found, Path(source.name))
        _refuse_shards_elsewhere(Path(source.name))
    return found


def _refuse_shards_elsewhere(directory: Path) -> None:
    """Refuse an index of weights that names files outside its folder."""
    for index in directory.glob("*.index.json"):
        try:
            names = set(parsed(index.read_text(encoding="utf-8"))["weight_map"].values())
            for name in names:
                checked_name(name)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{index.name} is no list of files beside it: {error}"
            raise UserError(what, where=str(index), fix="name a whole Hugging Face model directory") from error


def _refuse_foreign_kernels(model_config: Any, where: str) -> None:
    """A config may name code of the hub as its attention, which transformers would fetch and run where the package kernels is installed."""
    named = [
        str(value) for name, value in vars(model_config).items() if name.endswith(("attn_implementation", "attn_implementation_internal"))
    ]
    if foreign := [name for name in named if "/" in name]:
        what = f"the config names code of the hub as its attention: {foreign[0]}"
        raise UserError(what, where=where, fix="take attn_implementation out of config.json")


def _refuse_giants(model_config: Any, directory: Path) -> None:
    """Refuse a config that speaks of more layers than its file has tensors: building them alone could take days."""
    layers = max((int(n) for name, n in vars(model_config).items() if "layers" in name and isinstance(n, int)), default=0)
    if (file := directory / "model.safetensors").is_file() and layers > 64:
        with loading(Source(str(directory), None, "")), safe_open(file, "pt") as weights:
            tensors = len(weights.keys())
        if layers > tensors:
            what = f"config.json says {layers:,} layers, and the weights have {tensors:,} tensors"
            raise UserError(what, where=str(directory), fix="name a model whose config.json and weights belong together")


def load(
    source: Source,
    config: ModelConfig,
    task: Task[Any],
    model_config: Any,
    *,
    seed: int,
    offline: bool,
    held: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, list[str]]:
    """The task's model class with pretrained weights in fp32 and the names of parameters that are new (the head, mostly).

    ``held``: further arguments of ``from_pretrained``, which hold the weights in fewer bits on their device.
    Raises UserError where the weights do not fit the architecture or hold NaN.
    """
    configure(model_config, config, task)
    torch.manual_seed(randomness.key(seed, "init"))
    with loading(source):
        loaded = auto_class(task.auto_class, model_config).from_pretrained(
            source.name,
            config=model_config,
            revision=source.revision,
            trust_remote_code=config.trust_remote_code,
            local_files_only=offline or not source.hub,
            use_safetensors=None if config.pickled_weights else True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            **(held or {}),
        )
    model, info = loaded
    shapes = {name: (found, wanted) for name, found, wanted in info.get("mismatched_keys", ())}
    new = sorted({*info["missing_keys"], *shapes})
    _refuse_torn(model, new, shapes, source.name)
    if not held:
        check_finite(model, source.name)
        _in_own_memory(model)
    return model, pooled(model, config, new)


def _refuse_torn(model: Any, new: list[str], shapes: Mapping[str, tuple[Any, Any]], where: str) -> None:
    """Raise UserError where weights lack a tensor of the body, or have it in another shape: only heads and poolers may be ``new``."""
    body = _body(model)
    torn = [name for name in new if name in body and "pooler" not in name.split(".")]
    if not torn:
        return
    what = f"the weights do not fit the architecture: {torn[0]} is missing"
    if torn[0] in shapes:
        found, wanted = (list(shape) for shape in shapes[torn[0]])
        what = f"the weights do not fit the architecture: {torn[0]} is of shape {found} and is to be {wanted}"
    more = f", and {len(torn) - 1} more of {len(body)} tensors do not fit" if len(torn) > 1 else ""
    raise UserError(what + more, where=where, fix="name a model whose config.json and weights belong together and are whole")


def _body(model: Any) -> set[str]:
    """Names of the parameters that every model of the family has, whatever its head."""
    names, prefix = [name for name, _ in model.named_parameters()], f"{getattr(model, 'base_model_prefix', '')}."
    if body := {name for name in names if name.startswith(prefix)}:
        return body
    head = model.get_output_embeddings()  # T5 and its like stand on no model of their own
    heads = tuple(f"{name}." for name, module in model.named_modules() if module is head)
    return {name for name in names if not name.startswith(heads)}


def skeleton(config: ModelConfig, task: Task[Any], model_config: Any) -> nn.Module:
    """The task's model without weights, to look at its layers before any are loaded."""
    model_config = copy.deepcopy(model_config)
    configure(model_config, config, task)
    with torch.device("meta"):
        model = auto_class(task.auto_class, model_config).from_config(model_config, trust_remote_code=config.trust_remote_code)
    assert isinstance(model, nn.Module)
    return model


def load_exact(directory: Path, task: Task[Any]) -> nn.Module:
    """A model that ftune or transformers saved whole: every tensor must be there and none may be over. fp32."""
    source = Source(str(directory), None, "")
    model_config = load_config(source, ModelConfig(path=source.name), offline=True)
    with loading(source):
        model, info = auto_class(task.auto_class, model_config).from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,  # left open, transformers would ask on the terminal
        )
    wrong = sorted({*info["missing_keys"], *map(str, info.get("mismatched_keys", ()))})
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors are missing, such as {wrong[0]}", where=str(directory), fix="name a model saved with its head"
        )
    check_finite(model, str(directory))
    assert isinstance(model, nn.Module)
    _in_own_memory(model)
    return model


def configure(model_config: Any, config: ModelConfig, task: Task[Any]) -> None:
    """Write head and dropout into a transformers config."""
    task.configure(model_config)
    if config.dropout is not None:
        for name in list(model_config.to_dict()):
            if re.search(r"(dropout|pdrop)(_prob|_rate)?$", name) and isinstance(
                getattr(model_config, name, None), (int, float, type(None))
            ):
                setattr(model_config, name, config.dropout)


def pooled(model: Any, config: ModelConfig, new: list[str]) -> list[str]:
    """Build the pooling that was asked for into the model; which of the ``new`` parameters are still drawn from the seed."""
    return sorted(set(new) - set(pooling.build_in(model, config.pooling)))


def check_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that hold NaN or infinity. Those held in fewer bits (frozen, of a type of their own) cannot."""
    for name, parameter in model.named_parameters():
        if type(parameter.data) is torch.Tensor and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise not_finite(name, Path(where))


def not_finite(name: str, directory: Path) -> UserError:
    """What is wrong with weights on disk that hold NaN; ``directory`` may be a name on the hub."""
    file = directory / "model.safetensors"
    where = str(file if file.is_file() else directory)
    return UserError(f"the weights hold NaN or infinity, first in {name}", where=where, fix="name other weights, or copy these again")


def _in_own_memory(model: nn.Module) -> None:
    """Copy every weight out of the mapped file to where torch would have put it.

    In the map a tensor begins wherever the file has it; matrix products of such memory round otherwise than those of aligned memory
    (seen with MKL), so that a resumed run would differ from the run it goes on with in the last bit.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()

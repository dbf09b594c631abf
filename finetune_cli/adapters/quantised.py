"""A base held in 8 or 4 bits: which package and hardware can, how it is loaded, and what its numbers are.

int8: bitsandbytes on CUDA (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339), else torchao's weights in 8 bits, on any device.
nf4: bitsandbytes on CUDA, quantised twice (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

torchao's path is tested on a CPU. That of bitsandbytes was run on a CPU alone, with the check of the device taken off, never yet on CUDA.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_cli.config.choices import Quantised
from finetune_cli.errors import UserError


def backend(kind: Quantised, device: str) -> str:
    """The package that holds weights so on a device. Raises UserError that says what is missing where none can."""
    cuda = device == "cuda"
    if cuda and _has("bitsandbytes"):
        return "bitsandbytes"
    if kind == Quantised.int8 and _has("torchao"):
        return "torchao"
    if kind == Quantised.nf4:
        missing = "the package bitsandbytes, which is not installed" if cuda else f"a CUDA device, and this run is on {device}"
        fix = "pip install bitsandbytes" if cuda else "device=cuda on a machine with an NVIDIA GPU, or model.quantised=int8 or none"
    else:
        missing = ("bitsandbytes or torchao" if cuda else f"torchao on {device}") + ", which is not installed"
        fix = ("pip install bitsandbytes" if cuda else "pip install torchao") + ", or model.quantised=none"
    raise UserError(f"model.quantised={kind.value} needs {missing}", where="model.quantised", fix=fix)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def loading(kind: Quantised, device: str, whole: Sequence[str]) -> dict[str, Any]:
    """What ``from_pretrained`` must be told; nothing for weights in full. ``whole``: modules that stay so, since they are trained."""
    if kind == Quantised.none:
        return {}
    import transformers

    on = {"device_map": {"": device}}
    if backend(kind, device) == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(whole)), **on}
    if kind == Quantised.int8:
        return {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(whole)), **on}
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(whole),
    )
    return {"quantization_config": config, **on}


def in_full_config(config: Any) -> Any:
    """A model's config without a word of how its weights are held."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)
    return config


def weights_in_full(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of a model as fp32 on the CPU, by its name."""
    from peft.utils.integrations import dequantize_module_weight

    found = {}
    for name, parameter in model.named_parameters():
        packed = type(parameter).__name__ in ("Params4bit", "Int8Params")
        owner = model.get_submodule(name.rpartition(".")[0])
        tensor = dequantize_module_weight(owner) if packed else numbers(parameter)
        found[name] = tensor.detach().float().cpu()
    return found


def numbers(parameter: nn.Parameter) -> Tensor:
    """What a parameter holds, as a plain tensor: the packed bits of bitsandbytes, the numbers that torchao's stand for."""
    data = parameter.detach()
    if hasattr(data, "dequantize") and type(data) not in (Tensor, nn.Parameter) and "torchao" in type(data).__module__:
        return data.dequantize()
    return data.data if type(data) in (Tensor, nn.Parameter) else data.as_subclass(Tensor)

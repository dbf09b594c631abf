"""What ``save_pretrained`` would write of a model, without writing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor


def saved_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of the file of weights by their names there: no alias twice, and the renamings of loading undone."""
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    found: dict[str, Tensor] = revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))
    return found


def save_without_tensors(model: Any, directory: Path) -> None:
    """The small files: ``config.json``, how it writes where it does, and code of its own if it has any."""
    model.save_pretrained(directory, state_dict={})
    for file in directory.glob("*.safetensors"):
        file.unlink()

"""Batches of a language model: what is learnt, with where the supervised tokens stand; what is asked, padded on the left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_cli.tasks.base import Batch, Layout

if TYPE_CHECKING:
    from finetune_cli.encoded import Columns


def asked(columns: Columns, pad: int) -> Batch:
    """Prompts [B, T] with their mask and the numbers of their rows."""
    import numpy as np
    import torch

    from finetune_cli.encoded import Ragged
    from finetune_cli.tasks.writing.generation import pad_left

    ids, numbers = columns["input_ids"], columns["number"]
    assert isinstance(ids, Ragged) and isinstance(numbers, np.ndarray)
    padded, mask = pad_left(ids, pad)
    return Batch({"input_ids": padded}, None, extra={"mask": mask, "number": torch.from_numpy(np.array(numbers))})


def learnt(columns: Columns, layout: Layout) -> Batch:
    """Token ids [B, T], padded on the right where no token sees it; targets [S] are the supervised tokens, in the order of the batch.

    ``before`` [S]: index of the token before each of them; ``counts`` [B]: how many an example has; ``position_ids`` [B, T] where documents
    are kept apart.
    """
    import numpy as np
    import torch

    from finetune_cli.encoded import Ragged

    ids, supervised, size, starts = columns["input_ids"], columns["supervised"], columns["bytes"], columns.get("starts")
    assert isinstance(ids, Ragged) and isinstance(supervised, Ragged) and isinstance(size, np.ndarray)
    laid = layout.lay({"input_ids": ids})["input_ids"]
    width, lengths = laid.shape[1], ids.lengths()
    example = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(ids.values)) - ids.offsets[example]
    counted = supervised.values.astype(bool)
    tokens = torch.from_numpy(ids.values[counted].astype(np.int64))
    extra = {
        "before": torch.from_numpy((example * width + place - 1)[counted]),
        "counts": torch.from_numpy(np.bincount(example[counted], minlength=len(lengths))),
        "bytes": torch.from_numpy(np.array(size)),
    }
    if isinstance(starts, Ragged):
        begun = np.maximum.accumulate(np.where((starts.values > 0) | (place == 0), np.arange(len(place)), 0))
        positions = np.zeros((len(lengths), width), np.int64)
        positions[example, place] = np.arange(len(place)) - begun
        extra["position_ids"] = torch.from_numpy(positions)
    return Batch({"input_ids": laid}, tokens, {"loss": float(len(tokens))}, extra)

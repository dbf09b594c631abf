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
    """Token ids as laid out, padded where no token sees it; targets [S] are the supervised tokens, in the order of the batch.

    ``before`` [S]: index of the token before each of them in the flattened batch; ``places`` [S]: where they stand in their examples;
    ``counts`` [B]: how many an example has; ``position_ids`` [B, T] where documents are kept apart and the layout does not do so itself.
    """
    import numpy as np
    import torch

    from finetune_cli.encoded import Ragged

    ids, supervised, size, starts = columns["input_ids"], columns["supervised"], columns["bytes"], columns.get("starts")
    assert isinstance(ids, Ragged) and isinstance(supervised, Ragged) and isinstance(size, np.ndarray)
    lengths = ids.lengths()
    place = np.arange(len(ids.values)) - np.repeat(ids.offsets[:-1], lengths)
    asked = {"input_ids": ids, "supervised": supervised}
    if isinstance(starts, Ragged):
        begun = np.maximum.accumulate(np.where((starts.values > 0) | (place == 0), np.arange(len(place)), 0))
        asked["position_ids"] = Ragged(np.arange(len(place)) - begun, ids.offsets)
    laid = layout.lay(asked)
    laid.pop("attention_mask", None)  # what is padded on the right is seen by no token before it
    counted = supervised.values.astype(bool)
    tokens = torch.from_numpy(ids.values[counted].astype(np.int64))
    extra = {
        "before": laid.pop("supervised").flatten().nonzero()[:, 0] - 1,
        "places": torch.from_numpy(place[counted].astype(np.int32)),
        "counts": torch.from_numpy(np.bincount(np.repeat(np.arange(len(lengths)), lengths)[counted], minlength=len(lengths))),
        "bytes": torch.from_numpy(np.array(size)),
    }
    extra |= {"position_ids": laid.pop("position_ids")} if "position_ids" in laid else {}
    return Batch(laid, tokens, {"loss": float(len(tokens))}, extra)

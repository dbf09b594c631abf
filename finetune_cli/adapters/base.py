"""The base of an adapter: the weights that are not in its checkpoints. What tells it again, where it is looked for, and its hash.

A base with a name (hub id, directory, ``minilm``) is found by it. One that has none, such as a model built from scratch, is written once
into the run as ``base/``. A folder or link ``base`` in the checkpoint or the run goes before the name, so that a base may move: it may
lead to a model directory or to the run that made it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_cli import models
from finetune_cli.adapters.quantised import numbers
from finetune_cli.config.choices import Quantised
from finetune_cli.config.schema import ModelConfig
from finetune_cli.errors import UserError
from finetune_cli.models import Source
from finetune_cli.storage import parsed

BASE = "base"
"""The folder that holds a base beside its adapters."""
BASE_FILE = "base.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What tells a base again; ``base.json`` of every checkpoint of an adapter."""

    name: str
    """A hub id, an absolute directory, or ``minilm``."""
    revision: str | None
    hub: bool
    pickled_weights: bool
    quantised: str
    told: str
    sha256: str
    """Of the frozen weights as they were loaded: names, types, shapes and bytes."""

    @classmethod
    def of(cls, source: Source | None, config: ModelConfig, model: Any, whole: Collection[str], *, kept: Path) -> Base:
        """The base of a model that no adapter is in yet; ``kept`` is where one without a name will be written."""
        commit = getattr(model.config, "_commit_hash", None)
        if source is None:
            name, told = os.path.abspath(kept), "built from model.shape, kept in the run"
        else:
            name = models.BUNDLED if config.path == models.BUNDLED and not source.hub else source.name
            name, told = name if source.hub or name == models.BUNDLED else os.path.abspath(name), source.told
        return cls(
            name=name,
            revision=(commit or source.revision) if source and source.hub else None,
            hub=source is not None and source.hub,
            pickled_weights=config.pickled_weights,
            quantised=config.quantised.value,
            told=told,
            sha256=digest(model, whole),
        )

    @classmethod
    def read(cls, directory: Path) -> Base:
        """That of a checkpoint. Raises UserError for a damaged file."""
        try:
            found = cls(**parsed((directory / BASE_FILE).read_text(encoding="utf-8")))
            if not all(isinstance(text, str) for text in (found.name, found.told, found.sha256)):
                raise ValueError("a text is another value")
            Quantised(found.quantised)
            return found
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{BASE_FILE} cannot be read: {error}", where=str(directory), fix="name another checkpoint") from error

    @property
    def is_quantised(self) -> bool:
        """Whether the weights are held in fewer bits."""
        return self.quantised != Quantised.none.value

    def to_json(self) -> bytes:
        """JSON for ``base.json``."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, sort_keys=True).encode()

    def find(self, checkpoint: Path, *, offline: bool) -> Source:
        """Where the base is now. Raises UserError where it is not to be had, naming what was expected."""
        inside = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
        for place in (checkpoint / BASE, inside / BASE):
            if place.is_dir():
                return Source(str(models.of_run(place)), None, f"local directory {place}")
        if self.hub:
            return Source(self.name, self.revision, self.told, hub=True)
        if self.name == models.BUNDLED:
            return models.locate(ModelConfig(path=models.BUNDLED), offline=offline) or Source(self.name, None, self.told)
        if not Path(self.name).is_dir():
            merged = inside / "model"
            raise UserError(
                f"the base of the adapter is not there: {self.told} (sha256 {self.sha256[:12]}…)",
                where=self.name,
                fix=f"say where it is now: ln -s NEW_PLACE {shlex.quote(str(inside / BASE))}, or copy it there"
                + (f"; to use the model, name {merged}, which needs no base" if (merged / "config.json").is_file() else ""),
            )
        return Source(self.name, None, self.told)

    def prove(self, model: nn.Module, whole: Collection[str], where: Source) -> None:
        """Hold a loaded base against the hash. Raises UserError where it is another."""
        found = digest(model, whole)
        if found != self.sha256:
            raise UserError(
                f"the base is not the one of the adapter: its weights have sha256 {found[:12]}…, expected {self.sha256[:12]}…",
                where=where.name,
                fix=f"put the weights back that were there: {self.told}",
            )


def digest(model: nn.Module, whole: Collection[str]) -> str:
    """sha256 of a model's weights but for those of the modules trained ``whole``, in the order of their names."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if any(name.startswith(f"{module}.") for module in whole):
            continue
        tensor = numbers(parameter).cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()

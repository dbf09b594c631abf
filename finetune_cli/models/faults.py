"""What goes wrong while transformers and the hub load something, told in words a user can act on."""

from __future__ import annotations

from types import TracebackType

from finetune_cli import collector
from finetune_cli.errors import MachineError, UserError
from finetune_cli.models.source import Source


def quiet() -> None:
    """Keep transformers' and the hub's own bars, reports and retries off stderr: what they say is said in our words."""
    with collector.resting(until="transformers"):
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

    hub_logging.set_verbosity(hub_logging.CRITICAL)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


class loading:
    """Turns what transformers and the hub raise while loading into errors a user can mend."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __enter__(self) -> None:
        quiet()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not isinstance(error, Exception):
            return
        text = " ".join(str(error).split())
        name = self.source.name
        if isinstance(error, MemoryError) or "can't allocate memory" in text:
            raise MachineError(f"no memory to load {name}", where="model.path", fix="a smaller model") from error
        if "safetensors" in text and ("does not appear to have" in text or "no file" in text.lower() or "not found" in text):
            raise UserError(
                f"{name} has no safetensors weights",
                where=name,
                fix="where it has pickled ones that you trust: ftune train model.pickled_weights=true (loaded with weights_only)",
            ) from error
        if "trust_remote_code" in text:
            raise UserError(
                f"{name} needs its own code",
                where="model.path",
                fix="model.trust_remote_code=true with a pinned model.revision, or another model",
            ) from error
        if self.source.hub:
            raise UserError(
                f"the hub model {name} cannot be had: {_cut(text)}",
                where="model.path",
                fix="check the id, the network, or HF_TOKEN for a gated model; or name a local directory",
            ) from error
        if "pickle" in type(error).__module__:
            raise UserError(
                f"{name} has pickled weights that are damaged or hold more than weights", where=name, fix="name another model"
            ) from error
        cause = _cut(text) or type(error).__name__  # a damaged file may make transformers raise anything
        raise UserError(f"{name} cannot be loaded: {cause}", where=name, fix="name a whole Hugging Face model directory") from error


def _cut(text: str, most: int = 200) -> str:
    """The first sentences of a message, no longer than a line; what is left out is marked."""
    if len(text) <= most:
        return text
    end = text.rfind(". ", 0, most)
    return text[: end + 1] if end > most // 3 else text[:most].rpartition(" ")[0] + " …"

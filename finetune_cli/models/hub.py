"""Whether a model can be had from the hub: asked once, shortly and aloud, before transformers tries again and again in silence."""

from __future__ import annotations

import os

from finetune_cli import console
from finetune_cli.errors import UserError
from finetune_cli.models.faults import quiet
from finetune_cli.models.source import Source

SECONDS = 8.0
"""How long the hub may take to answer."""


def ask_hub(source: Source, *, offline: bool, key: str, here: str = "", near: str = "") -> bool:
    """Whether only the local cache can give the model's files, as it does where the hub is out of reach or may not be asked.

    ``key`` named the model; ``here`` says what was looked for on disk, ``near`` what else may have been meant. Raises UserError where
    the hub has no such model, or neither hub nor cache can give it.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    quiet()
    name = source.name
    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=source.revision), str)
    forbidding = "offline=true" if offline else "HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else ""
    meant = f"did you mean {near}? " if near else ""
    found = f"{here}; " if here else ""
    if forbidding:
        if cached:
            return True
        fix = f"{meant}{'Else ' if meant else ''}give the path of a run or model directory, or unset {forbidding.partition('=')[0]}"
        raise UserError(f"{found}{name} is not in the hub's cache either, and {forbidding} forbids asking the hub", where=key, fix=fix)
    if not cached:
        console.say(f"asking the hub for the model {name}")
    host = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).partition("//")[2]
    fix = f"{meant}{'Else ' if meant else ''}give the path of a run or model directory, or check the id"
    try:
        HfApi().model_info(name, revision=source.revision, timeout=SECONDS)
    except GatedRepoError as error:
        if not cached:
            what = f"{found}the hub gives {name} only to those who accepted its terms"
            raise UserError(what, where=key, fix=f"accept them on {host}/{name}, and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{found}the hub's {name} has no revision {source.revision}", where="model.revision", fix="check it") from error
    except RepositoryNotFoundError as error:
        if not cached:
            what = f"{found}the hub has no model {name} that you may read"
            raise UserError(what, where=key, fix=f"{fix} (HF_TOKEN for a private model)") from error
    except HfHubHTTPError:
        return False  # a mirror that only gives files: they will show
    except Exception as error:  # whatever the network raises
        if not cached:
            raise UserError(f"{found}{name} is not in the hub's cache, and {host} cannot be reached", where=key, fix=fix) from error
        console.warn(f"{host} cannot be reached: {name} comes from the local cache")
        return True
    return False

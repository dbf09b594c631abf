"""Names that are no path: the hub is asked once, aloud, or not at all, and what was looked for is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from ran import Ran

from finetune_cli.errors import UserError
from finetune_cli.models.hub import ask_hub
from finetune_cli.models.source import Source

SOURCE = Source("owner/name", None, "", hub=True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """``hub(error)``: a hub that answers so; returns what it was asked."""

    def answers(error: Exception | None, *, cached: bool = False) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def model_info(self: Any, name: str, **options: Any) -> None:
            asked.append({"name": name, **options})
            if error is not None:
                raise error

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "config.json" if cached else None)
        return asked

    return answers


def test_what_cannot_be_reached_is_told_with_what_was_looked_for(
    hub: Callable[..., list[Any]], ftune_inside: Callable[..., Ran], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "2026-01-01_0000-sentiment-minilm"
    run.mkdir(parents=True)
    for name in ("config.yaml", "status.json"):
        (run / name).write_text("{}")
    asked = hub(ConnectionError("no route"))
    ran = ftune_inside("eval", "sentimint", "data.test=x.csv")
    error, where, fix = ran.fails()
    assert "no run or model directory sentimint" in error and "runs/sentimint" in error and "cannot be reached" in error
    assert where == "where: ckpt" and f"runs/{run.name}?" in fix and "did you mean" in fix
    assert ran.err.startswith("asking the hub for the model sentimint\n") and ran.err.count("\n") == 4
    assert len(asked) == 1 and asked[0]["timeout"] < 10


def test_offline_forbids_asking(hub: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(None)
    with pytest.raises(UserError, match="offline=true forbids"):
        ask_hub(SOURCE, offline=True, key="ckpt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        ask_hub(SOURCE, offline=False, key="ckpt")
    hub(None, cached=True)
    assert ask_hub(SOURCE, offline=True, key="ckpt") and not asked


def test_a_cached_model_needs_no_hub(hub: Callable[..., list[Any]]) -> None:
    hub(TimeoutError("slow"), cached=True)
    assert ask_hub(SOURCE, offline=False, key="ckpt")
    hub(None, cached=True)
    assert not ask_hub(SOURCE, offline=False, key="ckpt")

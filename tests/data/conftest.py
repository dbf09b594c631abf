"""What the tests of reading share: files written byte by byte into a fresh working directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_cli.errors import UserError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """``write("a.csv", text)`` puts a file into the working directory and gives its name back."""
    monkeypatch.chdir(tmp_path)

    def written(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return written


@pytest.fixture
def refused() -> Callable[..., UserError]:
    """``refused(f, ...)`` calls and gives back the UserError that it must raise."""

    def call(function: Callable[..., object], *args: object, **options: object) -> UserError:
        with pytest.raises(UserError) as caught:
            result = function(*args, **options)
            if hasattr(result, "__next__"):
                list(result)  # type: ignore[call-overload]
        error = caught.value
        assert error.what and error.where and error.fix, f"an error says what, where and how to mend it: {error.lines()}"
        assert len(error.lines()) == 3
        return error

    return call

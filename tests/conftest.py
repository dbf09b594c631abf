"""What tests share: tiny rows to learn from, the command line run as a subprocess or in-process, and the device they run on.

``pytest --device cuda`` runs the same tests on a GPU. Nothing here or in a test reaches the network or the user's own cache.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked import Forks
from hypothesis import settings
from ran import EXPERIMENTS, Ran, labelled_rows, write_rows

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one worker per core is enough

settings.register_profile("thorough", max_examples=20_000, deadline=None)  # pytest --hypothesis-profile=thorough

TIMEOUT_SECONDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda", "mps"], help="device that the tests train and predict on")
    parser.addoption("--thorough", action="store_true", help="all cases of the tables of which a sample is run otherwise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A sample of large tables and no thorough tests, unless they are asked for; the long tests first, so that workers end together."""
    counts: dict[str, int] = {}
    left_out = []
    all_of_them = config.getoption("thorough") or any("::" in named for named in config.args)
    for item in [] if all_of_them else items:
        name = item.nodeid.partition("[")[0]
        if item.get_closest_marker("thorough") is not None:
            left_out.append(item)
        elif (sampled := item.get_closest_marker("sampled")) is not None:
            counts[name] = counts.get(name, -1) + 1
            if counts[name] % sampled.args[0]:
                left_out.append(item)
    if left_out:
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
        config.hook.pytest_deselected(items=left_out)
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Test by test to whoever is free, but what looks at one and the same run to one worker, which makes the run once."""
    from xdist.scheduler import LoadScopeScheduling

    class OneRunOneWorker(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, chosen = nodeid.partition("[")
            shared = file.split("::")[0] in ("tests/test_contract.py", "tests/test_adapters.py") and chosen[:-1] in EXPERIMENTS
            return f"{file.split('::')[0]}[{chosen}" if shared else nodeid

    return OneRunOneWorker(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device named by ``--device``."""
    return str(request.config.getoption("--device"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Any:
    """Encoded rows of the tests go to a directory of their own."""
    with tempfile.TemporaryDirectory(prefix="ftune-cache-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("FTUNE_CACHE")
        os.environ["FTUNE_CACHE"] = folder
        yield
        if before is None:
            del os.environ["FTUNE_CACHE"]
        else:
            os.environ["FTUNE_CACHE"] = before


# rows ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Files of one small labelled set that even a tiny model learns."""

    train: Path
    validation: Path
    test: Path

    @property
    def keys(self) -> list[str]:
        """The overrides that name the files."""
        return [f"data.{name}={getattr(self, name)}" for name in ("train", "validation", "test")]


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    """``rows(count, labels=…, shift=…)``: easy rows to write to a file."""
    return labelled_rows


@pytest.fixture
def write() -> Callable[[Path, Sequence[Mapping[str, Any]]], Path]:
    """``write(path, rows)``: rows to a file of the format its name says."""
    return write_rows


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """``corpus(train=64, labels=…, suffix=".csv")``: a small labelled set in files."""

    def make(train: int = 64, held_out: int = 16, labels: Sequence[str] = ("negative", "positive"), suffix: str = ".csv") -> Corpus:
        sizes, paths, shift = {"train": train, "validation": held_out, "test": held_out}, {}, 0
        for name, count in sizes.items():
            paths[name] = write_rows(tmp_path / "data" / f"{name}{suffix}", labelled_rows(count, labels, shift=shift))
            shift += count
        return Corpus(**paths)

    return make


# the command line ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def forks(device: str) -> Iterator[Forks]:
    """``forks.start("train", "key=value", …)``: a command that has begun, as ``Popen``; a device's driver must not be forked."""
    found = Forks(allowed=device == "cpu")
    yield found
    found.end()


@pytest.fixture
def ftune(tmp_path: Path, forks: Forks) -> Callable[..., Ran]:
    """``ftune("train", "key=value", …)`` in a process of its own, standing in ``tmp_path``; ``stdin=``, ``cwd=``, ``env=``.

    ``fresh=True``: in a new interpreter, not in a fork, for what is about the start of a process.
    """

    def run(
        *args: object, stdin: str | bytes = b"", cwd: Path | None = None, env: Mapping[str, str] | None = None, fresh: bool = False
    ) -> Ran:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        with forks.start(*args, fresh=fresh, cwd=cwd or tmp_path, env=env, **pipes) as process:
            try:
                out, err = process.communicate(given, timeout=TIMEOUT_SECONDS)
            except BaseException:
                process.kill()
                raise
        return Ran(process.returncode, out.decode("utf-8"), err.decode("utf-8", "replace"))

    return run


@pytest.fixture
def ftune_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks) -> Callable[..., Ran]:
    """The same in this process: quicker, and what it imports is shared. ``fresh_check=True``: its reload check starts an interpreter."""

    def run(*args: object, stdin: str | bytes = b"", cwd: Path | None = None, fresh_check: bool = False) -> Ran:
        from finetune_cli.cli import entry

        given = stdin.encode() if isinstance(stdin, str) else stdin
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with monkeypatch.context() as patch:
            if "train" in args and not fresh_check and forks.allowed:
                patch.setattr("finetune_cli.engine.export.subprocess", forks.reloading())
            patch.chdir(cwd or tmp_path)
            patch.setattr(sys, "argv", ["ftune", *map(str, args)])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            try:
                code = entry()
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
        written = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (out, err)]  # type: ignore[attr-defined]
        return Ran(int(code or 0), *written)

    return run

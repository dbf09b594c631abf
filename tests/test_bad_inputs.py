"""Bad inputs: every case of bad_inputs/*.yaml ends in three lines on stderr, with nothing on stdout and nothing left behind."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from forked import Forks
from hypothesis import given
from hypothesis import strategies as st
from ran import ROOT, Ran, few, labelled_rows, write_rows

from finetune_cli.errors import UserError

CASES: list[dict[str, Any]] = [
    case
    for file in sorted((Path(__file__).parent / "bad_inputs").glob("*.yaml"))
    for case in yaml.safe_load(file.read_text(encoding="utf-8"))
]
QUICK_SECONDS = 2.0
"""Processor time in which a mistake in config or data is found."""
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.steps=2", "device=cpu"]


# files -----------------------------------------------------------------------------------------------------------------------


def lay(path: Path, content: Any) -> None:
    """Make one file as the table describes it: its text, or how its bytes come about (the keys are told in text_classification.yaml)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_bytes(content.encode())
    elif "folder" in content:
        path.mkdir()
    elif "link" in content:
        path.symlink_to(content["link"])
    elif "pipe" in content:
        os.mkfifo(path)
    elif "remove" in content:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    elif "easy" in content:
        write_rows(path, labelled_rows(content["easy"], shift=content.get("shift", 0)))
    else:
        path.write_bytes(made(path, content))
    if isinstance(content, dict) and "mode" in content:
        path.chmod(content["mode"])


def made(path: Path, content: dict[str, Any]) -> bytes:
    """The bytes of a file from a description in several keys."""
    if "table" in content:
        whole = columnar(path, content["table"])
    elif "text" in content:
        whole = (content["text"] * content.get("times", 1)).encode(content.get("encoding", "utf-8"))
    else:
        whole = path.read_bytes()
    whole = content.get("before", "").encode() + whole + content.get("after", "").encode()
    if content.get("gzip"):
        whole = gzip.compress(whole, mtime=0)
    if "flip" in content:
        at = content["flip"] % len(whole)
        whole = whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]
    return whole[: content.get("cut")]


def columnar(path: Path, rows: list[dict[str, Any]]) -> bytes:
    """Rows as a Parquet or Arrow file, by the ending of the name."""
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if path.suffix == ".parquet":
        pq.write_table(table, sink)
    else:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def left_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with what changes when it is written; locks are there to be touched."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.name != ".lock"}
    folders = {name for name, path in found.items() if path.is_dir() and not path.is_symlink()}
    stats = {name: path.lstat() for name, path in found.items()}
    return {name: (0, 0) if name in folders else (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


KINDS: dict[str, list[str]] = {
    "run": [],
    "stars": ["task=text-regression", "data.label=stars"],
    "pairs": ["data.text=text", "data.text_pair=other"],
    "topics": ["data.label=topics", "data.label_delimiter=;"],
    "masks": ["task=fill-mask"],
    "lora": ["model.adapter=lora", "model.rank=2"],
}
"""Kinds of runs that cases begin from, and the settings that make them."""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Callable[[str], Path]:
    """``trained("run")``: a small finished run of a kind, trained once by each worker."""
    runs: dict[str, Path] = {}

    def train(kind: str) -> Path:
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            for name, shift in (("train", 0), ("validation", 40), ("test", 60)):
                rows = labelled_rows(40 if name == "train" else 12, shift=shift)
                write_rows(folder / f"{name}.csv", [{**row, "other": "a second text", "topics": ";".join(row["topics"])} for row in rows])
            keys = [f"data.{name}={folder / f'{name}.csv'}" for name in ("train", "validation", "test")]
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
            process = forks.start("train", *keys, *SMALL, f"run.dir={folder / 'run'}", *KINDS[kind], cwd=folder, **quiet)
            errors = process.communicate()[1]
            assert process.returncode == 0, errors.decode()
            runs[kind] = folder / "run"
        return runs[kind]

    return train


def prepare(case: dict[str, Any], folder: Path, trained: Callable[[str], Path]) -> list[str]:
    """Make the files of a case in a folder; the arguments."""
    if kind := case.get("run"):
        shutil.copytree(trained(kind), folder / "run", symlinks=True)
    for name, content in case.get("files", {}).items():
        lay(folder / name, content)
    return shlex.split(case["args"])


# the table -------------------------------------------------------------------------------------------------------------------


def test_the_table_itself() -> None:
    names = [f"{case['id']} {case['about']}" for case in CASES]
    assert len(CASES) >= 400 and len(set(names)) == len(names)
    assert all(case.get("error") or case.get("where") for case in CASES if case["id"][0] in "CDS"), "words or a place"
    keys = {"id", "about", "files", "run", "args", "stdin", "exit", "error", "where", "fix"}
    assert not [case["id"] for case in CASES if set(case) - keys]


def told_apart(cases: list[dict[str, Any]]) -> Iterator[Any]:
    """The first case of every kind is always run, of the others a sample."""
    kinds: set[str] = set()
    for case in cases:
        yield pytest.param(case, id=f"{case['id']} {case['about']}", marks=[pytest.mark.sampled(12)] if case["id"] in kinds else [])
        kinds.add(case["id"])


@pytest.mark.parametrize("case", list(told_apart(CASES)))
def test_a_bad_input_is_told_in_three_lines(
    case: dict[str, Any], tmp_path: Path, ftune_inside: Callable[..., Ran], trained: Callable[[str], Path]
) -> None:
    arguments = prepare(case, tmp_path, trained)
    before = left_in(tmp_path)
    began = time.process_time()
    ran = ftune_inside(*arguments, stdin=case.get("stdin", ""))
    if "run" not in case and case["id"][0] in "CDS" and time.process_time() - began > QUICK_SECONDS:  # perhaps it was the first to import
        began = time.process_time()
        ran = ftune_inside(*arguments, stdin=case.get("stdin", ""))
        assert time.process_time() - began <= QUICK_SECONDS
    told = dict(line.split(": ", 1) for line in ran.fails(case.get("exit", 2)))
    assert ran.out == ""
    assert left_in(tmp_path) == before
    for part in ("error", "where", "fix"):
        missing = [words for words in case.get(part, []) if words not in told.get(part, "")]
        assert not missing, f"{part} lacks {missing}\n{ran.err}"


IN_ONE_PROCESS = """
import contextlib, io, json, os, sys
from finetune_cli.cli import main
told = []
for folder, arguments in json.load(sys.stdin):
    os.chdir(folder)
    sys.argv = ["ftune", *arguments]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        code = main()
    told.append([arguments, code, [name for name in ("torch", "transformers") if name in sys.modules]])
print(json.dumps(told))
"""


def test_config_errors_answer_without_torch(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    """One process for all of them: a single import of torch would show in every later case."""
    jobs = []
    chosen = [case for case in CASES if case["id"].startswith("C") and "run" not in case]
    for i, case in enumerate(chosen):
        folder = tmp_path / str(i)
        folder.mkdir()
        jobs.append((str(folder), prepare(case, folder, trained)))
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS],
        input=json.dumps(jobs).encode(),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    for arguments, code, loaded in json.loads(done.stdout):
        assert code == 2 and not loaded, (arguments, code, loaded)


# anything --------------------------------------------------------------------------------------------------------------------

FEW = few(5)
CELLS = [
    "text,label\n",
    "good,pos\n",
    "bad,neg\n",
    '{"text": "a", "label": "p"}\n',
    '{"text": "b", "label": 1}\n',
    "\ufeff",
    "\u2028",
    "é",
    "中",
]
PIECES = [*CELLS, *'",\n\r\t;\0{}[]: ', "\U0001f600", "\u202e", "null", "NaN", "1e999", "-1", "PAR1", "\\ud800"]
STARTS = [b"PAR1", b"ARROW1", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\xff\xfe", b"\xef\xbb\xbf"]
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(PIECES), max_size=30).map(lambda parts: "".join(parts).encode()),
    st.tuples(st.sampled_from(STARTS), st.binary(max_size=60)).map(b"".join),
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".txt", ".parquet", ".csv.gz"])
@FEW
@given(content=BYTES)
def test_any_bytes_are_read_or_refused(
    suffix: str, content: bytes, tmp_path: Path, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the model, which what can be read would train."""

    def trainer(*_: Any) -> Any:
        raise UserError("all was read", where="here", fix="none")

    monkeypatch.setattr("finetune_cli.engine.building.assembled", trainer)
    (tmp_path / f"any{suffix}").write_bytes(content)
    lenient = ["data.validation=null", "data.max_conflicts=1", "data.max_empty=1", "data.max_unknown=1"]
    ran = ftune_inside("train", f"data.train=any{suffix}", *SMALL, *lenient, *(["data.pattern={label} {text}"] if suffix == ".txt" else []))
    assert len(ran.fails(2)) == 3 and ran.out == ""
    assert [path.name for path in tmp_path.iterdir()] == [f"any{suffix}"]


@FEW
@given(content=BYTES)
def test_any_bytes_piped_in_are_labelled_or_refused(
    content: bytes, ftune_inside: Callable[..., Ran], trained: Callable[[str], Path]
) -> None:
    ran = ftune_inside("predict", trained("run"), stdin=content)
    assert ran.code == 0 or ran.fails(2)
    assert all(set(line) >= {"row", "text", "label"} for line in ran.lines)


VALID = ["data.train=reviews", "optimizer.lr=1e-4", "model=tiny", "model.shape.layers=1", "train.steps=3", "data.text=[a,b]"]
VALID += ["expect.accuracy='>=0.8'", "optimizer=sgd", "+exp=sentiment", "run.name=é b,c=d", "data.validation=0.2", "device=cpu"]
VALID += ["train.eval_every=epoch", "resume_allow=[train.steps]"]
WORDS = ["${", "${oc.env:X}", "null", "nan", "1e999", "é", "\u202e", "_target_", "choice(", "hydra."]
SIGNS = st.sampled_from([*"=.,:+-~@/\\'\"[]{}()$*?!#%& \t\n", *WORDS])


@st.composite
def mutated(draw: st.DrawFn) -> list[str]:
    """Valid settings with a few characters put in, taken out or replaced."""
    given = draw(st.lists(st.sampled_from(VALID), min_size=1, max_size=4))
    for _ in range(draw(st.integers(1, 3))):
        which = draw(st.integers(0, len(given) - 1))
        at = draw(st.integers(0, len(given[which])))
        given[which] = given[which][:at] + draw(st.just("") | SIGNS) + given[which][at + draw(st.integers(0, 2)) :]
    return given


@few(20)
@given(arguments=mutated())
def test_mutated_settings_are_composed_or_refused(arguments: list[str], ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside("train", "data.train=reviews", *arguments, "--cfg", "job")
    assert ran.code == 0 or ran.fails(2)


def test_a_page_of_errors_has_a_row_for_each_kind() -> None:
    """``scripts/errors_page.py``, with what the table says in place of what a run would."""
    page = runpy.run_path(str(ROOT / "scripts" / "errors_page.py"))
    found = page["kinds"]()
    assert set(found) == {case["id"] for case in CASES}
    text = page["section"](found.values(), lambda case: {"error": "a|b <c>", "where": "x", "fix": "y"})
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what was wrong")]
    assert len(rows) == len(found) and all(re.sub(r"\\.", "", row).count("|") == 4 for row in rows)
    assert set(page["kinds"](["C01"])) == {"C01"}

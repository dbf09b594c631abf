"""Anything at all: tables in any form come back as they were, and whatever a config or a checkpoint holds is used or refused, never a bug.

``pytest tests/test_properties.py --hypothesis-profile=thorough`` tries 20,000 times where the usual run tries a few dozen.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from enemies import Quick
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from ran import Ran, few

from finetune_cli import checkpoint
from finetune_cli.adapters.adapter import _read_config
from finetune_cli.adapters.base import Base
from finetune_cli.checkpoint import Knowledge
from finetune_cli.config import saved
from finetune_cli.config.choices import DataFormat
from finetune_cli.config.options import options_of
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import texts
from finetune_cli.data.readers import read
from finetune_cli.engine import resume
from finetune_cli.errors import UserError
from finetune_cli.run import Run
from finetune_cli.storage import Lock, Store, seal
from finetune_cli.tasks import task_configs

pytestmark = pytest.mark.sampled(4)

# tables ----------------------------------------------------------------------------------------------------------------------

CHARACTERS = {
    "utf-8": st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"),
    "cp1252": st.sampled_from([bytes([b]).decode("cp1252", "ignore") for b in range(1, 256)]).filter(bool),
    "gb18030": st.characters(min_codepoint=0x4E00, max_codepoint=0x9FA5) | st.sampled_from("ab,;|\"\n\r\t' "),
}
FORMS = [("utf-8", None), ("utf-8-sig", None), ("utf-16", None), ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252"), ("gb18030", "gb18030")]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[str]], str, str | None]:
    """Rows of two cells, the encoding they are written in, and what has to be said of it."""
    encoding, told = draw(st.sampled_from(FORMS))
    cell = st.text(CHARACTERS.get(encoding, CHARACTERS["utf-8"]) | st.sampled_from(list(",;|\"\n\r\t '")), max_size=12)
    return draw(st.lists(st.lists(cell, min_size=2, max_size=2), min_size=1, max_size=8)), encoding, told


def quoted(cell: str, delimiter: str, *, everything: bool) -> str:
    """A cell as CSV has it: in quotes where it must be. (Python's own writer leaves a lone CR bare.)"""
    return '"' + cell.replace('"', '""') + '"' if everything or set(cell) & {delimiter, '"', "\r", "\n"} else cell


@few(120)
@given(
    table=tables(),
    delimiter=st.sampled_from(",;|\t"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    everything=st.booleans(),
    packed=st.booleans(),
    last=st.booleans(),
)
def test_a_table_in_any_dialect_and_encoding_comes_back(
    table: tuple[list[list[str]], str, str | None], delimiter: str, end: str, everything: bool, packed: bool, last: bool, tmp_path: Path
) -> None:
    rows, encoding, told = table
    lines = [delimiter.join(quoted(cell, delimiter, everything=everything) for cell in row) for row in [["text", "other"], *rows]]
    written = end.join(lines) + end * last
    raw = written.encode(encoding)
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    path.write_bytes(gzip.compress(raw) if packed else raw)
    config = DataConfig(format=DataFormat.csv, delimiter=delimiter, header=True, encoding=told)
    found = read(str(path), config)
    assert [list(row) for row in zip(texts(found, "text"), texts(found, "other"), strict=True)] == rows


@few(60)
@given(
    rows=st.lists(st.text(CHARACTERS["utf-8"], max_size=20), min_size=1, max_size=9),
    plainly=st.booleans(),
    form=st.sampled_from(["jsonl", "json", "parquet"]),
)
def test_texts_of_other_forms_come_back(rows: list[str], plainly: bool, form: str, tmp_path: Path) -> None:
    path, objects = tmp_path / f"a.{form}", [{"text": row} for row in rows]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(objects), path)
    elif form == "json":
        path.write_text(json.dumps(objects, ensure_ascii=plainly), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(o, ensure_ascii=plainly) + "\n" for o in objects), encoding="utf-8", newline="")
    assert texts(read(str(path), DataConfig()), "text") == rows


# configs ---------------------------------------------------------------------------------------------------------------------

KEYS = sorted(options_of("train", task_configs()))
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["auto", "1e-4", "null", "${data.train}", "${oc.env:NOPE}", "${x:y}", "a/b.csv", "???", "_target_", "nan", "0x10", "12:30"]
    ),
)
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Options with values of any type and size, some of them misspelt or nested where nothing nests."""
    tree: dict[str, Any] = {}
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(KEYS))
        if draw(st.integers(0, 5)) == 0:
            key += draw(st.sampled_from([".more", "x", ".0", "._target_", ".a.b"]))
        node, *rest = tree, *key.split(".")
        for part in rest[:-1]:
            node = node.setdefault(part, {}) if isinstance(node, dict) else {}
        if isinstance(node, dict):
            node[rest[-1]] = draw(TREES)
    return tree


@few(12)
@given(tree=configs())
def test_any_config_is_composed_or_refused(tree: dict[str, Any], tmp_path: Path, ftune_inside: Callable[..., Ran]) -> None:
    (tmp_path / "mine" / "exp").mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(tree, allow_unicode=True)
    (tmp_path / "mine" / "exp" / "mine.yaml").write_text(f"# @package _global_\n{text}", encoding="utf-8")
    ran = ftune_inside("train", "--config-dir", "mine", "+exp=mine", "--cfg", "job")
    assert ran.code == 0 or ran.fails(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


# what lies in a checkpoint ---------------------------------------------------------------------------------------------------

KNOWN = {
    "task": "text-classification",
    "facts": {"labels": ["a", "b"], "cells": ["a", "b"], "multi": False, "weights": None, "decisions": {}},
    "columns": {"text": "text", "text_pair": None, "label": "label"},
    "max_length": 32,
    "seed": 1,
    "plan": {
        "device": {"device": "cpu", "precision": "fp32", "threads": 1},
        "batches": {
            "batch_size": 1,
            "micro_tokens": 9,
            "inference_tokens": 9,
            "order": "buckets",
            "whole": False,
            "packed": False,
            "reasons": {},
        },
    },
}
BASE = {"name": "a", "revision": None, "hub": False, "pickled_weights": False, "quantised": "none", "told": "a", "sha256": "0"}
ADAPTER = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "target_modules": ["q"],
    "modules_to_save": None,
}
STATE = {"map": {"step": {"value": 2}, "plan": {"map": {"packed": {"value": False}}}, "moments": {"list": [{"float": "0x1p0"}]}}}
RECORD = {"plan": KNOWN["plan"], "files": {"train": {"a.csv": "0"}}}


@st.composite
def changed(draw: st.DrawFn, whole: Any) -> Any:
    """A tree with one of its parts replaced by anything."""
    if isinstance(whole, (dict, list)) and whole and draw(st.integers(0, 6)):
        at = draw(st.sampled_from(sorted(whole) if isinstance(whole, dict) else range(len(whole))))
        copy = whole.copy()
        copy[at] = draw(changed(whole[at]))
        return copy
    return draw(TREES)


def read_state(folder: Path) -> object:
    return checkpoint.load_state(folder)


def read_begun(folder: Path) -> object:
    return resume.begun(Run(folder))


def write_sealed(path: Path, value: Any) -> None:
    path.write_bytes(seal(value if isinstance(value, dict) and value and "seal" not in value else {"a": value}))


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


READERS: dict[str, tuple[str, Any, Callable[[Path], object], Callable[[Path, Any], None]]] = {
    "task": ("task.json", KNOWN, Knowledge.read, write_json),
    "base": ("base.json", BASE, Base.read, write_json),
    "adapter": ("adapter_config.json", ADAPTER, _read_config, write_json),
    "state": ("state.json", STATE, read_state, write_json),
    "record": ("manifest.json", RECORD, read_begun, write_sealed),
}


@pytest.fixture(scope="module")
def folder() -> Any:
    from safetensors.torch import save_file
    from torch import zeros

    with tempfile.TemporaryDirectory() as name:
        save_file({"none": zeros(0)}, Path(name) / "state.safetensors")
        yield Path(name)


@pytest.mark.parametrize("kind", READERS)
@few(60)
@given(data=st.data())
def test_any_json_of_a_checkpoint_is_read_or_refused(kind: str, data: st.DataObject, folder: Path) -> None:
    name, whole, reader, write = READERS[kind]
    try:
        write(folder / name, data.draw(changed(whole)))
    except (ValueError, TypeError):  # not JSON, or not UTF-8
        return
    try:
        reader(folder)
    except UserError as error:
        assert len(error.lines()) == 3


@pytest.mark.parametrize("kind", READERS)
def test_what_ftune_writes_is_read(kind: str, folder: Path) -> None:
    name, whole, reader, write = READERS[kind]
    write(folder / name, whole)
    assert reader(folder) is not None


@pytest.mark.parametrize("name", ["task.json", "base.json", "adapter_config.json", "state.json", "state.safetensors", "manifest.json"])
@few(40)
@given(content=st.binary(max_size=80) | st.tuples(st.binary(min_size=8, max_size=8), st.text(max_size=40).map(str.encode)).map(b"".join))
def test_any_bytes_in_a_checkpoint_are_read_or_refused(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_bytes(content)
        (Path(place) / "state.json").touch()
        for reader in (Knowledge.read, Base.read, _read_config, read_state, read_begun):
            try:
                reader(Path(place))
            except UserError as error:
                assert len(error.lines()) == 3


@few(60)
@given(
    content=st.binary(max_size=60)
    | st.recursive(SCALARS, lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3)).map(lambda t: yaml.safe_dump(t).encode())
)
def test_any_bytes_as_a_saved_config_are_read_or_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    try:
        saved.load(tmp_path / "config.yaml", tasks=task_configs())
    except UserError as error:
        assert error.lines()


# the store -------------------------------------------------------------------------------------------------------------------


class Death(BaseException):
    """A kill: nothing that comes after it happens, not even the tidying up."""


class Dying(Quick):
    """A file system under a process that dies at its ``at``-th call; later calls are those of a dead process."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if name.startswith("_") or name in ("left", "free", "wait") or not callable(found):
            return found

        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise Death
            return found(*arguments)

        return call


class Checkpoints(RuleBasedStateMachine):
    """Save, die, damage, go on, go back, lock, in any order, against a model of what was acknowledged."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="ftune-store-"))
        self.keep = 2
        self.store = Store(self.root / "checkpoints", Quick(), self.keep)
        self.step = 0
        self.written: dict[int, set[bytes]] = {}
        """Every content that a step was ever given, acknowledged or not."""
        self.last: int | None = None
        """The newest step that was acknowledged and not gone back behind."""
        self.damaged: set[int] = set()
        self.lock: Lock | None = None

    def teardown(self) -> None:
        if self.lock is not None:
            self.lock.release()
        shutil.rmtree(self.root)

    def files(self, content: bytes) -> dict[str, Any]:
        return {"model.safetensors": content, "state.json": lambda file: file.write(content[::-1])}

    @rule(content=st.binary(min_size=1, max_size=40), best=st.booleans())
    def save(self, content: bytes, best: bool) -> None:
        self.step += 1
        self.written.setdefault(self.step, set()).add(content)
        self.store.save(self.step, self.files(content), best=best, meta={"content": content.hex()})
        self.last = self.step
        self.damaged.discard(self.step)

    @rule(content=st.binary(min_size=1, max_size=40), best=st.booleans(), at=st.integers(0, 40))
    def die_while_saving(self, content: bytes, best: bool, at: int) -> None:
        self.written.setdefault(self.step + 1, set()).add(content)
        try:
            Store(self.store.root, Dying(at), self.keep).save(
                self.step + 1, self.files(content), best=best, meta={"content": content.hex()}
            )
        except Death:
            pass
        else:
            self.step = self.last = self.step + 1
            self.damaged.discard(self.step)

    @rule()
    def start_again(self) -> None:
        """What a resume does first."""
        self.store.sweep()
        assert (
            not [name for name in os.listdir(self.store.root) if name.startswith((".tmp-", ".trash-"))]
            if self.store.root.is_dir()
            else True
        )
        newest, _ = self.store.newest()
        if newest is not None:
            self.step = int(newest.name.removeprefix("step-"))
            self.store.rewind(self.step)
            self.last = self.step
            assert self.store.last() == newest

    @precondition(lambda self: self.store.steps())
    @rule(which=st.integers(0, 9), place=st.integers(0, 10**6), bit=st.integers(0, 7), cut=st.booleans())
    def damage(self, which: int, place: int, bit: int, cut: bool) -> None:
        names = self.store.steps()
        checkpoint_dir = self.store.root / names[which % len(names)]
        files = sorted(path for path in checkpoint_dir.iterdir() if path.stat().st_size)
        if not files:
            return
        path = files[place % len(files)]
        data = bytearray(path.read_bytes())
        if cut:
            del data[-1]
        else:
            data[place % len(data)] ^= 1 << bit
        path.write_bytes(data)
        self.damaged.add(int(checkpoint_dir.name.removeprefix("step-")))

    @precondition(lambda self: self.step > 1)
    @rule(back=st.integers(1, 3))
    def go_back(self, back: int) -> None:
        self.store.rewind(max(self.step - back, 0))
        steps = [int(name.removeprefix("step-")) for name in self.store.steps()]
        self.step = max(self.step - back, 0)
        self.last = max(steps, default=None)
        self.damaged &= set(steps)

    @rule()
    def take_the_lock(self) -> None:
        """A second process is refused while one holds it."""
        if self.lock is None:
            self.lock = Lock(self.root / ".lock")
        else:
            with pytest.raises(UserError, match="in use"):
                Lock(self.root / ".lock")

    @rule()
    def give_the_lock_back(self) -> None:
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        newest, bad = self.store.newest()
        if self.last is not None and self.last not in self.damaged:
            assert newest is not None and int(newest.name.removeprefix("step-")) >= self.last
        if newest is not None:
            step = int(newest.name.removeprefix("step-"))
            content = (newest / "model.safetensors").read_bytes()
            assert content in self.written[step] and (newest / "state.json").read_bytes() == content[::-1]
        assert {int(name.removeprefix("step-")) for name, _ in bad} <= self.damaged

    @invariant()
    def few_are_kept(self) -> None:
        assert len(self.store.steps()) <= self.keep + 2 + len(self.damaged) + 1


Checkpoints.TestCase.settings = settings(few(25), stateful_step_count=20)
TestCheckpoints = Checkpoints.TestCase

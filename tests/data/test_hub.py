"""Hub datasets, through a stand-in for the package ``datasets``: nothing here reaches the network."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from finetune_cli.config.schema import DataConfig
from finetune_cli.data import load_splits, read


class FakeDataset:
    """One split as ``datasets`` gives it: an Arrow table behind ``with_format`` and features with class names."""

    def __init__(self, table: pa.Table, features: dict[str, Any]) -> None:
        self.table, self.features = table, features

    def with_format(self, form: str) -> FakeDataset:
        assert form == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pa.Table:
        return self.table[rows]


@pytest.fixture
def hub(write: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Installs the stand-in; gives the list of calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> FakeDataset:
        calls.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("cannot reach the hub\nand more")
        start = {"train": 0, "validation": 100, "test": 200}[split]
        texts = pa.array([f"row {i}" for i in range(start, start + 40)], pa.large_string())
        labels = [-1] * 40 if split == "test" else [i % 2 for i in range(40)]
        return FakeDataset(pa.table({"text": texts, "label": labels}), {"text": None, "label": SimpleNamespace(names=["neg", "pos"])})

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return calls


def test_splits_of_a_hub_dataset_come_with_names_and_digests(hub: list[tuple[Any, ...]]) -> None:
    said: list[str] = []
    splits = load_splits(DataConfig(train="org/set", validation="org/set", test="hub:org/set:cfg:test"), seed=1, say=said.append)
    assert hub == [("org/set", None, "train"), ("org/set", None, "validation"), ("org/set", "cfg", "test")]
    assert splits.rows["train"].column("label")[:2].to_pylist() == ["neg", "pos"] and splits.labelled == {"train", "validation"}
    assert splits.rows["train"].where(1) == "hub:org/set:train, row 2"
    digests = [digest for files in splits.sources.values() for digest in files.values()]
    assert len(set(digests)) == 3 and all(len(digest) == 64 for digest in digests)
    assert len(said) == 3 and "org/set" in said[0]


def test_what_the_hub_cannot_give(hub: list[tuple[Any, ...]], refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot reach the hub" in refused(read, "org/gone", DataConfig()).what
    assert "network" in refused(read, "org/set", DataConfig(), offline=True).what
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refused(read, "org/set", DataConfig()).fix
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "network" in refused(read, "org/set", DataConfig()).what
    assert hub == [("org/gone", None, "train")]

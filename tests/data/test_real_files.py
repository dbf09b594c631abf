"""Real files, row for row, where a folder of them is given: FTUNE_DATA=/path/to/data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from finetune_cli.config.choices import ExtraFields
from finetune_cli.config.schema import DataConfig
from finetune_cli.data import label_cells, load_splits, read, targets

HOME = Path(os.environ.get("FTUNE_DATA", "/nonexistent"))
pytestmark = pytest.mark.skipif(not HOME.is_dir(), reason="FTUNE_DATA names no folder")

BARE = {"header": False, "columns": ["text", "label"]}
AG = {"columns": ["Class Index", "Title", "Description"]}
STS = {"header": False, "extra_fields": ExtraFields.ignore, "columns": ["genre", "file", "year", "id", "score", "sentence1", "sentence2"]}
COUNTS: list[tuple[str, int, dict[str, Any]]] = [
    ("sst2/train.tsv", 67_349, {}),
    ("sst2/dev.tsv", 872, {}),
    ("sst2/test.tsv", 1_821, {}),
    ("sst2_sentences/train.tsv", 6_920, BARE),
    ("sst2_sentences/dev.tsv", 872, BARE),
    ("sst2_sentences/test.tsv", 1_821, BARE),
    ("ag_news/train.csv", 12_000, {}),
    ("ag_news/test.csv", 7_600, {}),
    ("ag_news/train.csv", 12_000, AG),
    ("ag_news/ag_news_csv/train_head2000.csv", 2_000, AG),
    ("ag_news/ag_news_csv/test.csv", 7_600, AG),
    ("thucnews/train.txt", 33_590, BARE),
    ("thucnews/dev.txt", 10_000, BARE),
    ("thucnews/test.txt", 10_000, BARE),
    ("waimai_10k/waimai_10k.csv", 11_987, {}),
    ("stsb/train.tsv", 5_749, {}),
    ("stsb/dev.tsv", 1_500, {}),
    ("stsb/test.tsv", 1_379, {}),
    ("stsb/original_sts-test.tsv", 1_379, STS),
    ("mrpc/train.tsv", 3_667, {}),
    ("mrpc/dev.tsv", 408, {}),
    ("mrpc/test.tsv", 1_725, {}),
    ("mrpc/msr_paraphrase_test.txt", 1_725, {}),
]


@pytest.mark.parametrize(("name", "count", "options"), COUNTS, ids=[f"{name}-{len(o)}" for name, _, o in COUNTS])
def test_no_row_is_lost(name: str, count: int, options: dict[str, Any]) -> None:
    assert len(read(str(HOME / name), DataConfig(**options))) == count


def test_label_counts() -> None:
    def counted(name: str, **options: Any) -> dict[str, int]:
        config = DataConfig(train=str(HOME / name), validation=None, **options)
        splits = load_splits(config, seed=0)
        labels = [cell[0] for cell in label_cells(splits.rows["train"], splits.roles, config)]
        return {label: labels.count(label) for label in sorted(set(labels))}

    assert counted("sst2/train.tsv") == {"0": 29_780, "1": 37_569}
    assert counted("sst2_sentences/test.tsv", **BARE) == {"0": 912, "1": 909}
    assert counted("ag_news/train.csv", text="Description") == {"1": 2_967, "2": 3_044, "3": 3_027, "4": 2_962}
    assert counted("waimai_10k/waimai_10k.csv") == {"0": 7_987, "1": 4_000}
    assert counted("mrpc/msr_paraphrase_test.txt") == {"0": 578, "1": 1_147}


def test_splits_of_pairs_with_other_headers() -> None:
    config = DataConfig(train=str(HOME / "stsb/train.tsv"), validation=str(HOME / "stsb/dev.tsv"), test=str(HOME / "stsb/test.tsv"))
    splits = load_splits(config, seed=0, stratify=False)
    assert splits.roles.text_pair == "sentence2" and splits.labelled == {"train", "validation"}
    assert abs(targets(splits.rows["train"], splits.roles).mean() - 2.70) < 0.005
    directory = load_splits(DataConfig(train=str(HOME / "sst2"), validation=str(HOME / "sst2"), test=str(HOME / "sst2")), seed=0)
    assert {name: len(rows) for name, rows in directory.rows.items()} == {"train": 67_349, "validation": 872, "test": 1_821}
    assert directory.labelled == {"train", "validation"}


def test_a_file_sorted_by_label_gives_both_classes_to_both_parts() -> None:
    config = DataConfig(train=str(HOME / "waimai_10k/waimai_10k.csv"))
    splits = load_splits(config, seed=0)
    labels = [cell[0] for cell in label_cells(splits.rows["validation"], splits.roles, config)]
    assert (labels.count("1"), labels.count("0")) == (400, 799)

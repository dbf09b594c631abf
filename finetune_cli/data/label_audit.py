"""What is wrong with labels: near-twins, space around them, ids taken for labels, labels that only one split knows."""

from __future__ import annotations

import difflib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.labels import is_text
from finetune_cli.data.rows import count, listed
from finetune_cli.data.splits import Splits
from finetune_cli.errors import UserError

MISSING = ("na", "n/a", "nan", "null", "none", "nil", "<na>", "#n/a")
"""What other programs write for a cell without a value."""
FEW = 20
"""Training rows below which every row may well have a label of its own."""


LIKE_LATIN = {
    "A": "\u0391\u0410", "B": "\u0392\u0412", "C": "\u0421", "E": "\u0395\u0415", "H": "\u0397\u041d", "I": "\u0399\u0406", "J": "\u0408",
    "K": "\u039a\u041a", "M": "\u039c\u041c", "N": "\u039d", "O": "\u039f\u041e", "P": "\u03a1\u0420", "S": "\u0405", "T": "\u03a4\u0422",
    "X": "\u03a7\u0425", "Y": "\u03a5\u0423", "Z": "\u0396", "a": "\u03b1\u0430", "c": "\u0441", "d": "\u0501", "e": "\u0435",
    "h": "\u04bb", "i": "\u03b9\u0456", "j": "\u0458", "l": "\u04cf", "o": "\u03bf\u043e", "p": "\u03c1\u0440", "q": "\u051b",
    "s": "\u0455", "v": "\u03bd", "w": "\u051d", "x": "\u0445", "y": "\u0443",
}  # fmt: skip
"""Greek and Cyrillic letters that are drawn like a Latin one."""
_TO_LATIN = {ord(other): latin for latin, others in LIKE_LATIN.items() for other in others}


def look(label: str) -> str:
    """A label as the eye sees it: composed, lower case, no space at the ends or doubled, nothing invisible, Latin for look-alikes."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", label) if unicodedata.category(c) != "Cf")
    return " ".join(seen.translate(_TO_LATIN).casefold().split())


def unknown_label(label: str, known: Iterable[str], where: str) -> UserError:
    """A label that the model does not have, with the nearest one it has."""
    names = [str(name) for name in known]
    by_look = {look(name): name for name in names}
    close = difflib.get_close_matches(look(label), by_look, n=1, cutoff=0.6)
    fix = f"did you mean {by_look[close[0]]!r}?" if close else "mend the label, or train with rows that have it"
    return UserError(f"label {label!r} is unknown; the labels are {listed(map(repr, names))}", where=where, fix=fix)


def judge_labels(splits: Splits, labels: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    """Warnings; errors for ids taken for labels and for labels that train does not have."""
    counted = {name: Counter(label for cell in cells for label in cell) for name, cells in labels.items()}
    warnings = _near_twins(counted)
    if "train" in counted:
        several = any(len(cell) != 1 for cell in labels["train"])
        _refuse_ids(splits, counted["train"], len(labels["train"]), several)
        _refuse_unknown(splits, labels, counted)
        once = sorted(label for label, number in counted["train"].items() if number == 1)
        if once:
            warnings.append(f"train: {len(once)} label{'s' * (len(once) > 1)} with one row: {listed(map(repr, once))}")
    for name, found in counted.items():
        if name != "train" and len(found) == 1 and len(labels[name]) > 1 and all(labels[name]):
            warnings.append(f"{name}: every row has the label {next(iter(found))!r}")
    return warnings


def _near_twins(counted: Mapping[str, Counter[str]]) -> list[str]:
    total: Counter[str] = Counter()
    for found in counted.values():
        total += found
    groups: dict[str, list[str]] = {}
    for label in total:
        groups.setdefault(look(label), []).append(label)
    numbers: dict[float, list[str]] = {}
    for label in total:
        if _is_number(label) and math.isfinite(float(label)):
            numbers.setdefault(float(label), []).append(label)
    twins = [group for group in [*groups.values(), *numbers.values()] if len(group) > 1]
    missing = [f"{name!r} ({total[name]:,} rows)" for name in total if look(name) in MISSING]
    warned = [f"labels that read like a missing one are labels all the same: {listed(missing)}"] if missing else []
    return warned + [
        f"labels that look alike are different labels: {' and '.join(f'{_told(name, group)} ({total[name]:,} rows)' for name in group)}"
        for group in twins
    ]


def _told(label: str, twins: Sequence[str]) -> str:
    """A label in quotes; with escapes where it is drawn like another of plain ASCII."""
    drawn = any(ord(c) in _TO_LATIN for c in label) and any(other.isascii() for other in twins)
    return ascii(label) if drawn else repr(label)


def judge_cells(splits: Splits, config: DataConfig, names: Iterable[str]) -> list[str]:
    """Warnings of the cells that hold the labels of the splits ``names``: space that is taken off, a delimiter that parts nothing."""
    named = splits.roles.options["label"]
    columns = [str(name) for name in (named if isinstance(named, list) else [named])]
    warnings, parted = [], []
    for name, column in ((name, column) for name in names for column in columns):
        rows = splits.rows[name]
        if not rows.has(column) or not is_text((cells := rows.column(column)).type):
            continue
        if config.label_delimiter:
            parted.append(bool(pc.any(pc.match_substring(cells, config.label_delimiter)).as_py()))
            continue
        at = np.flatnonzero(np.asarray(pc.fill_null(pc.not_equal(cells, pc.utf8_trim_whitespace(cells)), False)))
        if len(at):
            had = "has space around it" if len(at) == 1 else "have space around them"
            warnings.append(f"{name}: {count(len(at), 'label')} {had}, which is taken off (first: {rows.where(int(at[0]))})")
    if parted and not any(parted):
        warnings.append(
            f"data.label_delimiter={config.label_delimiter!r} stands in no label: rows may have several labels, and each has one"
        )
    return warnings


def _refuse_ids(splits: Splits, counts: Counter[str], rows: int, several: bool) -> None:
    if several or rows < FEW or len(counts) <= rows / 2:
        return
    numbers = sum(_is_number(label) for label in counts) > 0.9 * len(counts)
    raise UserError(
        f"column {splits.roles.labels[0]!r} has {len(counts):,} labels in {rows:,} rows: it looks like an id or a regression target",
        where=f"{splits.rows['train'].files[0]}, data.label",
        fix="task=text-regression, or data.label=COLUMN" if numbers else "data.label=COLUMN with the labels",
    )


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def _refuse_unknown(splits: Splits, labels: Mapping[str, Sequence[Sequence[str]]], counted: Mapping[str, Counter[str]]) -> None:
    known = counted["train"]
    for name in counted:
        strange = [label for label in counted[name] if label not in known]
        if not strange:
            continue
        at = next(i for i, cell in enumerate(labels[name]) if strange[0] in cell)
        error = unknown_label(strange[0], known, splits.rows[name].where(at))
        more = f"; likewise {listed(map(repr, strange[1:]), len(strange) - 1)}" if len(strange) > 1 else ""
        raise UserError(error.what.replace("is unknown", f"of {name} is not in train{more}", 1), where=error.where, fix=error.fix)

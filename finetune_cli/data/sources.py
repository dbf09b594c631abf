"""What a data option names: a file, a directory, a glob, a list of them, a shipped corpus, or a hub dataset.

Only files that can be read twice and hashed are taken: pipes, devices and addresses on the network are refused. A value that exists, looks
like a path or ends in a data extension is a path; a bare name is a shipped corpus or else a hub id, and ``hub:NAME`` is always one.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_cli import corpora
from finetune_cli.config.choices import DataFormat
from finetune_cli.data.rows import Caution, count, listed
from finetune_cli.errors import UserError

SUFFIXES = {
    ".csv": DataFormat.csv,
    ".tsv": DataFormat.tsv,
    ".tab": DataFormat.tsv,
    ".json": DataFormat.json,
    ".jsonl": DataFormat.jsonl,
    ".ndjson": DataFormat.jsonl,
    ".parquet": DataFormat.parquet,
    ".pq": DataFormat.parquet,
    ".arrow": DataFormat.arrow,
    ".feather": DataFormat.arrow,
    ".txt": DataFormat.text,
    ".text": DataFormat.text,
    **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", ".iobes", ".bioes", ".bmes", ".bilou"), DataFormat.conll),
}
PACKED = (".gz", ".zst")
ELSEWHERE = (".xlsx", ".xls", ".ods", ".zip", ".bz2", ".xz", ".7z", ".pkl", ".npy", ".orc", ".avro", ".sqlite", ".db")
"""Extensions of data that nothing here reads."""
HUB_FILES = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What the hub's library writes beside the rows."""
_NO_NAME = r"true|false|yes|no|on|off|null|none|[-+]?\.?(nan|inf|infinity)|[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?"
"""Words that YAML, or who types them, takes for a truth value, for nothing or for a number."""
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file to read: where it is, and what messages call it."""

    path: str
    name: str
    partner: File | None = None
    """The file whose line n answers line n of this one (``data.parallel``)."""


@dataclass(frozen=True, slots=True)
class Hub:
    """A dataset on the hub, the configuration of it, and its split."""

    id: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        return f"hub:{self.id}" + (f":{self.config}" if self.config else "") + f":{self.split}"


def suffix_of(path: str) -> str:
    """The extension that tells the format: ``.csv`` of ``a.csv.gz``."""
    name = path.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def resolve(source: Any, *, key: str = "data.train", split: str = "train", notes: list[str] | None = None) -> list[File | Hub]:
    """Every file (or hub dataset) that ``source`` names, in order; globs and directories are sorted."""
    notes = [] if notes is None else notes
    if isinstance(source, (list, tuple)):
        if not source:
            raise UserError(f"{key} is an empty list", where=key, fix=f"{key}=FILE")
        places = [place for item in source for place in resolve(item, key=key, split=split, notes=notes)]
        _refuse_twice(places, key)
        return places
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise UserError(f"{key} is {source!r}; expected a file, directory, glob or list of them", where=key, fix=f"{key}=FILE")
    text = os.fspath(source)
    if text.startswith(corpora.SCHEME):
        return _corpus(text.removeprefix(corpora.SCHEME), split)
    if text.startswith("hub:"):
        return [_hub(text.removeprefix("hub:"), split)]
    if text.lower().startswith("file:"):
        path = re.sub(r"^file:(//(localhost)?(?=/))?", "", text, flags=re.IGNORECASE)
        raise UserError(f"{text} is an address; a file is named by its path", where=key, fix=f"{key}={path}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise UserError(f"{text} is an address on the network", where=key, fix="download the file first and give its path")
    return _path(text, key, split, notes)


def _path(text: str, key: str, split: str, notes: list[str]) -> list[File | Hub]:
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return _directory(path, key, split, notes)
    if os.path.lexists(path):
        _check_regular(path, key)
        return [File(path, shown(path))]
    if any(mark in text for mark in "*?["):
        hits = [hit for hit in sorted(glob.glob(_literal_as_far_as_it_exists(path), recursive=True)) if not os.path.isdir(hit)]
        if not hits:
            raise UserError(f"nothing matches {text!r}", where=f"{key}, in {os.getcwd()}", fix=_near(path) or f"check the pattern of {key}")
        for hit in hits:
            _check_regular(hit, key)
        return [File(hit, shown(hit)) for hit in hits]
    if (
        text.startswith((".", "/", "~", "\\"))
        or suffix_of(text) in SUFFIXES
        or text.lower().endswith(PACKED)
        or re.match(r"[A-Za-z]:[\\/]", text)
    ):
        raise missing(text, path, key)
    if text == "-" or re.fullmatch(_NO_NAME, text, re.IGNORECASE):
        what = f"{text} is no file here, and no name of a data set"
        raise UserError(what, where=key, fix=f"{key}=FILE, or hub:{text} for a data set of that name" if text != "-" else f"{key}=FILE")
    if any(known.startswith(text + "/") for known in corpora.names()):
        return _corpus(text, split)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+){0,2}", text):
        raise missing(text, path, key)
    if os.path.isdir(os.path.dirname(path) or "/nowhere"):
        raise missing(text, path, key)
    return [_hub(text, split)]


def _literal_as_far_as_it_exists(pattern: str) -> str:
    """The pattern with its leading folders taken as they are written, as far as such folders exist."""
    at = 0
    for slash in (i for i, c in enumerate(pattern) if c == "/"):
        if not os.path.isdir(pattern[: slash + 1]):
            break
        at = slash + 1
    return glob.escape(pattern[:at]) + pattern[at:]


def missing(text: str, path: str, key: str) -> UserError:
    """The path that was tried, from where, and what is near it."""
    return UserError(f"no such file: {text}", where=f"{key}, in {os.getcwd()}", fix=_near(path) or f"check the path of {key}")


def _near(path: str) -> str:
    """Like names in the same folder, or the deepest folder that exists."""
    folder, name = os.path.split(path)
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        return f"the folder does not exist; {folder or '.'} does"
    close = difflib.get_close_matches(name, names[:10_000], n=3, cutoff=0.5)
    close = close or [n for n in names if suffix_of(n) in SUFFIXES and not n.startswith(".")][:3]
    return f"did you mean {' or '.join(os.path.join(folder, n) for n in close)}?" if close else ""


def _check_regular(path: str, key: str) -> None:
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, which does not exist", where=key, fix="mend the link or give the file itself"
        )
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", where=key, fix="check the path and your rights to it") from None
    if not stat.S_ISREG(mode):
        names = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))
        what = next((name for test, name in names if test(mode)), "no regular file")
        raise UserError(f"{path} is {what}, which cannot be read twice", where=key, fix="write the data to a file first")


def _directory(path: str, key: str, split: str, notes: list[str]) -> list[File | Hub]:
    """The data files of a folder; where their names tell several splits apart, those of this split."""
    there = [n for n in sorted(os.listdir(path)) if n not in HUB_FILES]
    names = [n for n in there if suffix_of(n) in SUFFIXES and not n.startswith((".", "_"))]
    if not names:
        raise UserError(f"{shown(path)} holds no data file", where=key, fix=f"files end in {', '.join(sorted(SUFFIXES))}, or give a glob")
    splits = {n: _split_word(n) for n in names}
    if len({word for word in splits.values() if word}) > 1:
        own = [n for n in names if splits[n] == split]
        if not own:
            raise UserError(
                f"{shown(path)} holds no file named for {split}: {listed(names)}", where=key, fix=f"{key}={os.path.join(path, names[0])}"
            )
        notes.append(f"{key}: of {shown(path)} only {listed(own)}")
        names = own
    formats = sorted({suffix_of(n) for n in names})
    if len({SUFFIXES[suffix] for suffix in formats}) > 1:
        raise UserError(
            f"{shown(path)} holds files of several formats: {', '.join(formats)}", where=key, fix=f"{key}='{shown(path)}/*{formats[0]}'"
        )
    for name in names:
        _check_regular(os.path.join(path, name), key)
    notes += _passed_over(path, there, formats[0])
    return [File(os.path.join(path, n), shown(os.path.join(path, n))) for n in names]


def _passed_over(path: str, there: list[str], suffix: str) -> list[str]:
    """Warnings of what lies in a folder and is not read though it may be data."""
    folders = [n for n in there if os.path.isdir(os.path.join(path, n)) and not n.startswith((".", "_"))]
    hidden = [n for n in there if suffix_of(n) in SUFFIXES and n.startswith((".", "_"))]
    files = [n for n in there if n in hidden or suffix_of(n) in ELSEWHERE]
    found = []
    if folders:
        are, them = ("is", "it") if len(folders) == 1 else ("are", "them")
        found.append(
            f"{shown(path)}: {count(len(folders), 'folder')} {are} not entered ({listed(folders)}); {shown(path)}/**/*{suffix} reads {them}"
        )
    if files:
        found.append(f"{shown(path)}: {count(len(files), 'file')} {'is' if len(files) == 1 else 'are'} not read ({listed(files)})")
    return [Caution(told) for told in found]


def _split_word(name: str) -> str:
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")


def _corpus(text: str, split: str) -> list[File | Hub]:
    """A shipped file; of a corpus without a file name, the one of this split."""
    name = text.strip("/")
    own = [known for known in corpora.names() if known.startswith(name + "/") and _split_word(known.rpartition("/")[2]) == split]
    path = corpora.path(own[0] if len(own) == 1 else name)
    return [File(str(path), f"{corpora.SCHEME}{path.parent.name}/{path.name}")]


def _hub(text: str, split: str) -> Hub:
    """``ID``, ``ID:SPLIT`` or ``ID:CONFIG:SPLIT``."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise UserError(f"{text!r} is no hub dataset", where="data", fix="write hub:ID, hub:ID:SPLIT or hub:ID:CONFIG:SPLIT")
    return Hub(parts[0], parts[1] if len(parts) == 3 else None, parts[-1] if len(parts) > 1 else split)


def _refuse_twice(places: Iterable[File | Hub], key: str) -> None:
    seen: set[str] = set()
    for place in places:
        name = os.path.realpath(place.path) if isinstance(place, File) else place.name
        if name in seen:
            raise UserError(f"{place.name} is named twice", where=key, fix="name every file once")
        seen.add(name)


def shown(path: str) -> str:
    """A path as messages show it: relative to the working directory where it lies inside."""
    try:
        relative = os.path.relpath(path)
    except ValueError:
        return path
    return path if relative.startswith("..") else relative


def sha256(path: str, name: str) -> str:
    """SHA-256 of a file's bytes as they are on disk."""
    from finetune_cli.data.encoding import unreadable

    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(error, name) from None

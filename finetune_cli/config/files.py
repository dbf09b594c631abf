"""The YAML files of a config: where they are found, and on which line each of them sets a key."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from finetune_cli.errors import UserError


@functools.cache
def configs_dir() -> Path:
    """ftune's own YAML: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(folder for folder in (package / "configs", package.parent / "configs") if (folder / "train.yaml").is_file())


def groups_in(folders: list[Path]) -> dict[str, list[str]]:
    """Config groups (``model``, ``exp`` …) and their choices in several folders; nested folders are groups of their own too."""
    groups: dict[str, set[str]] = {}
    for folder in folders:
        for path in folder.rglob("*.yaml"):
            parts = path.relative_to(folder).with_suffix("").parts
            for depth in range(1, len(parts)):
                groups.setdefault("/".join(parts[:depth]), set()).add("/".join(parts[depth:]))
    return {group: sorted(choices) for group, choices in sorted(groups.items()) if not group.startswith("hydra")}


@dataclass(frozen=True, slots=True)
class YamlFile:
    """One YAML file of a composed config: its path, its package (``""`` is the top) and whether it speaks for the user."""

    path: Path
    package: str
    user: bool
    lines: dict[str, int]
    """Dotted key in the composed config to its line in the file."""

    def where(self, key: str) -> str:
        """``file:line`` of a key, or of the section that holds it; empty where the file does not set it."""
        for name in _outward(key):
            if name in self.lines:
                return f"{self.path}:{self.lines[name]}"
        return ""


def _outward(key: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def read_lines(path: Path, package: str, user: bool) -> YamlFile:
    """A file with the line of each of its keys. Raises UserError where it is no YAML, or says a key twice."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        here: dict[str, int] = {}
        for name, value in node.value:
            key, line = f"{prefix}{name.value}", name.start_mark.line + 1
            if key in here:
                what = f"the key '{name.value}' stands twice, in lines {here[key]} and {line}"
                raise UserError(what, where=f"{path}:{line}", fix="keep one of them")
            here[key] = lines[key] = line
            walk(value, key + ".")

    with open(path, encoding="utf-8") as stream:
        try:
            root = yaml.compose(stream, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise not_yaml(path, error) from error
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: {error.reason} at byte {error.start}", where=str(path), fix="save the file as UTF-8") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        what = f"the file holds {'a list' if isinstance(root, yaml.SequenceNode) else repr(root.value)}, not keys with values"
        raise UserError(what, where=f"{path}:{root.start_mark.line + 1}", fix="write key: value, or empty the file")
    if root is not None:
        walk(root, f"{package}." if package else "")
    return YamlFile(path, package, user, lines)


def not_yaml(path: Path | str, error: yaml.YAMLError) -> UserError:
    """A YAML error with its line."""
    if isinstance(error, yaml.reader.ReaderError):
        what = f"character {error.character!r} at place {error.position}: {error.reason}"
        return UserError(f"not valid YAML: {what}", where=str(path), fix="save the file as UTF-8 text")
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    where = f"{path}:{mark.line + 1}, column {mark.column + 1}" if mark else str(path)
    return UserError(f"not valid YAML: {what}", where=where, fix="mend the file")

"""Repairs to the command line before Hydra's parser and override grammar see it.

Hydra's parser takes flags in one stretch only, and its grammar refuses or reinterprets ``=``, commas, brackets, spaces and every
non-ASCII letter in a value. Here flags go first, a path becomes ``ckpt=PATH``, and every value that the schema knows to be text is quoted.
Keys that are no group are forced with ``++``, so that one judge (and not Hydra, one at a time) finds every mistake.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_cli.config.judge import SECRET_FIX, SECRET_KEY, SECRET_VALUE, Problem
from finetune_cli.config.options import Option, near, sections
from finetune_cli.config.paths import DATA_ENDINGS
from finetune_cli.errors import UserError

VALUED = {
    "--cfg": "-c",
    "--package": "-p",
    "--config-path": "-cp",
    "--config-name": "-cn",
    "--config-dir": "-cd",
    "--info": "-i",
}
"""Hydra's flags that take a value (``--info`` may go without)."""
BARE = {
    "--help": "-h",
    "--hydra-help": "--hydra-help",
    "--version": "--version",
    "--resolve": "--resolve",
    "--run": "-r",
    "--multirun": "-m",
    "--shell-completion": "-sc",
}
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
CHOICES = {"--cfg": ("job", "hydra", "all"), "--info": INFO}
ACTIONS = ("--cfg", "--info", "--run", "--multirun", "--shell-completion")
_FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|int|float|str|bool|json_str|extend_list)\(.*\)$")
_KEY = re.compile(r"(\+{0,2}|~)([A-Za-z_][\w\-./@:\[\]]*)$")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")


@dataclass(frozen=True, slots=True)
class Typed:
    """One ``key=value`` as typed, and as Hydra gets it."""

    key: str
    text: str
    override: str


@dataclass(slots=True)
class CommandLine:
    """A repaired command line."""

    flags: dict[str, str | None] = field(default_factory=dict)
    typed: list[Typed] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def multirun(self) -> bool:
        return "--multirun" in self.flags or any(t.key == "hydra.mode" and "multirun" in t.text.lower() for t in self.typed)

    @property
    def overrides(self) -> list[str]:
        return [typed.override for typed in self.typed]

    def value(self, key: str) -> str | None:
        """What was typed last for a key."""
        return next((typed.text.partition("=")[2] for typed in reversed(self.typed) if typed.key == key), None)

    def arguments(self) -> list[str]:
        """Flags and overrides as Hydra's parser wants them; folders of configs travel another way."""
        if "--shell-completion" in self.flags:
            return ["--shell-completion", *(typed.text for typed in self.typed)]
        kept = {flag: value for flag, value in self.flags.items() if flag not in ("--config-dir", "--config-path")}
        return [*(flag if value is None else f"{flag}={value}" for flag, value in kept.items()), *self.overrides]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a verb's command line may say."""

    verb: str
    options: Mapping[str, Option]
    groups: Mapping[str, Collection[str]]
    """Name of a config group to its choices."""
    foreign: Collection[str] = ()
    """Groups that fill sections which only other verbs have."""

    def positional_key(self) -> str | None:
        """The key that a bare path stands for."""
        return "ckpt" if "ckpt" in self.options else None

    def run_key(self) -> str | None:
        """The key whose value is a run, served as a config group."""
        return "ckpt" if "ckpt" in self.options else "resume" if "resume" in self.options else None


def read(arguments: list[str], words: Vocabulary) -> CommandLine:
    """Repair a verb's arguments; what cannot be repaired is a problem. Flags that Hydra would refuse raise UserError at once."""
    line = CommandLine()
    rest = _flags(arguments, line)
    for argument in rest:
        key, value = _split(argument, words, line)
        if key is not None:
            _override(argument, key, value, words, line)
    return line


def flags(arguments: list[str]) -> dict[str, str | None]:
    """The flags alone, by their long names."""
    line = CommandLine()
    _flags(arguments, line)
    return line.flags


def _flags(arguments: list[str], line: CommandLine) -> list[str]:
    """Take the flags out, wherever they stand."""
    long = {short: flag for flag, short in (VALUED | BARE).items()}
    rest, waiting = [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("-") or argument == "-":
            rest.append(argument)
            continue
        name, given, value = argument.partition("=")
        flag = long.get(name) or next((known for known in (*VALUED, *BARE) if known == name), None) or _abbreviated(name)
        if flag is None:
            hits = near(name, [*VALUED, *BARE])
            fix = f"did you mean {hits[0]}?" if hits else f"the flags are {', '.join(sorted([*VALUED, *BARE]))}"
            raise UserError(f"unknown flag {name}", where="command line", fix=fix)
        line.flags[flag] = _flag_value(flag, value if given else None, waiting)
    chosen = [flag for flag in ACTIONS if flag in line.flags]
    if len(chosen) > 1:
        fix = f"keep one of them: only one of {', '.join(ACTIONS)}"
        raise UserError(f"{' and '.join(chosen)} cannot go together", where="command line", fix=fix)
    return rest


def _abbreviated(name: str) -> str | None:
    hits = [flag for flag in (*VALUED, *BARE) if len(name) > 3 and flag.startswith(name)]
    return hits[0] if len(hits) == 1 else None


def _flag_value(flag: str, value: str | None, waiting: list[str]) -> str | None:
    if flag in BARE:
        return None
    if value is None and flag == "--info":
        value = waiting.pop(0) if waiting and waiting[0] in INFO else "all"
    if value is None:
        if not waiting:
            raise UserError(f"{flag} needs a value", where="command line", fix=f"write {flag} VALUE")
        value = waiting.pop(0)
    if flag in CHOICES and value not in CHOICES[flag]:
        raise UserError(f"{flag} {value}: no such choice", where="command line", fix=f"choose one of {', '.join(CHOICES[flag])}")
    return value


def _split(argument: str, words: Vocabulary, line: CommandLine) -> tuple[str | None, str]:
    """(key with its ``+`` or ``~``, value) of an argument; a bare path is the value of the run's key; (None, "") for a problem."""
    left, equals, value = argument.partition("=")
    form = _KEY.match(left)
    bare = form[2] if form else ""
    known = bare in words.options or bare in words.groups or bare.split(".")[0] in sections(words.options) or bare.startswith("hydra")
    looks_path = "/" in bare and not known or argument.startswith(("/", "./", "../", "~/")) or _on_disk(argument)
    if form and (equals and (known or not looks_path) or form[1] == "~" and known):
        return left, value
    key = words.positional_key()
    if key and (looks_path or not equals) and argument:
        if line.value(key) is not None:
            fix = "name the input with input=FILE" if words.verb == "predict" else "name one run; the rest is key=value"
            line.problems.append(Problem(f"'{argument}' is a second run beside '{line.value(key)}'", "command line", fix))
            return None, ""
        return key, argument
    line.problems.append(_not_a_setting(argument, words))
    return None, ""


def _not_a_setting(argument: str, words: Vocabulary) -> Problem:
    what = f"'{argument}' is not key=value"
    name = argument.lstrip("+")
    if name in words.groups.get("exp", ()):
        return Problem(what, "command line", f"add the experiment with +exp={name}")
    if os.path.lexists(argument) or argument.lower().endswith(DATA_ENDINGS):
        return Problem(what, "command line", f"name the data with data.train={argument}")
    if name in words.options or name in words.groups:
        return Problem(what, "command line", f"give it a value: {argument}=…")
    hits = near(name, [*words.options, *words.groups])
    return Problem(what, "command line", f"did you mean {hits[0]}=…?" if hits else f"ftune {words.verb} --help shows what can be set")


def _override(argument: str, left: str, value: str, words: Vocabulary, line: CommandLine) -> None:
    """Append one setting, quoted as Hydra needs it."""
    sign = re.match(r"~|\+*", left)[0]  # type: ignore[index]  # the pattern matches the empty text
    key = left[len(sign) :]
    text = f"{left}={value}"
    problem = _refused(key, value, words)
    if problem:
        line.problems.append(problem)
        return
    if sign == "~" and key in words.options and key not in words.groups:
        what, fix = f"{key} is an option and always has a value; ~ takes groups away", f"leave it out for its default, or set {key}=VALUE"
        line.problems.append(Problem(what, f"command line: {argument}", fix))
        return
    if sign == "~":
        override = argument
    elif key == words.run_key() and value not in ("null", "auto"):
        override = f"{key}={_literal(value, line.multirun)}"
    elif key in words.groups or key.startswith("hydra") or "/" in key or "@" in key:
        override = f"{left}={_readable(value)}"
        problems = _group_problems(sign, key, value, words)
        if problems:
            line.problems += problems
            return
    else:
        option = words.options.get(key)
        override = f"++{key}={_value(option, key, value, line.multirun)}"
    line.typed.append(Typed(key, text, override))


def _refused(key: str, value: str, words: Vocabulary) -> Problem | None:
    if SECRET_KEY.search(key) and key not in words.options and not value.startswith("${oc.env:"):
        return Problem(f"{key} looks like a secret", "command line", SECRET_FIX)
    if SECRET_VALUE.search(value):
        return Problem(f"the value of {key} looks like a secret", "command line", SECRET_FIX)
    if key in words.foreign:
        fix = "leave it out: it comes with the run" if "ckpt" in words.options else "leave it out"
        return Problem(f"ftune {words.verb} has no '{key}'", f"command line: {key}={value}", fix)
    option = words.options.get(key)
    literal = option is not None and (option.is_text or option.is_path)
    if "_target_" in key or ("_target_" in value and not literal):
        return Problem(f"{key}: a config names no code to run", f"command line: {key}", "remove _target_")
    if value == "" and literal:
        null = "; write null for no value" if option is not None and option.optional and key != "ckpt" else ""
        return Problem(f"{key}= is empty", f"command line: {key}=", f"is a shell variable unset?{null}")
    if key == "ckpt" and value == "null":
        return Problem("ckpt=null names no run", "command line: ckpt=null", f"ftune {words.verb} runs/latest, or ckpt=RUN")
    if key == words.run_key() and value.startswith("[") and not os.path.lexists(value):
        what = f"{key}={value}: an ensemble of several runs is not supported by this version"
        return Problem(what, f"command line: {key}", "name one run")
    if re.match(r"hydra\.sweeper\.params\b", key):  # none of it reaches OmegaConf: it cannot add to a dictionary that is null
        fix = "sweep by the keys themselves, -m train.seed=1,2; or write it into the YAML of an experiment"
        return Problem(f"{key} belongs into YAML", f"command line: {key}", fix)
    return None


def _group_problems(sign: str, key: str, value: str, words: Vocabulary) -> list[Problem]:
    """A choice that the group does not have; Hydra would stop at the first."""
    if key not in words.groups or key == words.run_key():
        return []
    if key == "exp" and not sign:
        return [Problem(f"'exp' is added with a plus: {key}={value}", f"command line: {key}={value}", f"write +exp={value}")]
    if value in ("", "null") or _FUNCTION.match(value) or "${" in value:
        return []
    names = [name.strip() for name in value.strip("[]").split(",")]
    where = f"command line: {sign}{key}={value}"
    return [no_choice(key, name, words.groups[key], where) for name in names if name not in words.groups[key]]


def no_choice(group: str, name: str, choices: Collection[str], where: str) -> Problem:
    """The problem with a name that a config group does not have."""
    hits = near(name, list(choices))
    fix = f"did you mean {'+' if group == 'exp' else ''}{group}={hits[0]}? " if hits else ""
    other = {"model": f"any hub id or directory: model.path={name}", "data": f"own files: data.train={name}"}.get(group, "")
    listed = f"there are {', '.join(sorted(choices))}" if choices else "it has no choices"
    kind = "experiment" if group == "exp" else group
    return Problem(f"there is no {kind} '{name}'", where, f"{fix}{listed}{'; ' + other if other and not hits else ''}")


def _value(option: Option | None, key: str, value: str, multirun: bool) -> str:
    """A value as Hydra's grammar takes it, its meaning kept."""
    if value == "null":
        return value
    if option is None or not (option.is_text or option.is_path or option.kind == list[str]):
        dictionary = option is None and key.split(".")[0] == "expect"
        return _literal(value, multirun) if dictionary else _readable(value, multirun)
    if option.is_path and _on_disk(value):
        return quote(value.replace("${", "\\${"))
    if _FUNCTION.match(value) and (multirun or value.startswith("extend_list")):
        return value
    if value.startswith("[") and value.endswith("]") and option.kind is not str:
        return _texts(value)
    if option.form == "rows" and all(_NUMBER.match(part) for part in value.split(",")):
        return value
    return _literal(value, multirun)


def _literal(value: str, multirun: bool) -> str:
    """Text as it stands; what the user quoted for Hydra already stays; a comma sweeps where no such file exists."""
    if _on_disk(value) or not value:
        return quote(value)
    if value[0] in "'\"" and value[-1] == value[0] and len(value) > 1 and _parses(f"x={value}"):
        return value
    if multirun and _FUNCTION.match(value):
        return value
    if multirun and "," in value:
        return ",".join(part if part[:1] in ("'", '"') else quote(part) for part in value.split(","))
    return quote(value)


def _readable(value: str, multirun: bool = False) -> str:
    """A value in Hydra's own grammar where it is that, else text."""
    if value == "" or _parses(f"x={value}"):
        return value
    if value.startswith("[") and value.endswith("]"):
        return _texts(value)
    return ",".join(map(quote, value.split(","))) if multirun and "," in value else quote(value)


def _texts(value: str) -> str:
    """A list of texts, each as it stands; one that is quoted already stays."""
    nested = re.search(r"(^|,)\s*\[[^\[\]]*\]\s*(,|$)", value[1:-1])  # a list in a list, which the judge refuses
    if (nested or any(sign in value for sign in "'\"")) and _parses(f"x={value}"):
        return value
    parts = [part.strip() for part in value[1:-1].split(",") if part.strip()]
    return "[" + ",".join(part if part[:1] in ("'", '"') else quote(part) for part in parts) + "]"


def _parses(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def quote(value: str) -> str:
    """Single quotes for Hydra's grammar: only quotes, and backslashes before them or at the end, need escaping."""
    inside = re.sub(r"(\\*)'", lambda m: m[1] * 2 + "\\'", value)
    return "'" + re.sub(r"(\\+)$", lambda m: m[1] * 2, inside) + "'"


def _on_disk(value: str) -> bool:
    return os.path.lexists(os.path.expanduser(value))


def hidden_files(folder: Path, ours: Path) -> list[Path]:
    """Files of the user's folder that ftune's own of the same name hide."""
    return [path for path in sorted(folder.rglob("*.yaml")) if (ours / path.relative_to(folder)).is_file()]

"""How a verb was called: what a command knows beside its config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One call of a verb, or one job of a sweep."""

    verb: str
    """``train``, ``eval``, ``predict`` or ``replay``."""
    typed: tuple[str, ...]
    """The arguments after ``ftune`` as typed, the verb first."""
    experiment: str | None
    """Name of the experiment added with ``+exp=``; several are joined with ``+``."""
    user_set: frozenset[str]
    """Dotted keys set by the user: on the command line, by an experiment, or in an own YAML file."""
    multirun: bool
    """Whether this is a job of a sweep."""
    sweep_dir: str | None
    """The sweep job's own directory (``runs/sweeps/ID/N``), made and empty; ``config.run.dir`` of train says the same."""
    config_yaml: str
    """The config as text: resolved but for ``${oc.env:NAME}``, paths absolute, no secrets; enough to run again."""

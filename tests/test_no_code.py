"""Nothing that ftune or its scripts read can become code: what could do that is not called anywhere, and this test reads every line.

One thing of the kind is allowed, in ``finetune_cli/world``: the processes of one job tell each other objects by ``torch.distributed``,
which pickles them. No file and no foreign machine takes part: what is exchanged never touches a disk, and where ftune starts the processes
itself the meeting point listens on 127.0.0.1 alone (tested below). Under ``torchrun`` the network between the machines is the user's, as
it is for every job that torchrun starts.
"""

from __future__ import annotations

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from ran import ROOT

FILES = sorted(file for folder in ("finetune_cli", "scripts") for file in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pickletools", "jsonpickle", "code", "imp"}
"""Modules whose reading runs what is read."""
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.get_object"),
    *("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.distributed.checkpoint.load", "dcp.load", "numpy.fromregex"),
}
OBJECTS = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "BaseLoader"}


def dotted(node: ast.AST, aliases: dict[str, str]) -> str:
    """``np.load`` as ``numpy.load``; empty for what has no name."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return ""


def aliases_of(tree: ast.AST) -> dict[str, str]:
    """Names in a file to what they were imported as."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0] for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def given(call: ast.Call, name: str) -> ast.expr | None:
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def faults(source: str, *, world: bool = False) -> Iterator[str]:
    """What in a file could turn data into code."""
    tree = ast.parse(source)
    aliases = aliases_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name = dotted(node.func, aliases)
            if fault := call_fault(node, name, aliases, world=world):
                yield f"{node.lineno}: {fault}"


def call_fault(call: ast.Call, name: str, aliases: dict[str, str], *, world: bool) -> str | None:
    """What is wrong with one call."""
    last = name.rpartition(".")[2]
    if name in CALLS or name.split(".")[0] in MODULES or name.startswith("os.exec"):
        return f"calls {name}"
    if last == "instantiate":
        return "instantiates what a config names"
    if last in OBJECTS and not world:
        return f"{last} unpickles what another process sends"
    if name == "torch.load" and not is_true(given(call, "weights_only")):
        return "torch.load without weights_only=True"
    if (allowed := given(call, "allow_pickle")) is not None and not (isinstance(allowed, ast.Constant) and allowed.value is False):
        return f"{name} with allow_pickle"
    if name == "yaml.load":
        loader = given(call, "Loader") or (call.args[1] if len(call.args) > 1 else None)
        if loader is None or dotted(loader, aliases).rpartition(".")[2] not in SAFE_LOADERS:
            return "yaml.load without a safe loader"
    if (shell := given(call, "shell")) is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
        return f"{name} through a shell"
    if is_true(given(call, "trust_remote_code")):
        return "trust_remote_code=True"
    return None


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_turns_data_into_code(file: Path) -> None:
    assert not list(faults(file.read_text(encoding="utf-8"), world=file.parent.name == "world"))


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import dill as d", "import cloudpickle", "import shelve", "import marshal"),
        *("import torch; torch.load(p)", "import torch as t; t.load(p, weights_only=False)", "from torch import load; load(p)"),
        *("import numpy as np; np.load(p, allow_pickle=True)", "import numpy as np; np.load(p, allow_pickle=flag)"),
        *("eval(text)", "exec(text)", "compile(text, '', 'exec')", "import joblib; joblib.load(p)", "from joblib import load; load(p)"),
        *("import yaml; yaml.load(text)", "import yaml; yaml.load(text, Loader=yaml.Loader)", "import yaml; yaml.unsafe_load(text)"),
        *("from hydra.utils import instantiate; instantiate(c)", "import hydra; hydra.utils.instantiate(c)", "hydra.utils.call(c)"),
        *("import subprocess; subprocess.run(c, shell=True)", "import os; os.system(c)", "from os import system; system(c)"),
        *("import torch.distributed as dist; dist.all_gather_object(a, b)", "M.from_pretrained(p, trust_remote_code=True)"),
    ],
)
def test_the_test_can_fail(line: str) -> None:
    assert list(faults(line))


@pytest.mark.parametrize(
    "line", ["torch.load(p, weights_only=True)", "model.eval()", "np.load(p)", "yaml.load(t, Loader=yaml.SafeLoader)", "re.compile(x)"]
)
def test_what_is_harmless_passes(line: str) -> None:
    assert not list(faults(f"import torch, numpy as np, yaml, re\n{line}"))


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are listed elsewhere")
def test_processes_of_one_machine_meet_where_no_other_machine_can() -> None:
    """A socket on all networks would let anybody who finds the port have something unpickled."""
    pytest.importorskip("torch")
    from finetune_cli.world.crew import Crew

    crew = Crew(1, "finetune_cli.commands.train")
    listening = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    mine = [parts[1] for parts in listening if parts[3] == "0A" and int(parts[1].rpartition(":")[2], 16) == crew.store.port]
    address = int.from_bytes(socket.inet_aton("127.0.0.1"), "little")
    assert [place.rpartition(":")[0] for place in mine] == [f"{address:08X}"]

"""Commands in forks of a process that has imported what they import, so that none of them pays seconds for torch and transformers.

Two such servers belong to a test process, started when first asked for and gone with it: one whose forks are ``python -m finetune_cli``,
and one, without ftune, whose forks are ``python -I reload_check.py``. A server runs no torch operation, answers a request
(arguments, environment, directory, standard streams) by forking, and the fork goes on to its end as any interpreter does: with its own
exit code, signals, last words and clean-up. What only a new interpreter reads (``READ_AT_START``) makes a request a true subprocess, as
does a system where forks are not safe. Forks of one server share the seeds of hashes: what is about those asks for ``fresh=True``.

Run by path this file is the server; it then imports nothing of the tests.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

READ_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "OMP_", "OPENBLAS_", "MKL_", "HF_", "TRANSFORMERS_", "TORCH", "CUDA", "MPL", "HOME")
"""Beginnings of the variables that an interpreter or a library reads once, when it starts."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # as reload_check.py sets them
SHARED = ["numpy", "torch", "transformers", "transformers.modeling_utils", "transformers.generation.utils"]
SHARED += [f"transformers.models.{name}" for name in ("auto.modeling_auto", "auto.tokenization_auto")]
SHARED += [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "llama", "t5")]
FTUNE = ["hydra", "omegaconf", "pyarrow.parquet", "scipy.stats", "sklearn.metrics", "sklearn.linear_model", "peft", "safetensors.torch"]
STATUS = struct.Struct("<i")


def is_safe() -> bool:
    """Whether this system has what the server needs; elsewhere fork is missing, or not safe beside the system's own threads.

    Command line and config are also tested where torch is not installed: there every command is a process of its own.
    """
    if importlib.util.find_spec("torch") is None:
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):  # another system, an old or a guarded kernel
        return False
    return sys.platform == "linux"


SAFE = is_safe()


# asking ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """Where forks are asked for: its socket, and what was settled of the environment when it started."""

    address: str
    settled: dict[str, str]
    ignores: str = ""  # beginning of the variables that its forks do not read

    def suits(self, env: Mapping[str, str]) -> bool:
        """Whether a fork would run under ``env`` as a new interpreter does."""
        return SAFE and settings(env, self.ignores) == self.settled


def settings(env: Mapping[str, str], ignores: str = "") -> dict[str, str]:
    """What of ``env`` is read at the start only."""
    return {name: value for name, value in env.items() if name.startswith(READ_AT_START) and not (ignores and name.startswith(ignores))}


class Forked(subprocess.Popen):  # type: ignore[type-arg]
    """``Popen`` of a fork: the server, whose child it is, tells its pid and at last its status over the connection."""

    def __init__(self, server: Server, args: list[str], **options: Any) -> None:
        self._server = server
        super().__init__(args, **options)

    def _execute_child(  # instead of fork and exec
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *more: Any
    ) -> None:
        _startupinfo, _creationflags, _shell, *pipes = more[:9]
        asked = {"args": args, "cwd": os.path.abspath(cwd or "."), "env": dict(os.environ if env is None else env)}
        text = json.dumps(asked).encode()
        self._connection = socket.socket(socket.AF_UNIX)
        try:
            self._connection.connect(self._server.address)
            streams = [given if given != -1 else number for number, given in enumerate((pipes[0], pipes[3], pipes[5]))]
            socket.send_fds(self._connection, [STATUS.pack(len(text))], streams)
            self._connection.sendall(text)
            self.pid = read_number(self._connection)
        except OSError:
            self._connection.close()
            raise
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            if not selector.select(0 if wait_flags & os.WNOHANG else None):
                return 0, 0
        status = read_number(self._connection)
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def read(connection: socket.socket, count: int) -> bytes:
    """Just so many bytes. Raises ConnectionError where the other side is gone."""
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise ConnectionError("the server of forks is gone: run tests/forked.py to see why")
        found += part
    return found


def read_number(connection: socket.socket) -> int:
    number: int = STATUS.unpack(read(connection, STATUS.size))[0]
    return number


class Forks:
    """The servers of this test process. ``start("train", …)`` is a command that has begun."""

    def __init__(self, *, allowed: bool, more: Sequence[str] = ()) -> None:
        """``more``: modules that the commands of this one import beside the usual."""
        self.allowed = allowed and SAFE
        self._more = list(more)
        self._started: list[subprocess.Popen[bytes]] = []
        self._servers: dict[str, Server] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="ftune-forks-"))

    def start(
        self, *args: object, fresh: bool = False, cwd: Path | None = None, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[bytes]:
        """``python -m finetune_cli ARGS`` with the options of ``Popen``; ``fresh``: in a new interpreter whatever it costs."""
        command, environment = [sys.executable, "-m", "finetune_cli", *map(str, args)], {**os.environ, **own_settings(), **(env or {})}
        return self.popen(command, fresh=fresh, cwd=cwd, env=environment, **options)

    def popen(self, command: list[str], *, fresh: bool = False, env: Mapping[str, str], **options: Any) -> subprocess.Popen[bytes]:
        """``python -m finetune_cli ARGS`` or ``python SCRIPT ARGS`` under just this environment."""
        if not fresh and self.allowed and self.server("ftune").suits(env):
            return Forked(self.server("ftune"), command, env=env, **options)
        return subprocess.Popen(command, env=env, **options)

    def reloading(self) -> Any:
        """What ``finetune_cli.engine.export`` may have in place of the module subprocess."""
        return reloading(self.server("reload")) if self.allowed else subprocess

    def end(self) -> None:
        """Without its standard input a server ends; forks that still run go on."""
        for process in self._started:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        for path in self._folder.iterdir():
            path.unlink()
        self._folder.rmdir()

    def server(self, kind: str) -> Server:
        """``ftune`` or ``reload``; it begins when it is first asked for."""
        if kind not in self._servers:
            self._servers[kind] = self._begin(kind)
        return self._servers[kind]

    def _begin(self, kind: str) -> Server:
        """Start a server: it can be asked at once, and answers when it has imported all."""
        isolated, address = kind == "reload", str(self._folder / kind)
        env = {**os.environ, **({} if isolated else own_settings())}
        ignores = "PYTHON" if isolated else ""
        found = Server(address, settings(env, ignores), ignores)
        reload_server = [] if isolated else [json.dumps(asdict(self.server("reload"))), *self._more]
        command = [sys.executable, *(["-I"] if isolated else []), __file__]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            process = subprocess.Popen(
                [*command, str(listener.fileno()), *reload_server],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                env={**env, **(OFFLINE if isolated else {})},
                pass_fds=[listener.fileno()],
            )
        self._started.append(process)
        return found


def own_settings() -> dict[str, str]:
    """What a command of the tests has in its environment: the package under test, from the checkout or where it is installed."""
    import finetune_cli

    return {"PYTHONPATH": str(Path(finetune_cli.__file__).parents[1]), "PYTHONUTF8": "1"}


def reloading(server: Server) -> Any:
    """A stand-in for the module subprocess, whose ``Popen`` of a reload check is a fork of ``server``."""

    def popen(args: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if args[1] == "-I" and args[2].endswith("reload_check.py") and server.suits(options.get("env") or os.environ):
            return Forked(server, args, **options)
        return subprocess.Popen(args, **options)

    return SimpleNamespace(Popen=popen, PIPE=subprocess.PIPE)


# serving ---------------------------------------------------------------------------------------------------------------------


def serve(listener: socket.socket) -> list[str]:
    """Fork for each request until standard input ends. Returns in the forks alone: the command of each."""
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of a fork: its pid, whom to tell
    gc.collect()
    gc.freeze()
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection = listener.accept()[0]
                try:
                    asked, streams = receive(connection)
                except ConnectionError:
                    connection.close()
                    continue
                with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # pyarrow's thread, which expects forks
                    pid = os.fork()
                if pid == 0:
                    selector.close()
                    for open_one in (listener, connection, *(told for _, told in running.values())):
                        open_one.close()
                    for number in running:
                        os.close(number)
                    become(asked, streams)
                    signal.signal(signal.SIGINT, on_interrupt)
                    return list(asked["args"])
                for number in streams:
                    os.close(number)
                with suppress(OSError):  # who asked was killed meanwhile
                    connection.sendall(STATUS.pack(pid))
                descriptor = os.pidfd_open(pid)
                running[descriptor] = pid, connection
                selector.register(descriptor, selectors.EVENT_READ)
            elif key.fd in running:
                pid, connection = running.pop(key.fd)
                selector.unregister(key.fd)
                os.close(key.fd)
                with suppress(OSError):  # nobody waits any more
                    connection.sendall(STATUS.pack(os.waitpid(pid, 0)[1]))
                connection.close()
            elif not os.read(0, 1):
                os._exit(0)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and the three streams that came with it."""
    size, streams, _, _ = socket.recv_fds(connection, STATUS.size, 3)
    if len(size) < STATUS.size:
        raise ConnectionError("whoever asked is gone")
    return json.loads(read(connection, STATUS.unpack(size)[0])), streams


def become(asked: dict[str, Any], streams: list[int]) -> None:
    """Take over what a new process is given: streams, environment, directory, and a seed of its own."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(asked["env"])
    time.tzset()
    os.chdir(asked["cwd"])
    sys.modules["numpy"].random.seed()


def main() -> None:
    """Import all that forks need, serve, and in a fork run its command as the interpreter would."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    listener.set_inheritable(False)
    names, isolated = list(SHARED), len(sys.argv) == 2
    if not isolated:
        import finetune_cli

        own = pkgutil.walk_packages(finetune_cli.__path__, "finetune_cli.")
        names += [*FTUNE, *sys.argv[3:], *(module.name for module in own if not module.name.endswith((".__main__", ".reload_check")))]
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:  # an extra that is not installed
            pass
    if not isolated:
        sys.modules["finetune_cli.engine.export"].subprocess = reloading(Server(**json.loads(sys.argv[2])))  # type: ignore[attr-defined]
    command = serve(listener)
    if isolated:
        sys.argv = command[2:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)  # a stranger's good end: taking torch apart would cost more than the check
    elif command[1] == "-m":
        sys.argv, sys.path[0] = command[2:], os.getcwd()
        runpy.run_module("finetune_cli", run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command[1:], os.path.dirname(command[1])
        runpy.run_path(command[1], run_name="__main__")


if __name__ == "__main__":
    main()

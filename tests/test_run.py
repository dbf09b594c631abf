"""The run directory: made without races, written whole, found again by every name that a user may type."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import pytest

from finetune_cli.config.schema import RunConfig
from finetune_cli.errors import FtuneError, MachineError, UserError
from finetune_cli.run import Found, Run, find, looks_like_path, near_run, new_evaluation_dir
from finetune_cli.storage import FileSystem

NOW = datetime(2026, 11, 22, 3, 31)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(name: str = "sentiment", *, now: datetime = NOW, steps: int = 2, state: str = "done", root: str = "runs") -> Run:
    """A run with a few checkpoints (the first is best), closed."""
    run = Run.create(RunConfig(root=root), name=name, now=now)
    run.write_config("task: {}\n")
    for step in range(1, steps + 1):
        files = {"model.safetensors": b"%d" % step, "config.json": b"{}", "config.yaml": b"task: {}\n"}
        run.store.save(step, files, best=step == 1, meta={})
    run.set_status(state, step=steps, code=0)  # type: ignore[arg-type]
    run.link_latest()
    run.close()
    return run


# -- create --------------------------------------------------------------------------------------------------------------------------


def test_names_sort_by_time_and_need_no_quoting() -> None:
    names = [
        "sentiment-minilm",
        "a b=c",
        "org/model",
        "../../etc",
        "größe",
        "",
        "情感 分析",
        "x" * 300,
        "a,b[c]{d}$'\"`;&|",
        "-rf",
        ".hidden",
        "a\n\x1b[31mb",
    ]
    for minute, name in enumerate(names):
        run = Run.create(RunConfig(), name=name, now=NOW.replace(minute=minute))
        assert run.path.parent == Path("runs").absolute()
        assert not set(run.path.name) & set(" =/,[]{}$'\"`;&|\n\x1b") and len(os.fsencode(run.path.name)) < 120
        assert run.path.name.startswith(f"2026-11-22_03{minute:02d}-")
        run.close()
    made = os.listdir("runs")
    assert len(made) == len(names)
    assert "2026-11-22_0300-sentiment-minilm" in made and "2026-11-22_0302-org-model" in made and "2026-11-22_0306-情感-分析" in made
    assert "2026-11-22_0305-run" in made


def test_the_second_in_a_minute_gets_a_number() -> None:
    assert [Run.create(RunConfig(), name="a", now=NOW).path.name[16:] for _ in range(3)] == ["a", "a-2", "a-3"]
    assert Run.create(RunConfig(name="mine"), name="a", now=NOW).path.name[16:] == "mine"


def test_many_at_once_get_one_each() -> None:
    with ThreadPoolExecutor(16) as pool:
        runs = list(pool.map(lambda _: Run.create(RunConfig(root="new/runs"), name="a", now=NOW), range(32)))
    assert len({run.path for run in runs}) == 32
    for run in runs:
        run.close()


def test_of_many_that_want_one_directory_one_gets_it() -> None:
    def attempt(_: int) -> Run | UserError:
        try:
            run = Run.create(RunConfig(dir="mine"), name="a")
            run.write_config("x")
            return run
        except UserError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        got = list(pool.map(attempt, range(16)))
    winners = [run for run in got if isinstance(run, Run)]
    assert len(winners) == 1 and Run.exists("mine")
    assert all("in use" in error.what or "already holds a run" in error.what for error in got if isinstance(error, UserError))
    winners[0].close()


def test_an_empty_directory_is_fine_a_used_one_is_refused() -> None:
    os.mkdir("empty")
    os.mkdir("empty/lost+found")
    Run.create(RunConfig(dir="empty"), name="a").close()
    os.mkdir("used")
    Path("used/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"run.dir is not empty"):
        Run.create(RunConfig(dir="used"), name="a")
    assert os.listdir("used") == ["thesis.txt"]
    run = begun()
    with pytest.raises(UserError, match="already holds a run") as caught:
        Run.create(RunConfig(dir=str(run.path)), name="a")
    assert f"resume={run.path}" in caught.value.fix


def test_a_run_that_died_before_it_began_does_not_block() -> None:
    run = Run.create(RunConfig(dir="mine"), name="a")
    run.set_status("running", step=0)
    run.write_manifest({"seed": 1})
    Path("mine/log.txt").write_text("...")
    Path("mine/.tmp-0123").write_text("half")
    run.close()
    again = Run.create(RunConfig(dir="mine"), name="a")
    assert os.listdir("mine") == [".lock"]
    again.close()


class Refusing(FileSystem):
    def __init__(self, code: int) -> None:
        self.code = code

    def mkdir(self, path: Path) -> None:
        raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EACCES, UserError), (errno.EROFS, UserError), (errno.ENOSPC, MachineError), (errno.EIO, MachineError)]
)
def test_a_root_that_cannot_be_written_is_told_with_the_cause(code: int, kind: type[FtuneError]) -> None:
    for config in (RunConfig(root="runs"), RunConfig(dir="mine")):
        with pytest.raises(kind, match=errno.errorcode[code]):
            Run.create(config, name="a", fs=Refusing(code))


@pytest.mark.parametrize("path", ["file", "file/below", "x" * 300, "nul\0", os.fsdecode(b"caf\xe9")])
def test_impossible_places_are_the_users_to_mend(path: str) -> None:
    Path("file").touch()
    for config in (RunConfig(root=path), RunConfig(dir=path), RunConfig(root=path + "/runs")):
        with pytest.raises(UserError) as caught:
            Run.create(config, name="a")
        assert caught.value.where in ("run.root", "run.dir")
    assert os.listdir() == ["file"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_as_another_user_an_unwritable_root_is_refused() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, stat.S_IRUSR | stat.S_IXUSR | stat.S_IROTH | stat.S_IXOTH)
        child = os.fork()
        if child == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                Run.create(RunConfig(root=folder + "/runs"), name="a")
            except UserError as error:
                os._exit(3 if "permission denied" in error.what else 4)
            finally:
                os._exit(5)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        os.chmod(folder, stat.S_IRWXU)


def test_a_run_that_never_began_leaves_nothing_behind() -> None:
    run = Run.create(RunConfig(root="a/b/runs"), name="x")
    run.set_status("failed", step=0, code=2)
    run.abandon()
    assert os.listdir() == []
    os.mkdir("empty")
    Path("empty/.DS_Store").touch()
    run = Run.create(RunConfig(dir="empty"), name="x")
    run.write_config("x")
    run.abandon()
    assert os.listdir("empty") == [".DS_Store"]
    begun()
    Run.create(RunConfig(), name="x").abandon()
    assert len(os.listdir("runs")) == 2  # the run and latest


# -- what a run holds ----------------------------------------------------------------------------------------------------------------


def test_all_that_is_written_is_where_the_contract_says() -> None:
    run = begun()
    run.write_command(["ftune", "train", "data.train=my file.csv"])
    run.write_manifest({"seed": 42})
    run.write_metrics({"test": {"accuracy": {"value": 0.91, "low": float("nan")}}})
    run.record(1, {"loss": 1.0})
    run.record_time(1, {"seconds": 1.0})
    run.write_error("Traceback …")
    run.write_model({"config.json": b"{}"})
    names = {"config.yaml", "command.txt", "manifest.json", "status.json", "metrics.jsonl", "timing.jsonl", "metrics.json"}
    assert set(os.listdir(run.path)) == names | {"error.txt", ".lock", "checkpoints", "model"}
    assert (run.path / "command.txt").read_text() == "ftune train 'data.train=my file.csv'\n"
    assert run.manifest() == {"seed": 42} and run.metrics() == {"test": {"accuracy": {"value": 0.91, "low": None}}}
    assert (run.log_path.name, run.model_dir.name, run.report_dir.name) == ("log.txt", "model", "report")
    status = json.loads((run.path / "status.json").read_bytes())
    assert (status["state"], status["step"], status["exit_code"], status["pid"]) == ("done", 2, 0, os.getpid())
    assert datetime.fromisoformat(status["time"]).tzinfo is not None and status["host"]


def test_a_full_disk_does_not_hide_how_the_run_ended() -> None:
    class Full(FileSystem):
        def create(self, path: Path) -> BinaryIO:
            raise OSError(errno.ENOSPC, "disk full", str(path))

    run = Run.open(begun(state="stopped").path, fs=Full())
    run.set_status("failed", step=3, code=5)
    run.write_error("Traceback …")
    with pytest.raises(MachineError, match="ENOSPC"):
        run.set_status("done", step=3, code=0)


def test_a_run_that_was_removed_meanwhile_is_said_to_be_gone() -> None:
    run = begun()
    shutil.rmtree(run.path)
    for write in (lambda: run.record(1, {"loss": 1.0}), lambda: run.store.save(3, {"a": b""}, best=True, meta={})):
        with pytest.raises(MachineError, match=f"{run.path} is gone") as told:
            write()
        assert "free" not in told.value.fix


def test_signs_of_life_are_cheap_and_ends_are_written_at_once() -> None:
    run = begun()
    run.set_status("running", step=3)
    inode = (run.path / "status.json").stat().st_ino
    for step in range(4, 50):
        run.set_status("running", step=step)
    assert (run.path / "status.json").stat().st_ino == inode and run.status()["step"] == 3
    run.set_status("preempted", step=50, code=75)
    assert (run.status()["state"], run.status()["step"], run.status()["exit_code"]) == ("preempted", 50, 75)


def test_records_are_canonical_and_nan_is_null() -> None:
    run = begun()
    run.record(50, {"train/loss": float("nan"), "epoch": 1.0, "train/lr": 9e-5, "a": float("inf")})
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 50, "epoch": 1.0, "a": null, "train/loss": null, "train/lr": 9e-05}\n'
    assert run.history() == [{"step": 50, "epoch": 1.0, "a": None, "train/loss": None, "train/lr": 9e-05}]


def test_records_go_on_after_a_death_without_gap_or_double() -> None:
    run = begun()
    run.record(1, {"loss": 1.0})
    offset = run.metrics_bytes()
    expected = (run.path / "metrics.jsonl").read_bytes()
    run.record(2, {"loss": 2.0})
    run.record_time(2, {"seconds": 2.0})
    for name in ("metrics.jsonl", "timing.jsonl"):
        with open(run.path / name, "ab") as file:
            file.write(b'{"step": 3, "lo')
    assert [record["step"] for record in run.history()] == [1, 2]
    again = Run.open(run.path)
    again.cut_metrics(offset)
    assert (run.path / "metrics.jsonl").read_bytes() == expected
    again.record(2, {"loss": 2.0})
    again.record_time(2, {"seconds": 2.5})
    assert [record["loss"] for record in again.history()] == [1.0, 2.0]
    assert again.timing() == [{"step": 2, "seconds": 2.5}]
    with pytest.raises(UserError, match="the checkpoint was made at 999"):
        again.cut_metrics(999)


def test_a_damaged_record_is_named() -> None:
    run = begun()
    (run.path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError) as caught:
        run.history()
    assert caught.value.where.endswith("metrics.jsonl:2")
    run.write_manifest({"seed": 42})
    path = run.path / "manifest.json"
    path.write_text(path.read_text().replace("42", "43"))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        run.manifest()


def test_secrets_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "plainlookingcanary")
    run = begun()
    words = [
        "hub.token=canary1",
        "a=hf_canary2345",
        "b=https://me:canary3@host/x",
        "c=xplainlookingcanaryx",
        "tokenizer=bert",
        "data.max_tokens=5",
    ]
    run.write_command(["ftune", "train", *words])
    run.write_command(["ftune", "train", "resume=x"])
    text = (run.path / "command.txt").read_text()
    assert "canary" not in text and "tokenizer=bert" in text and "data.max_tokens=5" in text
    assert text.splitlines()[1] == "ftune train resume=x"


def test_the_second_process_is_refused_and_the_lock_is_freed_by_death() -> None:
    run = begun()
    code = "import sys, time; from finetune_cli.run import Run; Run.open(sys.argv[1]).lock(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": _package()}
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by pid {other.pid} on"):
            Run.open(run.path).lock()
        shutil.rmtree(run.path / "checkpoints")
        with pytest.raises(UserError, match=f"no checkpoint yet: pid {other.pid} on .* is training it"):
            find(str(run.path), root="runs")
        (run.path / "config.yaml").unlink()
        with pytest.raises(UserError, match=f"only just beginning: it is in use by pid {other.pid} on"):
            find(str(run.path), root="runs")
        (run.path / "config.yaml").touch()
    finally:
        other.kill()
        other.wait()
    with pytest.raises(UserError) as told:
        find(str(run.path), root="runs")
    assert "resume=" in told.value.fix, "the dead train nothing"
    assert Run.open(run.path).lock().held


def _package() -> str:
    import finetune_cli

    return str(Path(finetune_cli.__file__).parent.parent)


def test_taking_the_lock_sweeps_what_a_death_left() -> None:
    run = begun()
    (run.path / ".tmp-12").write_text("half")
    (run.path / ".trash-model-12").mkdir()
    (run.path / "checkpoints" / ".tmp-step-00000009-12").mkdir()
    again = Run.open(run.path)
    again.lock()
    assert not list(run.path.rglob(".t*"))
    again.close()


def test_opening_a_run_prunes_nothing_before_it_is_known_how_many_to_keep() -> None:
    run = Run.create(RunConfig(), name="a", keep=9)
    run.write_config("x")
    for step in range(1, 5):
        run.store.save(step, {"model.bin": b"x"}, best=False, meta={})
    run.close()
    again = Run.open(run.path)
    again.lock()
    assert len(again.store.steps()) == 4
    again.close()
    Run.open(run.path, keep=1).lock()
    assert again.store.steps() == ["step-00000003", "step-00000004"]


def test_a_project_of_the_users_is_no_run() -> None:
    os.makedirs("project/checkpoints")
    Path("project/config.yaml").touch()
    assert not Run.exists("project")
    with pytest.raises(UserError, match=r"run.dir is not empty"):
        Run.create(RunConfig(dir="project"), name="a")


def test_evaluations_overwrite_nothing() -> None:
    run = begun()
    made = [run.evaluation_dir("new file"), run.evaluation_dir("new file"), run.evaluation_dir("test", own=True)]
    (made[2] / "metrics.json").touch()
    assert [path.relative_to(run.path).as_posix() for path in made] == ["eval/new-file", "eval/new-file-2", "eval/test"]
    assert run.evaluation_dir("test", own=True) == made[2] and os.listdir(made[2]) == []
    assert run.evaluation_dir("test").name == "test-2"


def test_evaluations_of_a_run_that_cannot_be_written_go_here(here: Path) -> None:
    run = begun()

    class ReadOnly(FileSystem):
        def mkdir(self, path: Path) -> None:
            if run.path in path.parents:
                raise OSError(errno.EROFS, "read-only", str(path))
            super().mkdir(path)

    reader = Run.open(run.path, fs=ReadOnly())
    assert reader.evaluation_dir("test") == here / "evals" / "test"
    assert reader.evaluation_dir("test") == here / "evals" / "test-2"
    assert new_evaluation_dir("model") == here / "evals" / "model"
    with pytest.raises(MachineError):
        reader.evaluation_dir("validation", own=True)


def test_space_can_be_reserved_for_the_end() -> None:
    run = begun()
    if run.reserve(100_000):
        assert (run.path / ".reserve").stat().st_size == 100_000
        assert run.reserve(200_000)
    run.release_reserve()
    assert not (run.path / ".reserve").exists()
    with pytest.raises(MachineError, match="reserving"):
        run.reserve(1 << 60)
    assert not (run.path / ".reserve").exists()


# -- find ----------------------------------------------------------------------------------------------------------------------------


def test_a_run_means_its_best_checkpoint() -> None:
    run = begun()
    best = run.path / "checkpoints" / "step-00000001"
    for name in (str(run.path), f"runs/{run.path.name}", f"./runs/{run.path.name}/", "latest", "runs/latest"):
        assert find(name, root="runs") == Found(
            weights=best, run=run.path, config=best / "config.yaml", kind="run", checkpoint="step-00000001"
        )
    last = find(f"{run.path}/checkpoints/last", root="runs")
    assert (last.kind, last.checkpoint, last.run) == ("checkpoint", "step-00000002", run.path)
    assert find(f"{run.path}/checkpoints/step-00000002", root="runs") == last


def test_a_run_without_best_means_last_then_its_model() -> None:
    run = begun(steps=0)
    with pytest.raises(UserError, match="no checkpoint yet"):
        find(str(run.path), root="runs")
    run.write_model({"config.json": b"{}"})
    assert find(str(run.path), root="runs").weights == run.model_dir
    run.store.save(7, {"model.safetensors": b"x"}, best=False, meta={})
    found = find(str(run.path), root="runs")
    assert found.checkpoint == "step-00000007" and found.config == run.config_path


def test_a_moved_run_a_copied_checkpoint_and_a_model_directory_are_found(here: Path) -> None:
    run = begun()
    run.write_model({"config.json": b"{}"})
    assert find(f"{run.path}/model", root="runs") == Found(run.model_dir, run.path, run.config_path, "model", None)
    moved = here / "a=b, [c] größe"
    shutil.move(run.path, moved)
    assert find(str(moved), root="runs").weights == moved / "checkpoints" / "step-00000001"
    assert find(moved.name, root="runs").run == moved
    shutil.copytree(moved / "checkpoints" / "step-00000002", here / "alone")
    assert find("alone", root="runs") == Found(here / "alone", None, here / "alone" / "config.yaml", "checkpoint", "alone")
    shutil.copytree(moved / "model", here / "plain")
    assert find("plain", root="runs") == Found(here / "plain", None, None, "model", None)


def test_pointer_files_are_followed() -> None:
    run = begun()
    for link, target in [(run.path / "checkpoints" / "best", "step-00000001"), (Path("runs/latest").absolute(), run.path.name)]:
        link.unlink()
        link.write_text(target + "\n")
        assert find(str(link), root="runs").checkpoint == "step-00000001"


def test_a_damaged_checkpoint_is_refused_with_its_cause_and_another_named() -> None:
    run = begun()
    (run.path / "checkpoints" / "step-00000001" / "model.safetensors").write_bytes(b"2")
    for name in (str(run.path), f"{run.path}/checkpoints/best", f"{run.path}/checkpoints/step-00000001"):
        with pytest.raises(UserError, match=r"damaged: model.safetensors does not match its sha256") as caught:
            find(name, root="runs")
        assert "step-00000002" in caught.value.fix
    (run.path / "checkpoints" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="did not finish"):
        find(f"{run.path}/checkpoints/step-00000001", root="runs")


def test_latest_is_the_run_that_finished_last() -> None:
    with pytest.raises(UserError, match="there is no run under runs"):
        find("latest", root="runs")
    older = begun("older", now=NOW.replace(hour=9))
    status = json.loads((older.path / "status.json").read_bytes())
    (older.path / "status.json").write_text(json.dumps({**status, "time": "2020-01-01T00:00:00+00:00"}))
    sweep = begun("job", root="runs/sweeps/42")
    begun("unfinished", state="stopped")
    assert find("latest", root="runs").run == sweep.path
    newer = begun("newer")
    assert find("latest", root="runs").run == newer.path and os.readlink("runs/latest") == newer.path.name
    resumed = Run.open(older.path)
    resumed.set_status("done", step=9, code=0)
    resumed.link_latest()
    assert find("latest", root="runs").run == older.path and os.readlink("runs/latest") == older.path.name
    shutil.rmtree(newer.path)
    shutil.rmtree("runs/sweeps")
    assert find("latest", root="runs").run == older.path


def test_only_a_bare_name_goes_to_the_hub() -> None:
    begun()
    for name in ("bert-base-cased", "org/model", "hub:org/model", "Model_1.5"):
        found = find(name, root="runs")
        assert (found.kind, found.weights.as_posix(), found.run) == ("hub", name.removeprefix("hub:"), None)
    for name in (
        "./bert",
        "../bert",
        "/bert",
        "~/bert",
        "a/b/c",
        "a b",
        "a=b",
        "x.csv",
        "runs/x",
        "x.safetensors",
        "größe",
        "org/",
        "~nobody-here/x",
        "nul\0",
        "x" * 5000 + "/y/z",
        "2026-11-22_0331-x",
    ):
        assert looks_like_path(name, root="runs")
        with pytest.raises(UserError, match="no such run or model"):
            find(name, root="runs")
    with pytest.raises(UserError, match="no name of a hub model"):
        find("hub:../x", root="runs")


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_an_unset_variable(name: str) -> None:
    with pytest.raises(UserError, match="unset shell variable"):
        find(name, root="runs")


def test_near_names_are_offered(here: Path) -> None:
    run = begun()
    name = run.path.name
    os.mkdir("empty")
    os.makedirs("trainer/checkpoint-500")
    Path("trainer/checkpoint-500/config.json").write_text("{}")
    cases = {
        f"runs/{name}s": f"did you mean {here}/runs/{name}?",
        name: f"did you mean runs/{name}?",
        f"./{name}": f"did you mean runs/{name}?",
        "runs": f"did you mean {here}/runs/{name}?",
        f"runs/{name}/config.yaml": f"did you mean {run.path}?",
        f"runs/{name}/checkpoints": f"did you mean {run.path}?",
        f"runs/{name}/checkpoints/step-00000003": f"did you mean {run.path}/checkpoints/step-0000000",
        "trainer": f"did you mean {here}/trainer/checkpoint-500?",
        "empty": "name a run, a checkpoint",
    }
    for typed, expected in cases.items():
        with pytest.raises(UserError) as caught:
            find(typed, root="runs")
        assert str(expected).replace(f"{here}/", "") in caught.value.fix.replace(f"{here}/", ""), (typed, caught.value.lines())
    os.symlink("nowhere", "dangling")
    with pytest.raises(UserError, match="is a link to nowhere"):
        find("dangling", root="runs")


def test_no_heavy_import() -> None:
    heavy = ("torch", "numpy", "hydra", "omegaconf", "pickle")
    code = f"import sys, finetune_cli.run; print([m for m in sys.modules if m.split('.')[0] in {heavy}])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": _package()}
    )
    assert out.stdout.strip() == "[]"


def test_a_bare_name_that_may_be_a_run_is_offered() -> None:
    run = begun("sentiment-minilm")
    for typed in ("sentiment-minilm", "sentiment", "sentimant-minilm", run.path.name[:-1]):
        assert near_run(typed, root="runs") == Path("runs") / run.path.name, typed
    assert near_run("bert-base-cased", root="runs") is None and near_run("x", root="nowhere") is None

"""Checkpoints written in the background: the bytes of the step they are of, told when they fail, nothing left running at the end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ran import Ran

from finetune_cli import models, snapshot
from finetune_cli.checkpoint import Knowledge, Saver
from finetune_cli.config import ModelConfig, OptimizerConfig
from finetune_cli.engine.loop import Trainer
from finetune_cli.engine.optimizer import Updater
from finetune_cli.errors import Diverged, MachineError
from finetune_cli.models import saved_tensors
from finetune_cli.snapshot import DTYPES, Snapshot, write_tensors
from finetune_cli.storage import REAL, Background, FileSystem, Store

pytestmark = pytest.mark.sampled(4)

SMALL = {"num_attention_heads": 2, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "vocab_size": 50}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "bert, tied": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)),
    "llama, tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)),
    "mixtral, other names in the file": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    ),
}


def written(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """What ``write_tensors`` writes."""
    parts: list[bytes] = []

    class File:
        def write(self, data: Any) -> int:
            parts.append(bytes(data))
            return len(parts[-1])

    write_tensors(File(), tensors, metadata)  # type: ignore[arg-type]
    return b"".join(parts)


tensors_of = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(0, 99),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"), tensors_of
    ),
    st.sampled_from([None, {"format": "pt"}]),
)
def test_a_file_of_tensors_is_the_librarys_to_the_byte(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    copies = Snapshot().take({"all": tensors})
    assert copies is not None
    expected = safetensors.torch.save(tensors, metadata)
    assert written(tensors, metadata) == expected == written(copies["all"], metadata)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_weights_file_is_that_of_save_pretrained(family: str, tmp_path: Path) -> None:
    models.quiet()
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path, max_shard_size="1000GB")
    assert written(saved_tensors(model), {"format": "pt"}) == (tmp_path / "model.safetensors").read_bytes()


# one saver -----------------------------------------------------------------------------------------------------------------


class Held(FileSystem):
    """Writes nothing before it is let go; then fails if it is told to."""

    def __init__(self) -> None:
        self.go, self.waiting, self.fails = threading.Event(), threading.Event(), False

    def write(self, file: Any, data: memoryview) -> int:
        self.waiting.set()
        assert self.go.wait(60)
        if self.fails:
            raise OSError(errno.ENOSPC, "No space left on device", str(file.name))
        return super().write(file, data)

    def fsync(self, path: Path) -> None:
        pass


class Loop:
    """A tiny model that is trained on, and saved."""

    def __init__(self, root: Path, fs: FileSystem = REAL) -> None:
        torch.manual_seed(1)
        self.model = FAMILIES["bert, tied"]()
        self.updater = Updater(self.model, OptimizerConfig(lr=1e-2), clip=1.0, device=torch.device("cpu"), scaler=None)
        knowledge = Knowledge(task="fill-mask", facts={}, columns={}, max_length=8, seed=1, plan={})
        tokenizer = models.train_tokenizer(iter(["a b c", "d e f"]), ModelConfig(shape={"vocabulary": 60}), "encoder")
        self.store = Store(root / "checkpoints", fs, keep=None)
        self.saver = Saver(self.store, knowledge, tokenizer, "task: {}\n")
        self.steps = 0

    def step(self) -> None:
        torch.manual_seed(self.steps)
        ids = torch.randint(5, 50, (2, 6))
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.updater.update(1e-2, step=self.steps + 1, loss=loss.detach())
        self.steps += 1

    def save(self) -> None:
        self.saver.save(self.steps, self.model, {"closed": True, "optimizer": self.updater.state(), "loss": 0.1}, best=True)


def sums(root: Path) -> dict[str, str]:
    """sha256 of every file, by its path."""
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.rglob("*")) if p.is_file()}


def test_a_save_in_the_background_has_the_bytes_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on over every save, which is held until then; the files are those of a loop that waits for each."""
    found = {}
    for way in ("background", "waiting"):
        with monkeypatch.context() as patch:
            fs = Held()
            if way == "waiting":
                fs.go.set()
                patch.setattr(snapshot, "free_host_memory", lambda: 0.0)
            loop = Loop(tmp_path / way, fs)
            for number in range(3):
                loop.step()
                loop.save()
                if way == "background":
                    assert fs.waiting.wait(60) and len(loop.store.steps()) == number
                    loop.step()
                    fs.go.set()
                    loop.saver.join()
                    fs.go.clear(), fs.waiting.clear()
                else:
                    assert len(loop.store.steps()) == number + 1  # there when save returns
                    loop.step()
            found[way] = sums(tmp_path / way)
    assert found["background"] == found["waiting"] and len(found["waiting"]) > 15
    assert len({sha for name, sha in found["waiting"].items() if name.endswith("model.safetensors")}) == 3


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    fs = Held()
    loop = Loop(tmp_path, fs)
    loop.step()
    loop.save()
    assert fs.waiting.wait(60)
    loop.step()
    threading.Timer(0.2, fs.go.set).start()
    loop.save()
    assert "step-00000001" in loop.store.steps()
    loop.saver.join()
    assert loop.store.steps() == ["step-00000001", "step-00000002"] and loop.store.last().name == "step-00000002"


def test_what_fails_is_told_once_and_moves_no_link(tmp_path: Path) -> None:
    fs = Held()
    loop = Loop(tmp_path, fs)
    fs.go.set()
    loop.step()
    loop.save()
    loop.saver.join()
    fs.fails = True
    loop.step()
    loop.save()
    loop.saver._writer._thread.join()
    with pytest.raises(MachineError, match="step 2: disk full"):
        loop.saver.look()
    loop.saver.look()
    assert loop.store.steps() == ["step-00000001"] and loop.store.last() == loop.store.best() == loop.store.root / "step-00000001"
    assert not list(loop.store.root.glob(".tmp*"))
    for ask in (loop.save, loop.saver.join):
        fs.fails = True
        loop.save()
        fs.waiting.wait(60)
        with pytest.raises(MachineError, match="disk full"):
            ask()
    fs.fails = False
    loop.save()
    loop.saver.join()
    assert loop.store.last().name == "step-00000002"


def test_an_error_of_training_goes_before_one_of_saving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fs = Held()
    fs.fails = True
    loop = Loop(tmp_path, fs)
    with pytest.raises(Diverged, match="first"), loop.saver.finishing():
        loop.save()
        fs.go.set()
        raise Diverged("first", where="here")
    assert "disk full" in capsys.readouterr().err
    with pytest.raises(MachineError, match="disk full"), loop.saver.finishing():
        loop.save()


@pytest.mark.parametrize("room", [True, False])
def test_weights_with_nan_never_become_a_checkpoint(tmp_path: Path, room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not room:
        monkeypatch.setattr(snapshot, "free_host_memory", lambda: 0.0)
    loop = Loop(tmp_path)
    loop.step()
    loop.save()
    loop.model.bert.encoder.layer[0].output.dense.weight.data[3, 3] = torch.nan
    loop.steps = 2
    with pytest.raises(Diverged, match="encoder.layer.0.output.dense.weight"):
        loop.save()
        loop.saver.join()
    assert loop.store.steps() == ["step-00000001"] and loop.store.last().name == "step-00000001"


def test_memory_is_taken_once_and_given_back(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.saver.finishing():
        loop.step()
        loop.saver.make_room(loop.model, {"optimizer": loop.updater.state()})
        loop.saver.join()
        taken = loop.saver._snapshot._memory
        assert taken.numel() >= 3 * sum(p.nbytes for p in loop.model.parameters())
        for _ in range(2):
            loop.save()
            assert loop.saver._snapshot._memory is taken
            loop.step()
    assert not loop.saver._snapshot._memory.numel()


def test_where_memory_is_short_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    loop = Loop(tmp_path)
    loop.step()
    size = snapshot._places({"w": saved_tensors(loop.model), "m": {}})[1][-1]
    monkeypatch.setattr(snapshot, "free_host_memory", lambda: 2.0 * size)  # enough for weights, not for moments as well
    for _ in range(2):
        loop.save()
        assert loop.saver._writer._thread is None
        loop.step()
    assert capsys.readouterr().err.count("training waits while a checkpoint is written") == 1
    assert loop.store.steps() == ["step-00000001", "step-00000002"]


def test_background_work_is_over_when_joined() -> None:
    beside, before = Background("beside"), threading.active_count()
    order: list[int] = []
    for number in range(5):
        beside.start(lambda number=number: (time.sleep(0.01), order.append(number)))  # type: ignore[misc]
    beside.join()
    assert order == [0, 1, 2, 3, 4] and threading.active_count() == before
    beside.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        beside.start(lambda: order.append(9))
    beside.join()
    assert order[-1] == 4


# the command ---------------------------------------------------------------------------------------------------------------

OPTIONS = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "train.epochs=2", "train.batch_size=8", "train.save_every=2"]
OPTIONS += ["train.eval_every=4", "train.log_every=1", "device.threads=1", "device=cpu", "train.keep=50"]


@pytest.fixture
def keys(corpus: Callable[..., Any]) -> list[str]:
    return [*corpus(train=48).keys, *OPTIONS]


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    """No test leaves a thread of ours."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_run_whose_saves_wait_is_the_same_run(
    keys: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        made = ftune_inside("train", *keys, "run.dir=run", cwd=tmp_path / name).ok().run
        config = str(tmp_path / name).encode()  # the run's own place is in its config
        found = {}
        for path in sorted((made / "checkpoints").rglob("*")):
            if path.is_file() and path.name != "manifest.json":
                found[str(path.relative_to(made))] = hashlib.sha256(path.read_bytes().replace(config, b"")).hexdigest()
        return found | {"metrics.jsonl": hashlib.sha256((made / "metrics.jsonl").read_bytes()).hexdigest()}

    beside = run("beside")
    monkeypatch.setattr(snapshot, "free_host_memory", lambda: 0.0)
    assert run("waits") == beside and sum("state.safetensors" in name for name in beside) >= 6


def test_a_disk_that_fills_up_ends_the_run_at_the_next_step(
    keys: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, run = FileSystem.write, tmp_path / "full"

    def write(self: FileSystem, file: Any, data: memoryview) -> int:
        if "step-00000006" in str(file.name):
            raise OSError(errno.ENOSPC, "No space left on device", str(file.name))
        return real(self, file, data)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystem, "write", write)
        failed = ftune_inside("train", *keys, f"run.dir={run}")
    assert failed.code == 5 and failed.out == f"{run}\n" and "checkpoint step 6: disk full (ENOSPC)" in failed.err
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "failed" and status["exit_code"] == 5 and status["step"] in (6, 7, 8)
    assert os.readlink(run / "checkpoints/last") == "step-00000004"
    resumed = ftune_inside("train", f"resume={run}").ok()
    assert "resuming from step 4" in resumed.err and (run / "checkpoints/step-00000012").is_dir()


def test_a_stop_waits_for_the_save_in_flight_and_starts_no_second(
    keys: list[str], ftune_inside: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM comes while the state of step 4 is being written, and is obeyed before the next update."""
    run, saved, looks = tmp_path / "stopped", list[int](), list[int]()
    writing, stopping = threading.Event(), threading.Event()
    real_save, real_look, real_stop = Store.save, Saver.look, Trainer.save_where_stopped

    def save(self: Store, step: int, *args: Any, **options: Any) -> Path:
        saved.append(step)
        if step == 4:
            writing.set()
            assert stopping.wait(60)
            time.sleep(0.3)
        return real_save(self, step, *args, **options)

    def look(self: Saver) -> None:  # before every update
        real_look(self)
        looks.append(1)
        if len(looks) == 5:
            assert writing.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self: Trainer) -> None:
        stopping.set()
        real_stop(self)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "save", save)
        patch.setattr(Saver, "look", look)
        patch.setattr(Trainer, "save_where_stopped", stop)
        stopped = ftune_inside("train", *keys, f"run.dir={run}")
    assert stopped.code == 75 and "saved step 4" in stopped.err
    assert saved == [2, 4] and os.readlink(run / "checkpoints/last") == "step-00000004"
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"

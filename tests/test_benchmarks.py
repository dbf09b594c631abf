"""The benchmarks work: each in its short form, from its options to its table. Nothing is timed here, and no figure is looked at.

Commands and jobs run in forks of a process that has imported what they need; what they are told and what they write is as ever.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, own_settings
from ran import ROOT, labelled_rows, write_rows

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "scripts" / "bench"))

import checkpoint_stall
import first_step
import gpu
import harness
import material
import memory
import page
import processes
import readme_tables
import scaling
import scaling_data
import scaling_processes
import speed
import startup
import task_peers
import tokenising

pytestmark = pytest.mark.sampled(5)
TRAINER = ["transformers.trainer", "accelerate", "datasets", "torch._dynamo"] if find_spec("accelerate") else []
Show = Callable[[Callable[[Sequence[str]], None], str], list[list[str]]]


@pytest.fixture(scope="module")
def forks(device: str) -> Iterator[Forks]:
    found = Forks(allowed=device == "cpu", more=[*TRAINER, "transformers.models.bert", "transformers.pipelines"])
    yield found
    found.end()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all of them, so that one makes the rows and models of the next."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def show(forks: Forks, work: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Show:
    """``show(main, "--only train")``: the cells of the table that a smoke run of a benchmark prints; it writes nothing beside its work."""

    def popen(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        return forks.popen(command, env={**env, **own_settings()}, **options)

    def run(main: Callable[[Sequence[str]], None], typed: str = "") -> list[list[str]]:
        before = {file: file.stat().st_mtime_ns for file in harness.RESULTS.iterdir()}
        monkeypatch.setattr(processes, "Popen", popen)
        asked = typed.split()
        main([*asked, "--smoke", "--work", str(work), *(["--device", device] if "--imports" not in asked else [])])
        out = capsys.readouterr().out
        assert {file: file.stat().st_mtime_ns for file in harness.RESULTS.iterdir()} == before
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")][2:]

    return run


def written(work: Path, name: str) -> dict[str, Any]:
    """The result file of a smoke run."""
    found: dict[str, Any] = json.loads((work / f"smoke-{name}.json").read_text(encoding="utf-8"))
    assert found["caption"].startswith("Smoke run, not a measurement") and found["machine"]["torch"]
    assert all(len(row) == len(found["columns"]) for row in found["table"])
    return found


def sides(variants: dict[str, str]) -> list[str]:
    """The variants that can run here, in words."""
    return [told for name, told in variants.items() if (TRAINER or not name.startswith("trainer")) and name != "trainer_bf16"]


# each in its short form -------------------------------------------------------------------------------------------------------


def test_speed(show: Show, work: Path) -> None:
    table = show(speed.main, "--variants tutorial,trainer_best,pipeline,ftune")
    assert [row[0] for row in table if row[1].startswith("ftune")] == ["train", "predict"]
    runs = written(work, "speed")["runs"]
    assert {run["variant"] for run in runs} >= {"tutorial", "pipeline", "ftune"}
    assert all(run["samples_per_second"] > 0 and 0 <= run["accuracy"] <= 1 for run in runs)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell the memory of a process")
def test_memory(show: Show, work: Path) -> None:
    table = show(memory.main, "--variants trainer,ftune --only train")
    assert table[-1][1] == "ftune train" and len(table) == 1 + bool(TRAINER)
    assert all(run["tree_mb"] > 10 and run["process_mb"] > 10 and run["processes"] >= 1 for run in written(work, "memory")["runs"])


def test_startup(show: Show, work: Path) -> None:
    table = show(startup.main)
    assert [row[0] for row in table] == [*startup.ANSWERS, *sides(startup.STEPS)]
    assert all(run["wall_seconds"] > 0 for run in written(work, "startup")["runs"])


def test_checkpoint_stall(show: Show, work: Path) -> None:
    assert [row[0] for row in show(checkpoint_stall.main)] == list(checkpoint_stall.VARIANTS.values())
    assert all(len(run["stalls"]) == 2 and 0 < min(run["stalls"]) for run in written(work, "checkpoint_stall")["runs"])


@pytest.mark.thorough
def test_scaling_with_rows(show: Show, work: Path) -> None:
    table = show(scaling.main, "data --sizes 1,2")
    assert [row[0] for row in table] == ["100", "200"]
    fewer, more = written(work, "scaling_data")["runs"]
    assert more["tokens"] > fewer["tokens"] and fewer["opening_ms"] < fewer["tokenising_seconds"] * 1000


def test_scaling_with_length(show: Show, work: Path) -> None:
    assert [row[0] for row in show(scaling.main, "length")] == ["16", "32"]
    assert {run["layout"] for run in written(work, "scaling_length")["runs"]} == {"padded", "packed"}


def test_scaling_with_processes(show: Show, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the option is not there, that is what it says; the table itself is made of rates that are known."""
    asked: list[tuple[str, int]] = []

    def train(_: Any, mode: str, count: int, launcher: str) -> dict[str, Any]:
        asked.append((mode, count))
        return {"samples_per_second": 10.0 * count ** (0.5 if mode == "strong" else 1), "tree_mb": 100.0}

    monkeypatch.setattr(scaling_processes, "train", train)
    monkeypatch.setattr(scaling_processes, "can_be_asked", lambda: True)
    table = show(scaling.main, "processes")
    assert asked == [("strong", 1), ("strong", 2), ("weak", 1), ("weak", 2)]
    assert [row[3:5] for row in table] == [["1.00×", "100%"], ["1.41×", "71%"], ["1.00×", "100%"], ["2.00×", "100%"]]
    written(work, "scaling_processes").clear()
    (work / "smoke-scaling_processes.json").unlink()
    monkeypatch.setattr(scaling_processes, "can_be_asked", lambda: False)
    assert show(scaling.main, "processes") == [] and not (work / "smoke-scaling_processes.json").exists()


def test_tokenising(show: Show, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenising, "find_spec", lambda _: None)  # its peer would import for seconds
    assert [row[0] for row in show(tokenising.main)] == ["ftune"]
    assert written(work, "tokenising")["runs"][0]["tokens"] > 200


def test_libraries_of_one_task_that_are_not_installed_are_left_out(
    show: Show, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(task_peers, "find_spec", lambda _: None)
    assert show(task_peers.main) == [] and not (work / "smoke-task_peers.json").exists()
    assert task_peers.chosen("cpu") == [] and "not installed: sentence_transformers, trl" in capsys.readouterr().err
    monkeypatch.setattr(task_peers, "find_spec", lambda name: name == "trl" or None)
    assert task_peers.chosen("cpu") == [("chat", "trl"), ("chat", "ftune")]


@pytest.mark.parametrize("only", ["base_short", "llama_chat", "predict"])
def test_a_gpus_works_on_this_device(only: str, show: Show, work: Path) -> None:
    table = show(gpu.main, f"--tiny --only {only}")
    assert table[-1][1] == "ftune" and len(table) >= 1 + bool(TRAINER)
    found = written(work, "gpu")
    assert found["peak"]["peak"] > 0 and all(run["rows_per_second"] > 0 for run in found["runs"])


def test_the_page_is_small_and_holds_every_panel(show: Show, work: Path) -> None:
    show(lambda typed: page.main([t for t in typed if t not in ("--device", "cpu", "cuda", "mps")]))
    svg = (work / "results.svg").read_text(encoding="utf-8")
    assert len(svg) < 300_000 and all(title.replace("'", "&#x27;") in svg or title in svg for _, title, _ in page.PANELS)


# what they stand on -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="this system does not tell the memory of a process")
def test_memory_is_that_of_the_whole_tree_and_shared_pages_count_once() -> None:
    """A process fills 64 MB and forks; parent and child hold the same pages, and then each fills 64 MB of its own."""
    program = (
        "import os, time\n"
        "shared = bytearray(b'x') * (64 << 20)\n"
        "pid = os.fork()\n"
        "own = bytearray(b'y') * (64 << 20)\n"
        "time.sleep(0.5)\n"
        "os.waitpid(pid, 0) if pid else None\n"
    )
    found = processes.run([sys.executable, "-S", "-c", program], watch=True).memory
    assert found is not None and found.processes == 2
    assert 190 < found.tree_mb < 240 and 125 < found.process_mb < 180


def test_a_command_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match="exit 3, not 0"):
        processes.run([sys.executable, "-S", "-c", "import sys; sys.exit(3)"])


STEP = "import torch\nw = torch.nn.Parameter(torch.ones(1))\n(w * 2).sum().backward()\ntorch.optim.AdamW([w]).step()\nprint('went on')\n"


def test_the_first_step_is_seen_and_ends_the_program(tmp_path: Path) -> None:
    """In a fresh interpreter, where torch is not imported yet, as in the benchmark itself."""
    (tmp_path / "program.py").write_text(STEP, encoding="utf-8")
    command = [sys.executable, first_step.__file__, str(tmp_path / "step.json"), str(tmp_path / "program.py")]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "went on" not in ended.stdout and json.loads((tmp_path / "step.json").read_text())["cpu_seconds"] > 0


def test_import_times_are_read_and_sorted() -> None:
    lines = ["self [us] | cumulative | imported package", "      100 |        300 |   b.c", "      200 |        900 | a"]
    told = "".join(f"import time: {line}\n" for line in lines)
    assert startup.slowest(told, 1) == [["a", "0.9", "0.2"]]
    assert startup.slowest(told, 9)[1] == ["b.c", "0.3", "0.1"]


def test_answers_in_another_order_are_noticed(tmp_path: Path) -> None:
    rows = labelled_rows(3)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    answers = [{"row": i, "text": row["text"]} for i, row in enumerate(rows, 1)]
    for changed, told in (
        (answers, None),
        (answers[:2], "fewer answers"),
        ([*answers, answers[0]], "more answers"),
        ([answers[1], answers[0], answers[2]], "place 1 is about row 2"),
        ([answers[0], {**answers[1], "text": "other"}, answers[2]], "place 2"),
    ):
        output = write_rows(tmp_path / "answers.jsonl", changed)
        if told is None:
            scaling_data.check_order(file, output)
        else:
            with pytest.raises(SystemExit, match=told):
                scaling_data.check_order(file, output)


def test_made_rows_are_the_same_every_time_and_as_long_as_asked(tmp_path: Path) -> None:
    once, again = (material.made_rows(tmp_path / f"{n}.jsonl", 300, words=(10, 0.5, 4, 20)) for n in (1, 2))
    assert once.read_bytes() == again.read_bytes()
    lengths = [len(json.loads(line)["text"].split()) for line in once.read_text(encoding="utf-8").splitlines()]
    assert len(lengths) == 300 and min(lengths) >= 4 and max(lengths) <= 20 and 8 <= sorted(lengths)[150] <= 12


def test_medians_and_spread_as_they_are_told() -> None:
    assert harness.told([3.0, 1.0, 2.0]) == "2.0 (1.0 to 3.0)"
    assert harness.told([2.04, 2.01]) == "2.0" and harness.told([]) == ""
    assert harness.ratio([4.0, 6.0], [2.5]) == "2.00×" and harness.ratio([], [1.0]) == ""


def test_operations_are_those_of_the_layers_and_of_attention(tmp_path: Path) -> None:
    """Against a count by torch of the very products that a forward pass makes, of rows of one length, without head and pooler."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BertModel

    start = material.bert(tmp_path / "one", "one_layer")
    words = gpu.Work("", "one_layer", 4, 1, (12, 0.0, 12, 12), predict=True)
    file = material.made_rows(tmp_path / "rows.jsonl", 1, words=words.words)
    tokens, counted = gpu.operations(words, file, start)
    model = BertModel.from_pretrained(start, add_pooling_layer=False, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, int(tokens), dtype=torch.long))
    assert counted == counter.get_total_flops()
    trained = gpu.operations(gpu.Work("", "one_layer", 4, 1, words.words), file, start)
    assert trained == (tokens, 3 * counted)


def test_the_tables_go_where_readme_has_their_markers(tmp_path: Path) -> None:
    result = {"caption": "On a box.", "columns": ["a"], "table": [["1"]], "runs": []}
    folder, table = tmp_path / "scripts" / "results", "### Memory\n\nOn a box.\n\n| a |\n| --- |\n| 1 |"
    harness.peers.save(folder / "memory.json", result)
    assert readme_tables.benchmarks(tmp_path) == table and readme_tables.measured(folder, readme_tables.RESULTS) == ""
    (tmp_path / "scripts" / "bench").mkdir()
    (tmp_path / "scripts" / "bench" / "results.svg").touch()
    told = readme_tables.benchmarks(tmp_path)
    assert told.startswith("![") and told.endswith(table)
    empty = "above\n<!-- benchmarks:begin -->\n<!-- benchmarks:end -->\nbelow"
    assert f"begin -->\n{told}\n<!--" in readme_tables.between(empty, "benchmarks", told)


def test_every_benchmark_is_in_the_tables_and_on_the_page() -> None:
    own = {"first_step", "harness", "material", "processes", "page"}
    files = {file.stem for file in (ROOT / "scripts" / "bench").glob("*.py")} - own - {"scaling"}
    tables = {name for name, _, _ in [*readme_tables.RESULTS, *readme_tables.BENCHMARKS]}
    assert files <= tables and files <= set(page.FILES)


def test_the_tests_of_a_gpu_are_those_of_equality() -> None:
    script = (ROOT / "scripts" / "cuda_tests.sh").read_text(encoding="utf-8")
    marker = re.search(r"-m (\w+) --device", script)
    assert marker is not None and os.access(ROOT / "scripts" / "cuda_tests.sh", os.X_OK)
    marked = {file.name for file in (ROOT / "tests").glob("test_*.py") if f"mark.{marker[1]}" in file.read_text(encoding="utf-8")}
    assert {"test_engine.py", "test_device_equality.py"} <= marked

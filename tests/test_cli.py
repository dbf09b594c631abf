"""The command line: what the user types, what comes back on stdout and stderr, and the exit code. A fake verb stands in for the work."""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from finetune_cli import cli
from finetune_cli.config import Invocation
from finetune_cli.errors import Diverged, Interrupted, UserError
from tests.conftest import Ran

Calls = list[tuple[Any, Invocation]]
HEAVY = {"torch", "transformers", "sklearn", "pyarrow", "datasets", "matplotlib"}
FAKE_VERB = """
import sys, time
def run(config, invocation):
    print("begun", file=sys.stderr, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The verbs' work is replaced: each call is recorded, and ``run.name`` chooses how it ends."""
    made: Calls = []

    def run(config: Any, invocation: Invocation) -> float | None:
        made.append((config, invocation))
        ends = {
            "bug": ZeroDivisionError("a bug"),
            "user": UserError("bad rows", where="a.csv:3", fix="mend them"),
            "diverged": Diverged("not finite"),
            "interrupted": Interrupted("stopped"),
        }
        if (end := getattr(config.run, "name", None)) in ends:
            raise ends[end]
        print(json.dumps({"verb": invocation.verb}))
        return 0.5

    module = types.ModuleType("fake_verb")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_verb", module)
    for name, verb in cli.VERBS.items():
        monkeypatch.setitem(cli.VERBS, name, verb._replace(module="fake_verb"))
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def saved_run(calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> Callable[..., Path]:
    """``saved_run("name", "data.text=t")``: a directory that looks like a finished run made with these overrides."""

    def make(name: str, *overrides: str) -> Path:
        ftune_inside("train", "data.train=my.csv", *overrides).ok()
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "config.yaml").write_text(calls.pop()[1].config_yaml, encoding="utf-8")
        (folder / "status.json").write_text("{}")
        (folder / "model" / "config.json").write_text("{}")
        return folder

    return make


# what needs no config ---------------------------------------------------------------------------------------------------------


def imported_by(*args: str) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and the top-level modules that it imported."""
    code = "import sys; from finetune_cli.cli import main; c = main(sys.argv[1:])\n"
    code += "print('\\n', *{name.split('.')[0] for name in sys.modules}); sys.exit(c)"
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing() -> None:
    code, modules = imported_by("--help")
    assert code == 0
    assert not modules & (HEAVY | {"hydra", "omegaconf", "yaml", "numpy"})


def test_a_model_is_recognised_without_anything_heavy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForTokenClassification"]}))
    code, modules = imported_by("eval", str(tmp_path), "task.aggregaton=1")
    assert code == 2 and not modules & HEAVY


@pytest.mark.parametrize(
    "args", [["train", "optimizer.lrr=1"], ["train", "+exp=sentimnt"], ["eval", "/nowhere/at/all"], ["train", "--help"]]
)
def test_a_config_error_imports_nothing_heavy(args: list[str]) -> None:
    code, modules = imported_by(*args)
    assert code == (0 if "--help" in args else 2)
    assert not modules & HEAVY


def test_no_arguments_is_a_usage_error(ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside()
    assert (ran.code, ran.out) == (2, "") and "usage" in ran.err
    assert ftune_inside("--help").ok().out == ran.err
    assert ftune_inside("--version").ok().out.startswith("ftune ")


@pytest.mark.parametrize("verb", ["train", "eval", "predict"])
def test_help_of_a_verb_lists_every_option_and_group(verb: str, ftune_inside: Callable[..., Ran]) -> None:
    from finetune_cli.config.options import options_of
    from finetune_cli.tasks import task_configs

    ran = ftune_inside(verb, "--help").ok()
    assert ran.err == ""
    for key in options_of(verb, task_configs()):
        assert f"  {key} = " in ran.out
    assert "device     auto, cpu, cuda, mps" in ran.out
    assert ("sentiment " in ran.out) == (verb == "train")


@pytest.mark.parametrize(
    ("typed", "fix"), [("trian", "did you mean 'ftune train'"), ("-m", "ftune train | check"), ("+exp=x", "ftune train |")]
)
def test_unknown_verbs(typed: str, fix: str, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside(typed)
    assert ran.out == "" and fix in ran.fails()[-1]


# mistakes ---------------------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["train"], ["nothing to train on", "+exp=sentiment"]),
    (["train", "data.train=x", "optimizer.lrr=1"], ["unknown key 'optimizer.lrr'", "optimizer.lrr=1", "did you mean optimizer.lr"]),
    (["train", "data.train=x", "lr=1"], ["did you mean optimizer.lr"]),
    (["train", "data.train=x", "modle=tiny"], ["did you mean model"]),
    (["train", "data.train=x", "+epx=sentiment"], ["unknown key 'epx'", "+exp=NAME"]),
    (["train", "data.train=x", "model=tinny"], ["no model 'tinny'", "did you mean model=tiny", "minilm"]),
    (["train", "data.train=x", "model=bert-base-cased"], ["model.path=bert-base-cased"]),
    (["train", "data=my.csv"], ["data.train=my.csv"]),
    (["train", "+exp=sentimnt"], ["no experiment 'sentimnt'", "did you mean +exp=sentiment"]),
    (["train", "exp=sentiment"], ["added with a plus", "+exp=sentiment"]),
    (["train", "sentiment"], ["not key=value", "+exp=sentiment"]),
    (["train", "my.csv"], ["data.train=my.csv"]),
    (["train", "data.train=x", "optimizer.lr=abc"], ["optimizer.lr is 'abc'", "expected a number"]),
    (["train", "data.train=x", "optimizer.lr=-1"], ["expected above 0"]),
    (["train", "data.train=x", "optimizer.lr=nan"], ["a finite number"]),
    (["train", "data.train=x", "train.batch_size=2.5"], ["expected an integer"]),
    (["train", "data.train=x", "train.eval_every=0"], ["or 'epoch'"]),
    (["train", "data.train=x", "optimizer.schedule=lineer"], ["one of linear, cosine"]),
    (["train", "data.train=x", "data.validation=1.5"], ["share above 0 and below 1"]),
    (["train", "data.train=x", "expect.accuracy=0.8"], ["expect.accuracy='>=0.8'"]),
    (["train", "data.train=x", "optimizer.momentum=0.9"], ["does not apply", "optimizer.name", "sgd"]),
    (["train", "data.train=x", "model.shape.layers=2"], ["does not apply", "model.path"]),
    (["train", "data.train=x", "model=tiny", "model.shape.layer=2"], ["layers, hidden"]),
    (["train", "data.train=x", "train.seed=1,2"], ["several values", "--multirun"]),
    (["train", "data.train=${oc.env:NOPE_X}"], ["NOPE_X", "export"]),
    (["train", "data.train=${nope.key}"], ["cannot be resolved"]),
    (["train", "data.train="], ["is empty", "shell variable"]),
    (["train", "data.train=x", "run.root=null"], ["run.root is null"]),
    (["train", "data.train=x", "task=text-clasification"], ["did you mean task=text-classification"]),
    (["train", "data.train=x", "train=5"], ["train is 5", "section"]),
    (["train", "data.train=x", "resume=auto"], ["run.dir"]),
    (["train", "resume=nowhere"], ["resume=nowhere"]),
    (["train", "data.train=x", "resume_allow=[train.epoch]"], ["train.epochs"]),
    (["train", "data.train=x", "hydra.callbacks.x._target_=os.system"], ["_target_"]),
    (["train", "data.train=x", "task.class_weights={_target_: os.system}"], ["_target_"]),
    (["train", "data.train=x", "model.trust_remote_code=true"], ["model.revision"]),
    (["train", "--bogus"], ["unknown flag --bogus"]),
    (["train", "--cfg"], ["--cfg needs a value"]),
    (["train", "--cfg", "jbo"], ["job, hydra, all"]),
    (["train", "--cfg", "job", "--info", "all"], ["only one of"]),
    (["train", "data.train=x", "--config-dir", "nope"], ["nope", "not found"]),
    (["train", "data.train=x", "--experimental-rerun", "x.pickle"], ["unknown flag"]),
    (["train", "data.train=x", "-m", "run.dir=d"], ["run.dir"]),
    (["train", "data.train=x", "-m", "optimizer.lr=1e-3,-1"], ["optimizer.lr is -1"]),
    (["eval"], ["needs a run", "ftune eval runs/latest"]),
    (["eval", "ckpt="], ["ckpt= is empty"]),
    (["eval", "ckpt=null"], ["ckpt=RUN"]),
    (["eval", "./nowhere"], ["nowhere"]),
    (["eval", "ckpt=[A,B]"], ["ensemble"]),
    (["eval", "A", "B"], ["second run"]),
    (["eval", "A", "optimizer.lr=1"], ["unknown key 'optimizer.lr' for ftune eval", "comes with the run"]),
    (["eval", "A", "model=tiny"], ["comes with the run"]),
    (["predict", "A", "new.csv"], ["input=FILE"]),
    (["predict", "A", "split=test"], ["only ftune eval has it"]),
]


@pytest.mark.parametrize(("args", "told"), MISTAKES, ids=[" ".join(args) for args, _ in MISTAKES])
def test_mistakes_are_three_lines(args: list[str], told: list[str], calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    ran = ftune_inside(*args)
    text = "\n".join(ran.fails())
    assert all(part in text for part in told), text
    assert ran.out == "" and len(ran.err.splitlines()) <= 3
    assert not calls and not [*tmp_path.iterdir()]


def test_all_mistakes_are_told_at_once(calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    error, where, _ = ftune_inside("train", "data.train=x", "optimizer.lrr=1", "train.epochs=abc", "train.clip=-2", "model=tinny").fails()
    for part in ("tinny", "optimizer.lrr", "train.epochs is 'abc'", "train.clip is -2"):
        assert part in error
    assert "command line: train.clip=-2" in where


@pytest.mark.parametrize("secret", ["+hub.token=hf_SECRETSECRETSECRET", "data.text=hf_SECRETSECRETSECRET1", "+api_key=SECRET"])
def test_a_secret_is_refused_and_not_repeated(secret: str, calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside("train", "data.train=x", secret)
    assert "secret" in ran.fails()[0] and "SECRET" not in ran.err


def test_full_error_keeps_the_traceback(calls: Calls, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for args in (["optimizer.lrr=1"], ["run.name=bug"]):
        ran = ftune_inside("train", "data.train=x", *args)
        assert ran.code and "Traceback" in ran.err
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


# what reaches the verb --------------------------------------------------------------------------------------------------------


def test_a_call(calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    ran = ftune_inside("train", "train.epochs=2", "+exp=sentiment", "optimizer=sgd").ok()
    assert ran.err == "" and not [*tmp_path.iterdir()]
    config, invocation = calls[0]
    assert config.train.epochs == 2.0 and config.optimizer.name.value == "sgd" and config.task.name == "text-classification"
    assert invocation.typed == ("train", "train.epochs=2", "+exp=sentiment", "optimizer=sgd")
    assert invocation.experiment == "sentiment" and not invocation.multirun and invocation.sweep_dir is None
    assert {"train.epochs", "optimizer.lr"} <= invocation.user_set and "optimizer.momentum" not in invocation.user_set


AWKWARD = [
    "größe, a=b",
    "it's",
    "a;b",
    "a&b",
    'a"b',
    "#h",
    "{b}",
    "(p)",
    "a b",
    "12e4",
    "010",
    "yes",
    "$HOME",
    "x\\",
    "a: b",
    "[",
    "é,è",
    "~x",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_arrive_as_typed(text: str, calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    ftune_inside("train", f"data.train=./{text}", f"data.text={text}", f"run.name={text}", "expect.accuracy=>= 0.5").ok()
    config, invocation = calls[0]
    assert (config.data.text, config.run.name) == (text, text)
    assert config.data.train == str(Path.cwd() / text)
    from finetune_cli.config import saved
    from finetune_cli.tasks import task_configs

    Path("c.yaml").write_text(invocation.config_yaml, encoding="utf-8")
    assert saved.load(Path("c.yaml"), tasks=task_configs()) == config


def test_quoting_survives_any_text() -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from finetune_cli.config.grammar import quote

    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choice("ab'\"\\,=[]{}() :~#é中") for _ in range(draw.randint(1, 12)))
        assert OverridesParser.create().parse_override(f"x={quote(text)}").value() == text


def test_paths_become_absolute_and_names_stay(calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    ftune_inside("train", "data.train=[a.csv,sub/*.tsv,corpus:reviews/train.jsonl]", "data.test=here", "data.validation=owner/name").ok()
    data = calls[0][0].data
    assert data.train == [str(tmp_path / "a.csv"), str(tmp_path / "sub/*.tsv"), "corpus:reviews/train.jsonl"]
    assert (data.test, data.validation) == (str(tmp_path / "here"), "owner/name")
    ftune_inside("train", "data.train=hub:x/y", "model.path=./m", "data.test=~/t.csv", "run.root=deep/runs").ok()
    config = calls[1][0]
    assert (config.data.train, config.model.path) == ("hub:x/y", str(tmp_path / "m"))
    assert (config.data.test, config.run.root) == (os.path.expanduser("~/t.csv"), str(tmp_path / "deep/runs"))


def test_environment_references_stay_references(calls: Calls, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "canary")
    ftune_inside("train", "data.train=${oc.env:WHERE}/x.csv", "run.name=${data.train}", "train.seed=${oc.decode:${oc.env:NOT_SET,7}}").ok()
    config, invocation = calls[0]
    assert config.data.train.endswith("canary/x.csv") and config.train.seed == 7
    assert "canary" not in invocation.config_yaml and "${oc.env:WHERE}/x.csv" in invocation.config_yaml


def test_flags_anywhere(calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    assert "seed: 3" in ftune_inside("train", "train.seed=3", "--cfg", "job", "data.train=x", "-p", "train").ok().out
    assert "seed: 3" in ftune_inside("train", "-p=train", "train.seed=3", "--cfg=job").ok().out
    assert "minilm" in ftune_inside("train", "--info", "defaults-tree", "train.seed=3").ok().out
    assert ftune_inside("train", "--info", "train.seed=3").ok().out
    assert not calls
    assert "unknown key" in ftune_inside("train", "--cfg", "job", "optimizer.lrr=1").fails()[0]


def test_nothing_of_the_process_is_left_changed(calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    before = (sys.argv[:], os.getcwd(), logging.getLogger().handlers[:], logging.getLogger().level, "HYDRA_FULL_ERROR" in os.environ)
    ftune_inside("train", "data.train=x").ok()
    ftune_inside("train", "nope=1").fails()
    assert before == (
        sys.argv[:],
        os.getcwd(),
        logging.getLogger().handlers[:],
        logging.getLogger().level,
        "HYDRA_FULL_ERROR" in os.environ,
    )


@pytest.mark.parametrize(("end", "code"), [("bug", 1), ("user", 2), ("diverged", 4), ("interrupted", 130)])
def test_exit_codes_of_a_verb(end: str, code: int, calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside("train", "data.train=x", f"run.name={end}")
    assert ran.out == "" and ran.err.count("\n") <= 3
    ran.fails(code)


# runs by name -----------------------------------------------------------------------------------------------------------------


def test_a_run_brings_its_task_and_data(
    saved_run: Callable[..., Path], calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path
) -> None:
    run = saved_run("a", "data.text=body", "device=cuda", "data.max_length=64", "task.threshold=0.4")
    for args in (["eval", "a"], ["eval", f"ckpt={run}"], ["predict", "a", "input=-"]):
        ftune_inside(*args).ok()
        config, invocation = calls.pop()
        assert (config.data.text, config.data.max_length, config.task.threshold) == ("body", 64, 0.4)
        assert config.data.train == str(tmp_path / "my.csv") and config.ckpt == str(run)
        assert config.device.name.value == "auto" and "data.text" not in invocation.user_set
    ftune_inside("eval", "a", "data.test=new.csv", "device=cpu", "data.max_length=32").ok()
    config, invocation = calls.pop()
    assert (config.data.test, config.device.name.value, config.data.max_length) == (str(tmp_path / "new.csv"), "cpu", 32)
    assert {"data.test", "data.max_length"} <= invocation.user_set


def test_a_group_replaces_what_the_run_brings(saved_run: Callable[..., Path], calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    saved_run("a", "data.text=body", "data.max_length=64", "task.threshold=0.4")
    ftune_inside("eval", "a", "data=reviews").ok()
    assert (calls[-1][0].data.text, calls[-1][0].data.max_length) == ("text", None)
    ftune_inside("eval", "a", "task=text-regression").ok()
    assert calls[-1][0].task.name == "text-regression"


@pytest.mark.parametrize("name", ["sp with spaces=and,commas it's ü [x]", "2024", "a=b", "ckpt", "null", "runs/x=1,y=2"])
def test_any_directory_name_is_a_run(name: str, saved_run: Callable[..., Path], calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    run = saved_run(name)
    ftune_inside("eval", f"ckpt=./{name}").ok()
    ftune_inside("eval", f"./{name}").ok()
    if name != "null":
        ftune_inside("eval", f"ckpt={name}").ok()
    assert {str(config.ckpt) for config, _ in calls} == {str(run)}


def test_keys_of_another_version_are_dropped(
    saved_run: Callable[..., Path], calls: Calls, ftune: Callable[..., Ran], ftune_inside: Callable[..., Ran]
) -> None:
    run = saved_run("a")
    text = (run / "config.yaml").read_text().replace("data:\n", "data:\n  of_old: 1\n")
    (run / "config.yaml").write_text(text + "gone:\n  too: 2\n")
    ftune_inside("eval", "a").ok()
    assert "unknown key" not in ftune("eval", "a", "data.tets=1", fresh=True).err.replace("unknown key 'data.tets'", "")
    (run / "config.yaml").write_text("{")
    assert "cannot be read" in ftune_inside("eval", "a").fails()[0]


def test_a_plain_model_directory(calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    for name, labels, task in [("c", {"0": "a", "1": "b"}, "text-classification"), ("r", {"0": "x"}, "text-regression")]:
        (tmp_path / name).mkdir()
        head = {"architectures": ["BertForSequenceClassification"], "id2label": labels}
        (tmp_path / name / "config.json").write_text(json.dumps(head))
        ftune_inside("eval", name, "data.test=t.csv").ok()
        assert calls[-1][0].task.name == task
    for head, task in [("BertForMaskedLM", "fill-mask"), ("T5ForConditionalGeneration", "text2text-generation")]:
        (tmp_path / "r" / "config.json").write_text(json.dumps({"architectures": [head]}))
        ftune_inside("predict", "r", "input=t.txt").ok()
        assert calls[-1][0].task.name == task
    ftune_inside("eval", "r", "data.test=t.csv", "task=text-classification").ok()
    assert calls[-1][0].task.name == "text-classification"


def test_resume_starts_from_the_saved_config(saved_run: Callable[..., Path], calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    run = saved_run("a", "optimizer=sgd", "train.seed=7", "model=tiny", "model.shape.layers=1", "data.label=${oc.env:NOT_SET,kind}")
    for name in ("a", "a/checkpoints/step-00000001"):
        ftune_inside("train", f"resume={name}", "train.epochs=9").ok()
        config, invocation = calls.pop()
        assert (config.optimizer.name.value, config.train.seed, config.train.epochs) == ("sgd", 7, 9.0)
        assert config.model.path is None and config.model.shape["layers"] == 1 and config.data.label == "kind"
        assert invocation.user_set == {"train.epochs"}
        assert "label: ${oc.env:NOT_SET,kind}" in invocation.config_yaml
    ftune_inside("train", f"resume={run}", "optimizer=adamw").ok()
    assert calls.pop()[0].optimizer.name.value == "adamw"
    ftune_inside("train", "resume=auto", "run.dir=a", "data.train=x").ok()
    assert calls.pop()[0].train.seed == 42


# sweeps -----------------------------------------------------------------------------------------------------------------------


def test_a_command_is_composed_once(
    calls: Calls, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A tenth of a second each time; what Hydra runs is what was judged."""
    lines = []
    compose = ConfigLoaderImpl._load_configuration_impl
    caplog.set_level(logging.WARNING, "hydra")  # else Hydra composes for its own debug lines
    monkeypatch.setattr(
        ConfigLoaderImpl, "_load_configuration_impl", lambda self, *given, **named: (lines.append(given), compose(self, *given, **named))[1]
    )
    ftune_inside("train", "data.train=my.csv", "train.seed=3").ok()
    assert len(lines) == 1 and calls[0][0].train.seed == 3


def test_a_sweep(calls: Calls, ftune_inside: Callable[..., Ran], tmp_path: Path) -> None:
    ran = ftune_inside("train", "train.epochs=3", "-m", "train.seed=1,2", "data.train=x", "model=tiny,minilm").ok()
    assert len(ran.lines) == 4 and all(invocation.multirun for _, invocation in calls)
    assert [(c.train.seed, c.model.path) for c, _ in calls] == [(1, None), (1, "minilm"), (2, None), (2, "minilm")]
    for number, (config, invocation) in enumerate(calls):
        folder = Path(str(invocation.sweep_dir))
        assert folder.name == str(number) and folder.parent.parent == tmp_path / "runs" / "sweeps"
        assert config.run.dir == invocation.sweep_dir and f"dir: {invocation.sweep_dir}" in invocation.config_yaml
        assert "run.dir" not in invocation.user_set
    assert not [*tmp_path.iterdir()], "jobs that left nothing leave no directory"


def test_a_failing_job_does_not_end_the_sweep(calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside("train", "data.train=x", "-m", "run.name=diverged,bug,fine", "hydra.sweeper.max_batch_size=1")
    assert ran.code == 4 and len(calls) == 3 and len(ran.lines) == 1
    assert ran.err.count("error: ") == 2
    ran = ftune_inside("train", "data.train=x", "-m", "run.name=interrupted,fine")
    assert ran.code == 130 and len(calls) == 4


def test_a_sweep_over_runs(saved_run: Callable[..., Path], calls: Calls, ftune_inside: Callable[..., Ran]) -> None:
    saved_run("a", "data.text=one")
    saved_run("b", "data.text=two")
    ftune_inside("eval", "-m", "ckpt=a,b").ok()
    assert [config.data.text for config, _ in calls] == ["one", "two"]


def test_a_sweep_under_torchrun_is_refused(calls: Calls, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in ftune_inside("train", "-m", "data.train=x").fails()[0]
    monkeypatch.setenv("RANK", "1")
    ran = ftune_inside("train", "optimizer.lrr=1")
    assert (ran.code, ran.err) == (2, ""), "one rank speaks"


def test_a_job_can_be_sent_to_another_process() -> None:
    """A launcher's worker only unpickles the job: that must connect the saved runs there."""
    from finetune_cli.cli import jobs
    from finetune_cli.config.compose import read_line
    from finetune_cli.tasks import task_configs

    _, place = read_line("eval", ["A"], task_configs())
    sent = pickle.dumps(jobs.Job(place, "fake_verb", ("eval", "A"), debug=False))
    code = "import pickle, sys; job = pickle.loads(sys.stdin.buffer.read()); from finetune_cli.config.saved_run import SavedRun\n"
    code += "assert SavedRun.find and SavedRun.tasks() and SavedRun.recognise({}); print(job.place.verb)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=sent, capture_output=True, timeout=60, check=True, cwd=Path(cli.__file__).parents[2]
    )
    assert done.stdout == b"eval\n"


def test_a_broken_hydra_plugin_is_named(ftune: Callable[..., Ran], tmp_path: Path) -> None:
    folder = tmp_path / "installed" / "hydra_plugins" / "old"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ValueError('mutable default')")
    path = f"{Path(cli.__file__).parents[2]}{os.pathsep}{tmp_path / 'installed'}"
    told = ftune("train", "data.train=x", env={"PYTHONPATH": path}, fresh=True).fails()
    assert "mutable default" in told[0] and "uninstall" in told[2]


# shells -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("ftune ", "train check eval predict replay"),
        ("ftune tr", "train"),
        ("ftune train model=", "model=minilm model=tiny"),
        ("ftune train +exp=st", "+exp=stars"),
        ("ftune train optimizer.l", "optimizer.lr="),
        ("ftune eval ckpt=nope d", ""),
        ("ftune nope d", ""),
    ],
)
def test_completion(line: str, answer: str, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    ran = ftune_inside("-sc", "query=bash")
    assert ran.out.strip() == answer or answer == "" and "error" not in ran.out + ran.err
    assert ran.err == ""


def test_completion_offers_runs(saved_run: Callable[..., Path], ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    saved_run("runs/a")
    monkeypatch.setenv("COMP_LINE", "ftune eval ckpt=")
    assert ftune_inside("-sc", "query=bash").out.strip() == "ckpt=runs/a"
    assert "complete" in ftune_inside("-sc", "install=bash").ok().out


def started(tmp_path: Path) -> subprocess.Popen[str]:
    """A train that has reached its verb, which sleeps."""
    (tmp_path / "sleeper.py").write_text(FAKE_VERB)
    code = "from finetune_cli import cli; cli.VERBS['train'] = cli.VERBS['train']._replace(module='sleeper'); cli.entry()"
    root = str(Path(cli.__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", "data.train=x"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"},
    )
    assert process.stderr is not None and process.stderr.readline() == "begun\n"
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGHUP", 75), ("SIGUSR1", 75)])
def test_signals(number: str, code: int, tmp_path: Path) -> None:
    process = started(tmp_path)
    process.send_signal(getattr(signal, number))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune_cli", "train", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(cli.__file__).parents[2],
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None and process.stderr.read() == b""
    assert process.wait(timeout=20) == 141


def test_a_config_error_is_quick(ftune: Callable[..., Ran]) -> None:
    """The goal is 0.3 s on a quiet machine; the bound here only catches a heavy import."""
    best = 9.0
    for _ in range(2):
        began = time.perf_counter()
        ftune("train", "optimizer.lrr=1", fresh=True).fails()
        best = min(best, time.perf_counter() - began)
    assert best < 3

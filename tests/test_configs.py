"""The schema, the shipped YAML, the judge of a config, and its saved form."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from ran import Ran

from finetune_cli.cli import jobs
from finetune_cli.config import SCHEMAS, TrainConfig, saved
from finetune_cli.config.compose import Composed, compose, composer, read_line, register
from finetune_cli.config.files import configs_dir, groups_in, read_lines
from finetune_cli.config.forms import FORMS, convert
from finetune_cli.config.help import meanings, options_table
from finetune_cli.config.judge import SECRET_KEY, judge, together
from finetune_cli.config.options import Option, options, options_of, plain
from finetune_cli.config.paths import absolute
from finetune_cli.config.schema import condition_parts
from finetune_cli.errors import UserError
from finetune_cli.tasks import task_configs

TASKS = task_configs()
FILES = sorted(configs_dir().rglob("*.yaml"))
GROUPS = groups_in([configs_dir()])
CHOICES = [(group, choice) for group, choices in GROUPS.items() for choice in choices]
assert jobs.start is not None, "importing it connects the saved runs"


def composed(*arguments: str, verb: str = "train") -> Composed:
    line, place = read_line(verb, list(arguments), TASKS)
    register(place, TASKS)
    with composer(place) as hydra:
        found, problems = compose(hydra, place, line.overrides, TASKS)
    assert found is not None, [*line.problems, *problems]
    return found


def judged(values: dict[str, Any], **more: Any) -> tuple[Any, str]:
    """The config, and all that is said against it."""
    config, problems = judge(TrainConfig, {"task": {"name": "text-classification"}, "data": {"train": "x"}} | values, tasks=TASKS, **more)
    return config, "\n".join(together(problems).lines()) if problems else ""


# the schema -------------------------------------------------------------------------------------------------------------------


def every_option() -> Iterator[tuple[str, Option]]:
    for verb in SCHEMAS:
        for option in options_of(verb, TASKS).values():
            yield verb, option


def test_every_option_has_its_help_and_a_lawful_default() -> None:
    for verb, schema in SCHEMAS.items():
        for task in TASKS.values():
            texts = meanings(schema) | meanings(task, "task.")
            table = options(schema, task=task)
            for key, option in table.items():
                assert texts[key].endswith((".", "?")), f"{verb}: {key} has no help"
                if option.default not in ("???", None):
                    assert convert(plain(option.default), option) == option.default


def test_what_options_say_of_themselves_is_known() -> None:
    for table in (options(schema, task=task) for schema in SCHEMAS.values() for task in TASKS.values()):
        for option in table.values():
            assert not option.form or option.form in FORMS, option.key
            assert not SECRET_KEY.search(option.key), option.key
            condition = option.metadata.get("applies", "")
            if condition:
                key, _, values = condition_parts(condition)
                if key not in table:
                    assert option.metadata["training"], option.key  # what decides belongs to train, and so does the option
                    continue
                other = table[key]
                if isinstance(other.kind, type) and issubclass(other.kind, Enum):
                    assert set(values.split("|")) <= {str(member.value) for member in other.kind}, option.key


def test_the_table_of_options_has_every_key_once_for_each_meaning() -> None:
    lines = options_table(TASKS).splitlines()
    keys = [(line.split("`")[1], line.split(" | ")[4].split(" [")[0]) for line in lines[2:]]
    assert len(set(keys)) == len(keys) and {key for key, _ in keys} == {option.key for _, option in every_option()}
    assert all(key.startswith("task.") for key in {key for key, _ in keys} if sum(other == key for other, _ in keys) > 1)
    assert all(line.count("|") - line.count("\\|") == 6 for line in lines)


# the shipped YAML -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(configs_dir())))
def test_every_file_says_what_it_is(path: Path) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    if path.parent.name == "exp":
        assert first == "# @package _global_" and rest[0].startswith("# ")
    elif path.parent.name != "device":
        assert first.startswith("# ")


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["/".join(pair) for pair in CHOICES])
def test_every_choice_composes_and_comes_back(group: str, choice: str, tmp_path: Path) -> None:
    typed = [f"+exp={choice}"] if group == "exp" else [f"{group}={choice}", *(["data.train=x"] if group != "data" else [])]
    found = composed(*typed)
    assert found.experiment == (choice if group == "exp" else None)
    (tmp_path / "config.yaml").write_text(found.config_yaml, encoding="utf-8")
    assert saved.load(tmp_path / "config.yaml", tasks=TASKS) == found.config


@pytest.mark.parametrize("name", GROUPS["exp"])
def test_what_trains_is_checked(name: str) -> None:
    """``check`` takes every experiment that ``train`` does, also what is fixed in training."""
    trained, checked = composed(f"+exp={name}"), composed(f"+exp={name}", verb="check")
    assert checked.config.train_config() == trained.config and checked.user_set == trained.user_set


def test_what_is_fixed_in_training_can_be_checked_and_no_more_changed() -> None:
    fixed = [key for key, option in options_of("train", TASKS).items() if option.metadata.get("training")]
    values = {"task": {"name": "text-classification"}, "data": {"train": "x"}, "ckpt": "run"}
    for verb, schema in SCHEMAS.items():
        table = options(schema, task=TASKS["text-classification"])
        kept = {key: values[key] for key in {name.split(".")[0] for name in table} & values.keys()}
        problems = judge(schema, kept, tasks=TASKS, user_set=fixed)[1]
        told = {problem.what.split()[0] for problem in problems if "fixed in training" in problem.what}
        assert told == (set() if verb in ("train", "check") else table.keys() & set(fixed)), verb


@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] != "exp"], ids=lambda text: str(text))
def test_a_group_sets_only_what_applies(group: str, choice: str) -> None:
    """What a group's file sets must apply with that choice, or the user could not choose it."""
    path = configs_dir() / group / f"{choice}.yaml"
    keys = set(read_lines(path, group, True).lines)
    config, told = judged(plain(composed(f"{group}={choice}", "data.train=x").config), user_set=keys)
    assert config is not None, told
    assert keys - {group} <= {key for key in options_of("train", TASKS)} | {f"model.shape.{name}" for name in config.model.shape}


def test_optimizers_and_devices_have_a_file_each() -> None:
    table = options_of("train", TASKS)
    for key in ("optimizer.name", "device.name"):
        assert {str(member.value) for member in table[key].kind} == set(GROUPS[key.split(".")[0]])


def test_the_defaults_name_a_model_and_no_data() -> None:
    config = composed("data.train=x").config
    assert (config.model.path, config.optimizer.name.value, config.device.name.value) == ("minilm", "adamw", "auto")
    assert config == composed("data.train=x", "model=minilm", "optimizer=adamw", "device=auto", "task=text-classification").config


# own YAML ---------------------------------------------------------------------------------------------------------------------


def own(folder: Path, text: str, name: str = "mine") -> None:
    (folder / "my" / "exp").mkdir(parents=True, exist_ok=True)
    (folder / "my" / "exp" / f"{name}.yaml").write_text(text, encoding="utf-8")


HEAD = "# @package _global_\n"
OWN_MISTAKES = [
    (HEAD + "data: {train: x}\noptimizer:\n  lrr: 3\n", "unknown key 'optimizer.lrr'", "mine.yaml:4", "optimizer.lr"),
    (HEAD + "data: {train: x}\noptimizer:\n\n  lr: abc\n", "expected a number", "mine.yaml:5", ""),
    (HEAD + "data: {train: x}\noptimizer:\n  momentum: 0.9\n", "does not apply", "mine.yaml:4", "optimizer.name"),
    (HEAD + "data:\n  train: x\n  train: y\n", "duplicate key", "mine.yaml:4", ""),
    (HEAD + "data: {train: x\n", "not valid YAML", "mine.yaml:3", ""),
    (HEAD + "defaults:\n  - override /model: tinny\ndata: {train: x}\n", "no model 'tinny'", "mine.yaml:3", "model=tiny"),
    (HEAD + "defaults:\n  - override model: tiny\ndata: {train: x}\n", "no config group", "mine.yaml", "slash"),
    ("data: {train: x}\n", "exp.data.train", "mine.yaml:1", "@package _global_"),
    (HEAD + "data: {train: x}\nhub:\n  token: abcdefg\n", "secret", "mine.yaml:4", "environment"),
    (HEAD + "data: {train: x}\nhydra:\n  callbacks:\n    a:\n      _target_: os.system\n", "_target_", "mine.yaml:6", ""),
    (HEAD + "data: {train: x}\nhydra:\n  run:\n    dir: foo\n", "hydra.run is not Hydra's", "mine.yaml:4", "run.dir=DIRECTORY"),
    (HEAD + "data: {train: x}\nhydra:\n  output_subdir: foo\n", "hydra.output_subdir", "mine.yaml:4", "leave it out"),
    (HEAD + "data: {train: x}\nexpect: {accuracy: {_target_: os.system}}\n", "_target_", "mine.yaml:3", ""),
    (HEAD + "data: {train: x}\nresume: runs/a\n", "only the command line", "mine.yaml:3", "resume=RUN"),
    (HEAD + "data: {train: '${oc.env:NOPE_X}'}\n", "NOPE_X", "mine.yaml:2", "export"),
    (HEAD + "data: {train: x}\ndata.label: y\n", "a dot does not nest", "mine.yaml:3", "data: {label: ...}"),
    (HEAD + "data: {train: x, columns: [no, yes]}\n", "expected text", "mine.yaml:2", ""),
    (HEAD + "data: {train: x}\ntrain: 3\n", "section", "mine.yaml:3", ""),
]


@pytest.mark.parametrize(("text", "what", "where", "fix"), OWN_MISTAKES, ids=[what for _, what, _, _ in OWN_MISTAKES])
def test_mistakes_in_own_yaml_have_a_file_and_line(text: str, what: str, where: str, fix: str, tmp_path: Path, ftune_inside: Any) -> None:
    own(tmp_path, text)
    ran = ftune_inside("train", "--config-dir", "my", "+exp=mine")
    told = ran.fails()
    assert what in told[0] and where in told[1] and fix in told[2]
    assert ran.out == "" and [path.name for path in tmp_path.iterdir()] == ["my"]


def test_own_yaml_that_is_not_utf8(tmp_path: Path, ftune_inside: Any) -> None:
    own(tmp_path, "")
    (tmp_path / "my" / "exp" / "mine.yaml").write_bytes(b"data: \xff\xfe")
    assert "UTF-8" in ftune_inside("train", "--config-dir", "my", "+exp=mine").fails()[0]


def test_a_byte_order_mark_hides_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own(tmp_path, "\ufeff" + HEAD + "data: {train: x}\ntrain: {epochs: 1}\n")
    assert composed("--config-dir", "my", "+exp=mine").config.train.epochs == 1.0


def test_no_count_is_without_end() -> None:
    tables = [options_of(verb, TASKS) for verb in SCHEMAS]
    endless = {o.key for table in tables for o in table.values() if o.kind is int and o.metadata.get("most") is None}
    assert not endless


def test_own_experiments_and_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    own(tmp_path, HEAD + "defaults:\n  - override /model: big\n  - override /data: reviews\ntrain: {epochs: 1}\n")
    (tmp_path / "my" / "model").mkdir()
    (tmp_path / "my" / "model" / "big.yaml").write_text("path: owner/big\ndropout: 0.2\n")
    found = composed("--config-dir", "my", "+exp=mine", "data.max_rows=5")
    assert (found.config.model.path, found.config.model.dropout, found.config.train.epochs) == ("owner/big", 0.2, 1.0)
    assert found.user_set == {"model.path", "model.dropout", "train.epochs", "data.max_rows"} and found.experiment == "mine"
    two = composed("--config-dir", "my", "+exp=[mine,smoke]")
    assert two.experiment == "mine+smoke" and two.config.train.batch_size == 16


def test_a_hidden_file_is_named(tmp_path: Path, ftune_inside: Any) -> None:
    own(tmp_path, HEAD + "data: {train: x}\ntrain: {seed: 5}\n", "sentiment")
    ran = ftune_inside("train", "--config-dir", "my", "+exp=sentiment", "--cfg", "job", "-p", "train.seed").ok()
    assert "hidden" in ran.err and ran.out.strip() == "42"
    ran = ftune_inside("train", "--config-path", "my", "+exp=sentiment", "--cfg", "job", "-p", "train.seed").ok()
    assert ran.err == "" and ran.out.strip() == "5"


# the judge --------------------------------------------------------------------------------------------------------------------


def test_the_judge_converts() -> None:
    config, told = judged({"optimizer": {"lr": "1e-3", "schedule": "cosine"}, "train": {"epochs": 2, "eval_every": 5.0, "steps": 1e3}})
    assert told == ""
    assert (config.optimizer.lr, config.optimizer.schedule.value) == (1e-3, "cosine")
    assert (config.train.epochs, config.train.eval_every, config.train.steps) == (2.0, 5, 1000)
    assert type(config.train.epochs) is float and type(config.train.steps) is int


def test_the_judge_counts_what_it_does_not_name() -> None:
    _, told = judged({f"nope{i}": i for i in range(9)})
    assert "and 4 more" in told and len(told.splitlines()) == 3


def test_conditions_bind_only_what_the_user_set() -> None:
    values = {"optimizer": {"name": "adamw", "momentum": 0.9}}
    assert judged(values)[1] == ""
    assert "does not apply" in judged(values, user_set={"optimizer.momentum"})[1]
    assert judged({"optimizer": {"name": "sgd", "momentum": 0.9}}, user_set={"optimizer.momentum"})[1] == ""


LEAVES: list[Any] = [None, True, -1, 0, 0.5, 7, 1e300, float("nan"), float("inf"), "", "x", "epoch", "???", "${a"]
LEAVES += [[], [1, "a"], {}, {"a": 1}, {"_x_": 2}]


def test_the_judge_never_breaks() -> None:
    """Random values and keys, over the whole schema: a config or problems, never an exception."""
    draw = random.Random(1)
    keys = [*options_of("train", TASKS), "data", "task", "nope", "data.nope", "task.name.x"]
    for _ in range(400):
        values: dict[str, Any] = {}
        for key in draw.sample(keys, 8):
            node, (*outer, last) = values, key.split(".")
            for name in outer:
                node = node.setdefault(name, {}) if isinstance(node.get(name, {}), dict) else {}
            node[last] = copy.deepcopy(draw.choice(LEAVES))
        config, problems = judge(TrainConfig, values, tasks=TASKS, user_set=set(keys))
        assert (config is None) == bool(problems)
        assert not problems or len(together(problems).lines()) <= 3


# the saved form ---------------------------------------------------------------------------------------------------------------


def test_saving_keeps_awkward_values(tmp_path: Path) -> None:
    config, _ = judged(
        {"data": {"train": ["${x}", "a: b", "é\n"], "text": "yes", "label": ["1_000", "12e4", "null", "~"], "delimiter": "\t"}}
    )
    path = tmp_path / "c.yaml"
    path.write_text(saved.dump(config), encoding="utf-8")
    assert saved.load(path, tasks=TASKS) == config
    assert path.read_text().startswith("# ftune ")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "a: 1", "task: {name: nope}", "task: {name: text-regression}\noptimizer: {lr: -1}", "\x00"]
)
def test_a_broken_saved_config_is_an_error_with_its_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        saved.load(path, tasks=TASKS)
    assert str(path) in caught.value.where


def test_which_values_are_paths(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    table = options_of("train", TASKS)
    paths = {
        "a.csv": True,
        "./x": True,
        "here": True,
        "d/*": True,
        "owner/name": False,
        "sst2": False,
        "corpus:a/b.jsonl": False,
        "hub:x": False,
    }
    for value, is_path in paths.items():
        assert (absolute(table["data.train"], value, tmp_path) != value) == is_path, value
    assert absolute(table["run.root"], "runs", tmp_path) == str(tmp_path / "runs")
    assert absolute(table["data.validation"], 0.1, tmp_path) == 0.1
    assert absolute(table["data.text"], "a.csv", tmp_path) == "a.csv"


@pytest.mark.parametrize(
    ("argument", "what", "where", "fix"),
    [
        ("expect.accuracy=about 0.5", "expect.accuracy is 'about 0.5'", "expect.accuracy=about 0.5", "'>=0.8'"),
        ("train.steps=2.5", "train.steps is 2.5", "train.steps=2.5", "an integer"),
        ("task.threshold=2", "task.threshold is 2", "task.threshold=2", "above 0 and below 1"),
        ("model.shape.layerz=2", "model.shape.layerz is 2", "model.shape.layerz=2", "model.shape.layers?"),
        ("~optimizer.lr", "always has a value", "~optimizer.lr", "optimizer.lr=VALUE"),
    ],
)
def test_a_wrong_value_is_told_with_its_own_key(
    argument: str, what: str, where: str, fix: str, ftune_inside: Callable[..., Ran], tmp_path: Path
) -> None:
    told = ftune_inside("train", "data.train=x.csv", "model=tiny", argument).fails()
    assert what in told[0] and where in told[1] and fix in told[2]


def test_one_wrong_number_is_one_problem(ftune_inside: Callable[..., Ran]) -> None:
    """A rate below nought is below its own end too, which is no second mistake."""
    told = ftune_inside("train", "data.train=x.csv", "model=tiny", "optimizer.lr=-1e-4").fails()
    assert told[1] == "where: command line: optimizer.lr=-1e-4" and "min_lr" not in told[0]

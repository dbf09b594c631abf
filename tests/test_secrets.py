"""Secrets of the environment and of addresses are told nowhere: not in a run, not in its log, report or crash file, not on the screen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ran import Ran, labelled_rows, write_rows

from finetune_cli.said import hide, names_secret, without_secrets

pytestmark = pytest.mark.sampled(5)

NAMES = (
    *("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY", "GITHUB_PAT", "PGPASSWORD", "MYSQL_PWD"),
    *("MY_SECRET", "azure_client_secret", "DB_PASSWORD", "SSH_PASSPHRASE", "GOOGLE_CREDENTIALS", "ftune.token", "NPM_TOKEN_FILE"),
)
SECRETS = {name: f"CANARY{number:02}x7Qz81LmPw" for number, name in enumerate(NAMES)}
SMALL = ["model=tiny", "model.shape.layers=1", "model.shape.hidden=32", "model.shape.heads=2", "train.steps=2", "device=cpu"]


@pytest.fixture
def where_secrets_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data and an experiment of the user's, in an environment full of tokens."""
    for name, value in {**SECRETS, "DATA_HOME": str(tmp_path / "data")}.items():
        monkeypatch.setenv(name, value)
    for name, count, shift in (("train", 40, 0), ("validation", 12, 40), ("test", 12, 60)):
        write_rows(tmp_path / "data" / f"{name}.csv", labelled_rows(count, shift=shift))
    (tmp_path / "mine" / "exp").mkdir(parents=True)
    files = "\n".join(f"  {name}: ${{oc.env:DATA_HOME}}/{name}.csv" for name in ("train", "validation", "test"))
    (tmp_path / "mine" / "exp" / "mine.yaml").write_text(f"# @package _global_\ndata:\n{files}\n")
    return tmp_path


MINE = ["train", "--config-dir", "mine", "+exp=mine", *SMALL, "run.dir=new"]


def told_in(folder: Path, *texts: str) -> list[str]:
    """Which secrets stand in a folder's files, their names, or these texts."""
    whole = b"".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file()) + "".join(texts).encode()
    assert len(whole) > 100
    return [name for name, value in SECRETS.items() if value.encode() in whole]


def test_a_run_holds_no_secret(where_secrets_are: Path, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside(*MINE).ok()
    assert told_in(where_secrets_are / "new", ran.out, ran.err) == []
    assert "${oc.env:DATA_HOME}/train.csv" in (where_secrets_are / "new" / "config.yaml").read_text()
    scored = ftune_inside("eval", "new", "split=validation").ok()
    assert told_in(where_secrets_are / "new", scored.out, scored.err) == []


@pytest.mark.parametrize("full", ["", "1"])
def test_a_crash_holds_no_secret(
    where_secrets_are: Path, ftune_inside: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """A bug whose message holds the whole environment, as messages of libraries do."""

    def fit(*_: object) -> None:
        raise RuntimeError(f"no access with {dict(os.environ)} at https://me:{SECRETS['DB_PASSWORD']}@example.org")

    monkeypatch.setattr("finetune_cli.commands.train.fit", fit)
    monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    ran = ftune_inside(*MINE)
    assert ran.code == 1 and "no access with" in (where_secrets_are / "new" / "error.txt").read_text()
    assert told_in(where_secrets_are / "new", ran.out, ran.err) == []


@pytest.mark.parametrize("key", ["data.train", "run.name", "train.epochs", "nowhere.at_all"])
@pytest.mark.parametrize("name", ["HF_TOKEN", "PGPASSWORD"])
def test_no_config_reads_a_secret(name: str, key: str, where_secrets_are: Path, ftune_inside: Callable[..., Ran]) -> None:
    section, _, leaf = key.partition(".")
    mine = where_secrets_are / "mine" / "exp" / "mine.yaml"
    mine.write_text(f"# @package _global_\n{section}:\n  {leaf}: ${{oc.env:{name}}}\n")
    for more in ([], ["--cfg", "job", "--resolve"]):
        ran = ftune_inside(*MINE, *more)
        assert ran.code == 2 and not [value for value in SECRETS.values() if value in ran.out + ran.err], ran.err
    assert not (where_secrets_are / "new").exists()


@pytest.mark.parametrize(
    "word",
    [
        "data.train=https://me:PASS@example.org/train.csv",
        "data.train=s3://PASS@bucket/train.csv",
        "data.train=https://example.org/train.csv?token=PASS&x=1",
        "data.test=https://example.org/train.csv?X-Amz-Signature=PASS&X-Amz-Security-Token=PASS",
        "api_key=PASS",
        "data.password=PASS",
        "model.path=hf_PASS",
        "run.name=sk-PASS",
    ],
)
def test_words_of_the_command_are_not_repeated(word: str, where_secrets_are: Path, ftune_inside: Callable[..., Ran]) -> None:
    ran = ftune_inside(*MINE, word.replace("PASS", "c4n4ryC4N4RYc4n4ry"))
    assert len(ran.fails(2)) == 3 and "c4n4ryC4N4RYc4n4ry" not in ran.err


def test_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
        assert value not in without_secrets(f"a {value} b")
    assert all(map(names_secret, NAMES)) and not any(map(names_secret, ("PWD", "HOME", "DATA_HOME", "TOKENIZERS_PARALLELISM", "KEYBOARD")))
    assert hide("wandb.api_key=abc") == "wandb.api_key=***" and hide("data.train=a/token=1.csv") == "data.train=a/token=1.csv"
    for text in ("the tokenizer=3, tokens: 12 of 40", "https://example.org/a?page=2&sort=name", "model.path=bert-base-cased", os.getcwd()):
        assert without_secrets(text) == text

"""Files from a stranger: each trap tries to run code, to leave its folder, to read or write what is not its own, or never to end.

A trap lays its files into a folder of its own and names the command that steps into it. Afterwards nothing has run (``canary`` is absent),
what lies outside is as it was, the secret is told nowhere, and the command ended by itself: in 0, in three lines with 2 (5: the machine).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Forks
from ran import Ran, labelled_rows, write_rows

from finetune_cli.storage import seal, sha256, unseal

pytestmark = pytest.mark.sampled(3)

SECRET = "SECRETCANARY0123456789"
"""What stands in the file ``outside/secret.txt`` and in the variable FTUNE_TEST_TOKEN."""
WALL_SECONDS, CPU_SECONDS = 120, 30
MEMORY = 12 << 30
"""Bytes of address space that a command may take: a bomb ends here and not in the machine."""
SMALL = [
    "model=tiny",
    "model.shape.layers=1",
    "model.shape.hidden=32",
    "model.shape.heads=2",
    "train.steps=2",
    "train.keep=9",
    "device=cpu",
]


@dataclass
class Ground:
    """Where a trap is laid: a folder with ``run/`` (a copy of a finished run), and ``outside/`` that must stay as it is."""

    folder: Path
    canary: Path
    outside: Path = field(init=False)
    secret: Path = field(init=False)

    def __post_init__(self) -> None:
        self.outside = self.folder / "outside"
        self.outside.mkdir()
        self.secret = self.outside / "secret.txt"
        self.secret.write_text(f"{SECRET}\n")

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def model(self) -> Path:
        return self.run / "model"

    @property
    def best(self) -> Path:
        return (self.run / "checkpoints" / "best").resolve()

    @property
    def code(self) -> str:
        """Python that betrays itself."""
        return f"import pathlib\npathlib.Path({str(self.canary)!r}).touch()\n"

    @property
    def pickled(self) -> bytes:
        """A pickle that betrays itself when it is read."""
        return pickle.dumps(Touching(self.canary))

    @property
    def torch_pickled(self) -> bytes:
        """The same in the form of ``torch.save``."""
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickled)
            archive.writestr("archive/version", "3\n")
            archive.writestr("archive/byteorder", "little")
        return whole.getvalue()

    def change(self, path: Path, **values: Any) -> None:
        """Change keys of a JSON file; a checkpoint around it is sealed anew."""
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        self.reseal(path.parent)

    def write(self, path: Path, content: bytes | str) -> None:
        """Write a file, in place of a link too; a checkpoint around it is sealed anew."""
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.reseal(path.parent)

    def link(self, path: Path, target: Path | str) -> None:
        """A link in place of a file or folder."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def pipe(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    def reseal(self, checkpoint: Path, **extra: Any) -> None:
        """As a stranger would: sizes and hashes that are right, and the seal over them."""
        manifest = checkpoint / "manifest.json"
        if manifest.is_symlink() or not manifest.is_file() or not checkpoint.name.startswith("step-"):
            return
        record = unseal(manifest.read_bytes())
        files = [file for file in sorted(checkpoint.iterdir()) if file.is_file() and file != manifest]
        record["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files} | extra
        manifest.write_bytes(seal(record))

    def unfinished(self) -> None:
        """As if the run had been preempted at its last step."""
        (self.run / "status.json").write_text('{"state": "preempted", "step": 2}')

    def config(self, old: str, new: str) -> None:
        """Change the saved config of the run and of its checkpoints."""
        for path in [self.run / "config.yaml", *self.run.glob("checkpoints/step-*/config.yaml")]:
            text = path.read_text()
            assert old in text, (old, text)
            self.write(path, text.replace(old, new, 1))


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return open, (self.canary, "w")


Lay = Callable[[Ground], list[str]]
TRAPS: dict[str, tuple[str, Lay, dict[str, Any]]] = {}
"""Name to the kind of run that is copied, what lays the trap, and how the command must end."""


def trap(kind: str = "", **expected: Any) -> Callable[[Lay], Lay]:
    """A row of the table. ``code``: its exit code where just one is right; ``says``: words of stderr; ``fresh``: not in a fork."""

    def note(lay: Lay) -> Lay:
        TRAPS[lay.__name__] = (kind, lay, expected)
        return lay

    return note


EVAL, PREDICT, RESUME = ["eval", "run", "device=cpu"], ["predict", "run", "input=texts.txt", "device=cpu"], ["train", "resume=run"]
MODEL = ["predict", "run/model", "input=texts.txt", "device=cpu"]
START = ["train", "model.path=run/model", "data.train=train.csv", "train.steps=1", "device=cpu", "run.dir=new"]


# weights ----------------------------------------------------------------------------------------------------------------------------


@trap("run", code=2, says="safetensors")
def pickled_weights_beside_a_model(g: Ground) -> list[str]:
    (g.model / "model.safetensors").unlink()
    (g.model / "pytorch_model.bin").write_bytes(g.torch_pickled)
    return MODEL


@trap("run", code=2, says="pickled_weights=true")
def pickled_weights_to_start_from(g: Ground) -> list[str]:
    (g.model / "model.safetensors").unlink()
    (g.model / "pytorch_model.bin").write_bytes(g.torch_pickled)
    return START


@trap("run", code=2)
def pickled_weights_that_were_asked_for(g: Ground) -> list[str]:
    (g.model / "model.safetensors").unlink()
    (g.model / "pytorch_model.bin").write_bytes(g.torch_pickled)
    return [*START, "model.pickled_weights=true"]


@trap("run", code=2)
def an_old_pickle_that_was_asked_for(g: Ground) -> list[str]:
    (g.model / "model.safetensors").unlink()
    (g.model / "pytorch_model.bin").write_bytes(g.pickled)
    return [*START, "model.pickled_weights=true"]


@trap("run", code=2)
def a_pickle_named_safetensors(g: Ground) -> list[str]:
    (g.model / "task.json").unlink()
    g.write(g.model / "model.safetensors", g.torch_pickled)
    return START


@trap("run", code=2)
def a_pickle_as_weights_of_a_checkpoint(g: Ground) -> list[str]:
    g.write(g.best / "model.safetensors", g.torch_pickled)
    return EVAL


@trap("run", code=2)
def a_pickle_as_resume_state(g: Ground) -> list[str]:
    g.unfinished()
    g.write(g.best / "state.safetensors", g.pickled)
    return RESUME


@trap("run", code=0)
def pickles_that_other_trainers_read(g: Ground) -> list[str]:
    for folder in (g.best, g.model, g.run):
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "random_states_0.pkl", ".metadata", "data.pkl"):
            (folder / name).write_bytes(g.torch_pickled)
    (g.model / "training_args.bin").write_bytes(g.torch_pickled)
    return EVAL


@trap("run", code=2, says="not in its manifest")
def a_pickle_beside_the_weights(g: Ground) -> list[str]:
    (g.best / "pytorch_model.bin").write_bytes(g.torch_pickled)
    return EVAL


@trap("lora", code=2)
def a_pickle_as_adapter(g: Ground) -> list[str]:
    (g.best / "adapter_model.safetensors").unlink()
    g.write(g.best / "adapter_model.bin", g.torch_pickled)
    return EVAL


@trap("run", code=2)
def an_index_of_shards_outside(g: Ground) -> list[str]:
    names = ["bert.embeddings.word_embeddings.weight", "classifier.bias"]
    shutil.move(g.model / "model.safetensors", g.outside / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../../outside/shard.safetensors")}
    (g.model / "model.safetensors.index.json").write_text(json.dumps(index))
    return MODEL


@trap("run", code=2)
def an_index_of_pickled_shards(g: Ground) -> list[str]:
    (g.model / "model.safetensors").unlink()
    (g.model / "shard.bin").write_bytes(g.torch_pickled)
    (g.model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"classifier.bias": "shard.bin"}}))
    return START


@trap("run", code=2)
def a_header_of_an_exabyte(g: Ground) -> list[str]:
    g.write(g.best / "model.safetensors", struct.pack("<Q", 1 << 60) + b"{}")
    return EVAL


@trap("run", code=2)
def a_header_nested_without_end(g: Ground) -> list[str]:
    header = b'{"a":' * 200_000
    g.write(g.best / "model.safetensors", struct.pack("<Q", len(header)) + header)
    return EVAL


@trap("run", code=2)
def a_tensor_of_a_petabyte(g: Ground) -> list[str]:
    header = json.dumps({"classifier.bias": {"dtype": "F32", "shape": [1 << 48], "data_offsets": [0, 1 << 50]}}).encode()
    g.write(g.best / "model.safetensors", struct.pack("<Q", len(header)) + header)
    return EVAL


@trap("run", code=2)
def weights_that_link_to_a_secret(g: Ground) -> list[str]:
    g.link(g.best / "model.safetensors", g.secret)
    g.reseal(g.best)
    return EVAL


@trap("run", code=2)
def a_models_weights_that_link_to_a_secret(g: Ground) -> list[str]:
    (g.model / "task.json").unlink()
    g.link(g.model / "model.safetensors", g.secret)
    return MODEL


@trap("run", code=2)
def weights_that_are_a_pipe(g: Ground) -> list[str]:
    g.pipe(g.model / "model.safetensors")
    return MODEL


@trap("run", code=2)
def weights_without_end(g: Ground) -> list[str]:
    g.link(g.model / "model.safetensors", "/dev/zero")
    return MODEL


@trap("run", code=2)
def a_config_without_end(g: Ground) -> list[str]:
    g.link(g.model / "config.json", "/dev/zero")
    return MODEL


# code that a model brings --------------------------------------------------------------------------------------------------------------


def with_own_code(g: Ground, folder: Path) -> None:
    """Python files under every name that somebody may look for."""
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "evil", "generate", "handler", "tokenizer", "__init__"):
        (folder / f"{name}.py").write_text(g.code)
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(g.code)


MAP = {
    "AutoConfig": "configuration_evil.Evil",
    "AutoModel": "modeling_evil.Evil",
    "AutoModelForSequenceClassification": "modeling_evil.Evil",
    "AutoModelForCausalLM": "modeling_evil.Evil",
    "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
}


@trap("run")
def a_known_architecture_with_code_of_its_own(g: Ground) -> list[str]:
    with_own_code(g, g.model)
    g.change(g.model / "config.json", auto_map=MAP)
    return MODEL


@trap("run", code=2, says="its own code")
def an_architecture_that_is_code(g: Ground) -> list[str]:
    with_own_code(g, g.model)
    g.change(g.model / "config.json", auto_map=MAP, model_type="evil", architectures=["Evil"])
    return MODEL


@trap("run", code=2)
def a_model_class_that_is_code_in_a_checkpoint(g: Ground) -> list[str]:
    with_own_code(g, g.best)
    g.change(g.best / "config.json", auto_map=MAP, model_type="t5", architectures=["Evil"])
    return EVAL


@trap("run", code=2)
def a_class_that_only_code_has(g: Ground) -> list[str]:
    """An architecture that transformers knows, but not for this task: it would ask on the terminal whether the code may run."""
    with_own_code(g, g.model)
    (g.model / "task.json").unlink()
    g.change(g.model / "config.json", auto_map=MAP, model_type="clip", architectures=["Evil"])
    return MODEL


@trap("run")
def a_tokenizer_with_code_of_its_own(g: Ground) -> list[str]:
    with_own_code(g, g.model)
    g.change(g.model / "tokenizer_config.json", auto_map=MAP, tokenizer_class="Evil")
    return MODEL


@trap("run")
def a_checkpoints_tokenizer_with_code(g: Ground) -> list[str]:
    with_own_code(g, g.best)
    g.change(g.best / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil")
    return EVAL


@trap("chat", code=0)
def writing_by_code_of_its_own(g: Ground) -> list[str]:
    with_own_code(g, g.best)
    g.reseal(g.best)
    return PREDICT


@trap("run", code=2)
def an_attention_from_the_hub(g: Ground) -> list[str]:
    g.change(g.best / "config.json", _attn_implementation="stranger/kernel", attn_implementation="stranger/kernel")
    return EVAL


@trap("run", code=2)
def attention_by_a_packaged_kernel(g: Ground) -> list[str]:
    g.change(g.model / "config.json", attn_implementation="kernels-community/flash-attn2")
    return MODEL


@trap("run", code=2)
def weights_quantised_by_a_stranger(g: Ground) -> list[str]:
    method = {"quant_method": "torchao", "quant_type": {"default": {"_type": "evil", "_data": {}}}, "modules_to_not_convert": None}
    g.change(g.best / "config.json", quantization_config=method)
    return EVAL


@trap("run", code=2)
def weights_quantised_by_no_one(g: Ground) -> list[str]:
    g.change(g.model / "config.json", quantization_config={"quant_method": "evil", "load_in_4bit": True})
    return MODEL


@trap("run")
def a_type_that_is_a_function(g: Ground) -> list[str]:
    g.change(g.best / "config.json", dtype="load", torch_dtype="hub.load")
    return EVAL


@trap("run", code=2)
def a_config_nested_without_end(g: Ground) -> list[str]:
    (g.model / "config.json").write_text('{"model_type": "bert", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    return MODEL


@trap("run", code=2)
def a_billion_layers(g: Ground) -> list[str]:
    g.change(g.best / "config.json", num_hidden_layers=1_000_000_000)
    return EVAL


@trap("run", code=2)
def a_billion_layers_to_start_from(g: Ground) -> list[str]:
    g.change(g.model / "config.json", num_hidden_layers=1_000_000_000)
    return START


@trap("run")
def a_vocabulary_of_a_trillion(g: Ground) -> list[str]:
    g.change(g.best / "config.json", vocab_size=1_000_000_000_000)
    return EVAL


@trap("run")
def numbers_that_are_texts(g: Ground) -> list[str]:
    g.change(g.best / "config.json", hidden_size="__import__('os')", num_attention_heads=[1], pad_token_id="x")
    return EVAL


@trap("run")
def labels_by_the_million(g: Ground) -> list[str]:
    g.change(g.best / "config.json", id2label={str(i): "x" for i in range(300_000)}, label2id={"x": -1})
    return EVAL


# tokenizers ----------------------------------------------------------------------------------------------------------------------------


@trap("run")
def a_tokenizer_that_names_files_outside(g: Ground) -> list[str]:
    paths = dict.fromkeys(("vocab_file", "tokenizer_file", "merges_file", "spm_file", "chat_template_file"), str(g.secret))
    g.change(g.best / "tokenizer_config.json", **paths, name_or_path=str(g.outside), special_tokens_map_file=str(g.secret))
    return PREDICT


@trap("run", code=2)
def a_tokenizer_that_links_to_a_secret(g: Ground) -> list[str]:
    g.link(g.model / "tokenizer.json", g.secret)
    return MODEL


@trap("run")
def a_tokenizer_that_is_a_pipe(g: Ground) -> list[str]:
    g.pipe(g.model / "tokenizer.json")
    return MODEL


@trap("run")
def a_regex_that_never_ends(g: Ground) -> list[str]:
    (g.folder / "texts.txt").write_text("a" * 40 + "!\n")
    slow = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    g.change(g.best / "tokenizer.json", pre_tokenizer=slow)
    return PREDICT


@trap("run")
def a_regex_that_never_ends_in_the_normaliser(g: Ground) -> list[str]:
    (g.folder / "texts.txt").write_text("a" * 40 + "!\n")
    g.change(g.best / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"Regex": "(a|aa|a?a)+$"}, "content": "b"})
    return PREDICT


@trap("run", code=2)
def an_added_token_beyond_the_weights(g: Ground) -> list[str]:
    path = g.best / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    token = {
        "id": 2_000_000_000,
        "content": "<x>",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    g.change(path, added_tokens=[*tokenizer["added_tokens"], token])
    return PREDICT


@trap("run", code=2)
def a_tokenizer_nested_without_end(g: Ground) -> list[str]:
    g.write(g.best / "tokenizer.json", '{"a":' * 100_000)
    return PREDICT


@trap("chat", code=2, says="template")
def a_template_that_reaches_for_python(g: Ground) -> list[str]:
    """In ``eval`` rows are conversations, which the template writes."""
    reach = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch ' ~ '" + str(g.canary) + "') }}"
    g.write(g.best / "chat_template.jinja", reach)
    return EVAL


@trap("chat", code=2, says="template")
def a_template_that_reads_a_file(g: Ground) -> list[str]:
    g.write(g.best / "chat_template.jinja", "{% include '" + str(g.secret) + "' %}{{ messages[0].content }}")
    return EVAL


@trap("chat", code=2, says="template")
def a_template_that_never_ends(g: Ground) -> list[str]:
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(6)) + "{% endfor %}" * 6
    g.write(g.best / "chat_template.jinja", loops + "{{ messages[0].content }}")
    return EVAL


@trap("chat")
def a_template_that_writes_for_ever(g: Ground) -> list[str]:
    g.write(g.best / "chat_template.jinja", "{{ 'a' * 99999999999999 }}{{ messages[0].content }}")
    return EVAL


@trap("chat")
def a_template_with_escapes(g: Ground) -> list[str]:
    g.write(g.best / "chat_template.jinja", "{{ raise_exception('\x1b]0;evil\x07\x1b[2J' ~ '\n\n\nerror: x\n') }}")
    return EVAL


@trap("chat")
def writing_without_end(g: Ground) -> list[str]:
    g.write(g.best / "generation_config.json", json.dumps({"max_new_tokens": 10**9, "min_new_tokens": 10**9, "num_beams": 10**6}))
    return PREDICT


@trap("chat")
def writing_by_a_strangers_cache(g: Ground) -> list[str]:
    odd = {"cache_implementation": "evil", "compile_config": {"backend": "evil"}, "prompt_lookup_num_tokens": 3, "assistant_early_exit": 1}
    g.write(g.best / "generation_config.json", json.dumps(odd))
    return PREDICT


# the saved config ----------------------------------------------------------------------------------------------------------------------


def touching(g: Ground) -> str:
    return f"{{_target_: pathlib.Path.touch, self: {{_target_: pathlib.Path, _args_: ['{g.canary}']}}}}"


@trap("run")
def a_saved_config_that_instantiates(g: Ground) -> list[str]:
    g.config("data:\n", f"data:\n  evil: {touching(g)}\n  _target_: os.system\n  _args_: ['touch {g.canary}']\n")
    return EVAL


@trap("run")
def a_saved_config_with_an_object_as_value(g: Ground) -> list[str]:
    g.config("  encoding: null\n", f"  encoding: {touching(g)}\n")
    return EVAL


@trap("run")
def a_resumed_config_that_instantiates(g: Ground) -> list[str]:
    g.unfinished()
    g.config("optimizer:\n", f"optimizer:\n  _target_: os.system\n  evil: {touching(g)}\n")
    return RESUME


@trap("run")
def a_saved_config_that_steers_hydra(g: Ground) -> list[str]:
    g.unfinished()
    hydra = (
        f"hydra:\n  searchpath: ['file://{g.outside}', 'pkg://evil']\n  launcher: {touching(g)}\n  sweeper: {touching(g)}\n"
        f"  job_logging: {{version: 1, handlers: {{x: {{(): os.system, command: 'touch {g.canary}'}}}}, root: {{handlers: [x]}}}}\n"
        f"  callbacks: {{evil: {touching(g)}}}\n  run: {{dir: '{g.outside}/new'}}\n"
    )
    text = f"defaults:\n  - override hydra/launcher: evil\n  - /{g.outside}/x\n" + hydra
    for path in [g.run / "config.yaml", *g.run.glob("checkpoints/step-*/config.yaml")]:
        g.write(path, text + path.read_text())
    return RESUME


@trap("run")
def the_same_before_eval(g: Ground) -> list[str]:
    a_saved_config_that_steers_hydra(g)
    return EVAL


@trap("run", code=2)
def yaml_that_makes_objects(g: Ground) -> list[str]:
    g.config("data:\n", f"data:\n  train: !!python/object/apply:os.system ['touch {g.canary}']\n")
    return EVAL


@trap("run", code=2)
def yaml_that_unfolds(g: Ground) -> list[str]:
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    g.config("data:\n", laughs + "data:\n")
    return EVAL


@trap("run", code=2)
def yaml_nested_without_end(g: Ground) -> list[str]:
    g.config("  encoding: null\n", "  encoding: " + "[" * 20_000 + "]" * 20_000 + "\n")
    return EVAL


@trap("run", code=2)
def a_secret_of_the_environment(g: Ground) -> list[str]:
    g.config(f"  test: {g.folder}/test.csv\n", "  test: ./${oc.env:FTUNE_TEST_TOKEN}.csv\n")
    return EVAL


@trap("run", code=2)
def a_secret_sent_to_the_hub(g: Ground) -> list[str]:
    g.config(f"  test: {g.folder}/test.csv\n", "  test: hub:stranger/${oc.env:FTUNE_TEST_TOKEN}\n")
    return EVAL


@trap("run", code=2)
def a_secret_in_a_wrong_value(g: Ground) -> list[str]:
    g.unfinished()
    g.config("  batch_size: 32\n", "  batch_size: ${oc.env:FTUNE_TEST_TOKEN}\n")
    return RESUME


@trap("run", code=2)
def a_secret_decoded(g: Ground) -> list[str]:
    g.config(f"  test: {g.folder}/test.csv\n", "  test: ${oc.decode:'[a,${oc.env:FTUNE_TEST_TOKEN}]'}\n")
    return EVAL


@trap("run", code=2)
def a_secret_by_a_detour(g: Ground) -> list[str]:
    g.config("  encoding: null\n", "  encoding: FTUNE_TEST_TOKEN\n")
    g.config(f"  test: {g.folder}/test.csv\n", "  test: ./${oc.env:${data.encoding}}\n")
    return EVAL


@trap("run")
def a_secret_file_as_data(g: Ground) -> list[str]:
    g.config(f"  test: {g.folder}/test.csv\n", f"  test: {g.secret}\n")
    return EVAL


@trap("run", code=2)
def a_saved_config_that_trusts_code(g: Ground) -> list[str]:
    """A run that was stopped before its first checkpoint begins from its model: code of which must be trusted by who resumes."""
    g.unfinished()
    shutil.rmtree(g.run / "checkpoints")
    with_own_code(g, g.model)
    g.change(g.model / "config.json", auto_map=MAP, model_type="evil")
    text = (g.run / "config.yaml").read_text()
    start, end = text.index("model:\n"), text.index("\n", text.index("trust_remote_code:"))
    model = f"model:\n  path: {g.model}\n  revision: {'0' * 40}\n  trust_remote_code: true"
    (g.run / "config.yaml").write_text(text[:start] + model + text[end:])
    return RESUME


@trap("run")
def a_run_that_says_it_lies_elsewhere(g: Ground) -> list[str]:
    g.unfinished()
    g.config("run:\n  root: ", f"run:\n  dir: {g.outside}/new\n  root: {g.outside}/")
    return RESUME


@trap("run", code=2)
def a_config_that_links_to_a_secret(g: Ground) -> list[str]:
    shutil.rmtree(g.run / "checkpoints")
    (g.model / "config.yaml").unlink(missing_ok=True)
    g.link(g.run / "config.yaml", g.secret)
    return EVAL


# checkpoints and links -----------------------------------------------------------------------------------------------------------------


@trap("run", code=2)
def a_manifest_that_names_a_file_outside(g: Ground) -> list[str]:
    entry = {"bytes": g.secret.stat().st_size, "sha256": sha256(g.secret)}
    g.reseal(g.best, **{"../../../outside/secret.txt": entry})
    return EVAL


@trap("run", code=2)
def a_manifest_that_names_an_absolute_file(g: Ground) -> list[str]:
    g.reseal(g.best, **{str(g.secret): {"bytes": g.secret.stat().st_size, "sha256": sha256(g.secret)}})
    return EVAL


@trap("run", code=2)
def a_manifest_with_escapes(g: Ground) -> list[str]:
    g.reseal(g.best, **{"\x1b]0;evil\x07\x1b[2Jerror: \n\n\nx": {"bytes": 1, "sha256": "0"}})
    return EVAL


@trap("run", code=2)
def a_manifest_of_other_types(g: Ground) -> list[str]:
    g.reseal(g.best, **{"config.json": ["bytes"], "task.json": None})
    return EVAL


@trap("run", code=2)
def a_manifest_that_is_a_pipe(g: Ground) -> list[str]:
    g.pipe(g.best / "manifest.json")
    return EVAL


@trap("run", code=2)
def a_manifest_without_end(g: Ground) -> list[str]:
    g.link(g.best / "manifest.json", "/dev/zero")
    return EVAL


@trap("run")
def best_points_outside(g: Ground) -> list[str]:
    shutil.copytree(g.best, g.outside / "step-00000002")
    g.link(g.run / "checkpoints" / "best", "../../outside/step-00000002")
    return EVAL


@trap("run")
def best_is_a_text_that_points_outside(g: Ground) -> list[str]:
    best = g.run / "checkpoints" / "best"
    best.unlink()
    best.write_text("../../outside/\x1b[2J\n")
    return EVAL


@trap("run")
def a_checkpoint_that_is_a_link(g: Ground) -> list[str]:
    g.unfinished()
    shutil.move(g.best, g.outside / "step-00000002")
    os.symlink(g.outside / "step-00000002", g.run / "checkpoints" / "step-00000002")
    return RESUME


@trap("run", code=2)
def a_log_that_links_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "log.txt", g.secret)
    return RESUME


@trap("run", code=2)
def records_that_link_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "metrics.jsonl", g.secret)
    return RESUME


@trap("run", code=2)
def times_that_link_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "timing.jsonl", g.secret)
    return RESUME


@trap("run", code=2)
def a_lock_that_links_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / ".lock", g.secret)
    return RESUME


@trap("run", code=2)
def a_lock_that_is_a_pipe(g: Ground) -> list[str]:
    g.unfinished()
    g.pipe(g.run / ".lock")
    return RESUME


@trap("run", code=2)
def a_log_that_is_a_pipe(g: Ground) -> list[str]:
    g.unfinished()
    g.pipe(g.run / "log.txt")
    return RESUME


@trap("run", code=2)
def checkpoints_that_are_another_runs(g: Ground) -> list[str]:
    """A resume would prune what is not its own."""
    g.unfinished()
    shutil.move(g.run / "checkpoints", g.outside / "checkpoints")
    os.symlink(g.outside / "checkpoints", g.run / "checkpoints")
    return RESUME


@trap("run", code=2)
def evaluations_that_lie_outside(g: Ground) -> list[str]:
    g.link(g.run / "eval", g.outside)
    return EVAL


@trap("run", code=2)
def a_report_that_lies_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "report", g.outside)
    return RESUME


@trap("run")
def debris_that_links_outside(g: Ground) -> list[str]:
    g.unfinished()
    for folder in (g.run, g.run / "checkpoints"):
        for name in (".tmp-0123", ".trash-step-00000001-0123", ".aside-step-00000001-0123"):
            os.symlink(g.outside, folder / name)
    return RESUME


@trap("run")
def a_model_folder_that_lies_outside(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.model, g.outside)
    return RESUME


@trap("run")
def a_status_that_is_a_pipe(g: Ground) -> list[str]:
    g.pipe(g.run / "status.json")
    return RESUME


@trap("run")
def a_status_nested_without_end(g: Ground) -> list[str]:
    (g.run / "status.json").write_text("[" * 100_000)
    return RESUME


@trap("run")
def records_without_end(g: Ground) -> list[str]:
    g.unfinished()
    with open(g.run / "metrics.jsonl", "ab") as file:
        file.write(b"[" * 100_000 + b"\n")
    return RESUME


@trap("run", code=2)
def a_manifest_of_the_run_nested_without_end(g: Ground) -> list[str]:
    g.unfinished()
    (g.run / "manifest.json").write_text('{"a":' * 100_000)
    return RESUME


# resume state --------------------------------------------------------------------------------------------------------------------------


@trap("run", code=2)
def a_state_of_another_shape(g: Ground) -> list[str]:
    from safetensors.torch import load_file, save_file

    g.unfinished()
    path = g.best / "state.safetensors"
    save_file({name: tensor.flatten()[:1].contiguous().clone() for name, tensor in load_file(path).items()}, path)
    g.reseal(g.best)
    return RESUME


# weights that are torn, shapeless or no numbers -----------------------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def retell(g: Ground, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a model; an exported one then says nothing of its weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})
    if folder == g.model:
        told = json.loads((folder / "task.json").read_text())
        g.write(folder / "task.json", json.dumps({name: value for name, value in told.items() if name != "weights"}))
    g.reseal(folder)


def spoil(tensors: dict[str, Any]) -> None:
    tensors[QUERY][0, 0] = float("nan")


@trap("run", code=2, says=f"{QUERY} is missing")
def a_model_that_lacks_a_tensor_of_its_encoder(g: Ground) -> list[str]:
    retell(g, g.model, lambda tensors: tensors.pop(QUERY))
    return START


@trap("run", code=2, says=f"{QUERY} is of shape [16, 32] and is to be [32, 32]")
def a_model_with_a_tensor_of_another_shape(g: Ground) -> list[str]:
    retell(g, g.model, lambda tensors: tensors.update({QUERY: tensors[QUERY][:16].clone()}))
    return ["check", *START[1:-2], "device=cpu"]


@trap("run", code=0, says="new in the model, drawn from the seed: bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias")
def a_model_without_pooler_and_head(g: Ground) -> list[str]:
    retell(g, g.model, lambda tensors: [tensors.pop(name) for name in list(tensors) if "pooler" in name or "classifier" in name])
    return START


@trap("run", code=2, says=QUERY)
def weights_that_are_no_numbers_to_start_from(g: Ground) -> list[str]:
    retell(g, g.model, spoil)
    return START


@trap("run", code=2, says=QUERY)
def weights_that_are_no_numbers_to_predict_with(g: Ground) -> list[str]:
    retell(g, g.model, spoil)
    return MODEL


@trap("run", code=2, says="model.safetensors")
def weights_that_are_no_numbers_in_a_checkpoint(g: Ground) -> list[str]:
    retell(g, g.best, spoil)
    return EVAL


@trap("run", code=2, says="model.safetensors is not in its manifest.json")
def a_manifest_that_leaves_the_weights_out(g: Ground) -> list[str]:
    leave_out(g)
    return EVAL


@trap("run", code=2, says="model.safetensors is not in its manifest.json")
def the_same_to_go_on_from(g: Ground) -> list[str]:
    leave_out(g)
    g.unfinished()
    return ["train", f"resume={g.best}"]


def leave_out(g: Ground) -> None:
    record = unseal((g.best / "manifest.json").read_bytes())
    record["files"].pop("model.safetensors")
    (g.best / "manifest.json").write_bytes(seal(record))


# records of mere information --------------------------------------------------------------------------------------------------------------


@trap("run", code=0, says="died without a word after step")
def a_status_without_a_step(g: Ground) -> list[str]:
    (g.run / "status.json").write_text('{"state": "running", "step": null}')
    return RESUME


@trap("run", code=0, says="died without a word after step 2: killed")
def times_that_are_no_numbers(g: Ground) -> list[str]:
    (g.run / "status.json").write_text('{"state": "running", "step": 2}')
    lines = ['{"step": 3, "memory_mb": null}', '{"step": null}', '{"step": 1e400}', '{"step": 2, "memory_mb": "x"}', "{", "[1]"]
    (g.run / "timing.jsonl").write_text("\n".join([*lines, '{"step": true}', ""]))
    return RESUME


@trap("run", code=2, says="witness.jsonl of the run is a link or no file")
def a_pipe_in_place_of_the_losses(g: Ground) -> list[str]:
    g.unfinished()
    g.pipe(g.run / "witness.jsonl")
    return RESUME


@trap("run", code=2, says="witness.jsonl of the run is a link or no file")
def a_link_in_place_of_the_losses(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "witness.jsonl", g.secret)
    return RESUME


@trap("run", code=2, says="model of the run is a link or no folder")
def a_link_in_place_of_the_model(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.model, g.outside)
    return RESUME


@trap("run", code=2, says="crash of the run is a link or no folder")
def a_link_in_place_of_the_crash(g: Ground) -> list[str]:
    g.unfinished()
    g.link(g.run / "crash", g.outside)
    return RESUME


# what task.json and config.json say of the labels -----------------------------------------------------------------------------------------


def tell(g: Ground, change: Callable[[dict[str, Any]], object]) -> list[str]:
    """Change what an exported model knows."""
    told = json.loads((g.model / "task.json").read_text())
    change(told)
    g.write(g.model / "task.json", json.dumps(told))
    return MODEL


@trap("run", code=2, says="a temperature of 0")
def a_temperature_of_nothing(g: Ground) -> list[str]:
    return tell(g, lambda told: told["facts"].update(decisions={"temperature": 0}))


@trap("run", code=2, says="a temperature of '1'")
def a_temperature_that_is_a_text(g: Ground) -> list[str]:
    return tell(g, lambda told: told["facts"].update(decisions={"temperature": "1"}))


@trap("run", code=2, says="task.json does not fit")
def thresholds_that_are_texts(g: Ground) -> list[str]:
    return tell(g, lambda told: told["facts"].update(decisions={"given": ["0.5"]}))


@trap("run", code=2, says="multi is neither true nor false")
def several_labels_said_with_a_word(g: Ground) -> list[str]:
    return tell(g, lambda told: told["facts"].update(multi="no"))


@trap("run", code=2, says="task.json does not fit")
def a_plan_with_more_than_a_plan_has(g: Ground) -> list[str]:
    return tell(g, lambda told: told["plan"]["batches"].update(evil=1))


@trap("run", code=2, says="its labels are positive, negative, those of config.json negative, positive")
def labels_the_other_way_round(g: Ground) -> list[str]:
    return tell(g, lambda told: [told["facts"][name].reverse() for name in ("labels", "cells")])


def plain(g: Ground, **values: Any) -> list[str]:
    """A plain model whose config.json says something else."""
    (g.model / "task.json").unlink()
    g.change(g.model / "config.json", **values)
    return MODEL


@trap("run", code=2, says="two of the model's classes are named 'negative'")
def a_name_for_two_classes(g: Ground) -> list[str]:
    return plain(g, id2label={"0": "negative", "1": "negative"}, label2id={"negative": 1})


@trap("run", code=2, says="is number 0 in id2label and 1 in label2id")
def names_that_contradict_each_other(g: Ground) -> list[str]:
    return plain(g, label2id={"negative": 1, "positive": 0})


@trap("run", code=2, says="numbered 0, 5, not from 0 on")
def classes_that_are_not_counted(g: Ground) -> list[str]:
    return plain(g, id2label={"0": "negative", "5": "positive"}, label2id={"negative": 0, "positive": 5})


@trap("run", code=2, says="model_max_length is -5")
def inputs_shorter_than_nothing(g: Ground) -> list[str]:
    g.change(g.model / "tokenizer_config.json", model_max_length=-5)
    return MODEL


@trap("run", code=2)
def a_state_of_another_kind(g: Ground) -> list[str]:
    g.unfinished()
    g.write(g.best / "state.json", '{"map": {"step": {"value": "x"}, "evil": {"call": "os.system"}}}')
    return RESUME


@trap("run", code=2)
def a_state_nested_without_end(g: Ground) -> list[str]:
    g.unfinished()
    g.write(g.best / "state.json", '{"map":{"a":' * 50_000 + '{"value":1}' + "}}" * 50_000)
    return RESUME


@trap("run")
def a_state_from_the_far_future(g: Ground) -> list[str]:
    g.unfinished()
    state = json.loads((g.best / "state.json").read_text())
    for name in ("step", "epoch", "window", "metrics_bytes"):
        if name in state["map"]:
            state["map"][name] = {"value": 10**18}
    g.write(g.best / "state.json", json.dumps(state))
    return RESUME


@trap("run")
def a_state_that_goes_back(g: Ground) -> list[str]:
    g.unfinished()
    state = json.loads((g.best / "state.json").read_text())
    state["map"] |= {name: {"value": -5} for name, value in state["map"].items() if isinstance(value.get("value"), int)}
    g.write(g.best / "state.json", json.dumps(state))
    return RESUME


@trap("run", code=2)
def a_manifest_of_the_run_of_other_types(g: Ground) -> list[str]:
    g.unfinished()
    (g.run / "manifest.json").write_bytes(seal({"plan": "x", "files": [1]}))
    return RESUME


@trap("run", code=2)
def the_same_before_the_first_checkpoint(g: Ground) -> list[str]:
    shutil.rmtree(g.run / "checkpoints")
    return a_manifest_of_the_run_of_other_types(g)


# what a checkpoint knows ---------------------------------------------------------------------------------------------------------------


@trap("run", code=2)
def knowledge_nested_without_end(g: Ground) -> list[str]:
    g.write(g.best / "task.json", "[" * 100_000)
    return EVAL


@trap("run", code=2)
def knowledge_of_other_types(g: Ground) -> list[str]:
    g.change(g.best / "task.json", facts=[1], columns="text", max_length="all", seed=None, plan=7)
    return EVAL


@trap("run", code=2)
def a_plan_of_other_types(g: Ground) -> list[str]:
    g.change(g.best / "task.json", plan={"device": {}, "batches": {"evil": 1}})
    return EVAL


@trap("run")
def a_plan_of_a_million_threads(g: Ground) -> list[str]:
    plan = json.loads((g.best / "task.json").read_text())["plan"]
    plan["device"]["threads"] = 10_000_000
    g.change(g.best / "task.json", plan=plan)
    return EVAL


@trap("run")
def a_length_of_a_billion(g: Ground) -> list[str]:
    g.change(g.best / "task.json", max_length=1_000_000_000)
    return EVAL


@trap("run", code=2)
def facts_that_are_missing(g: Ground) -> list[str]:
    g.change(g.best / "task.json", facts={"labels": [{"a": 1}]})
    return EVAL


@trap("run")
def labels_that_are_numbers(g: Ground) -> list[str]:
    facts = json.loads((g.best / "task.json").read_text())["facts"]
    g.change(g.best / "task.json", facts={**facts, "labels": [1, 2.5], "cells": [None, []]})
    return EVAL


@trap("run", code=2)
def more_labels_than_the_head_has(g: Ground) -> list[str]:
    facts = json.loads((g.best / "task.json").read_text())["facts"]
    names = [f"label {i}" for i in range(9)]
    g.change(g.best / "task.json", facts={**facts, "labels": names, "cells": names})
    return EVAL


@trap("run", code=0)
def labels_with_escapes(g: Ground) -> list[str]:
    facts = json.loads((g.best / "task.json").read_text())["facts"]
    labels = ["\x1b]0;evil\x07\x1b[2J", "\n\nerror: x\n<script>"]
    g.change(g.best / "task.json", facts={**facts, "labels": labels})
    g.change(g.best / "config.json", id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)})
    return EVAL


@trap("run")
def columns_with_escapes(g: Ground) -> list[str]:
    g.change(g.best / "task.json", columns={"text": "\x1b[2J\n\nerror: x", "text_pair": None, "label": "\x1b]0;evil\x07"})
    return EVAL


@trap("run", code=2)
def weights_listed_outside(g: Ground) -> list[str]:
    g.change(g.model / "task.json", weights={"../../outside/secret.txt": "0", "model.safetensors": {"a": 1}})
    return MODEL


# adapters ------------------------------------------------------------------------------------------------------------------------------


@trap("lora", code=2)
def a_base_that_is_a_pickle_outside(g: Ground) -> list[str]:
    shutil.move(g.run / "base", g.outside / "base")
    (g.outside / "base" / "model.safetensors").unlink()
    (g.outside / "base" / "pytorch_model.bin").write_bytes(g.torch_pickled)
    g.change(g.best / "base.json", name=str(g.outside / "base"), pickled_weights=True)
    return EVAL


@trap("lora", code=2)
def a_base_with_code_of_its_own(g: Ground) -> list[str]:
    with_own_code(g, g.run / "base")
    g.change(g.run / "base" / "config.json", auto_map=MAP, model_type="evil")
    g.change(g.best / "config.json", auto_map=MAP, model_type="evil")
    return EVAL


@trap("lora", code=2)
def a_base_that_is_a_secret(g: Ground) -> list[str]:
    shutil.rmtree(g.run / "base")
    g.change(g.best / "base.json", name=str(g.outside), told="\x1b[2J\n\n\nerror: x")
    return EVAL


@trap("lora", code=2)
def a_base_of_other_types(g: Ground) -> list[str]:
    g.change(g.best / "base.json", name=7, quantised=["evil"], sha256=None)
    return EVAL


@trap("lora", code=2)
def a_base_nested_without_end(g: Ground) -> list[str]:
    g.write(g.best / "base.json", "[" * 100_000)
    return EVAL


@trap("lora")
def an_adapter_that_imports(g: Ground) -> list[str]:
    (g.folder / "evil.py").write_text(g.code)
    g.change(g.best / "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil", auto_mapping={"parent_library": "evil"})
    return EVAL


@trap("lora", code=2)
def an_adapter_whose_pattern_never_ends(g: Ground) -> list[str]:
    g.change(g.best / "adapter_config.json", target_modules="(([a-z.0-9_]+)+)+!")
    return EVAL


@trap("lora", code=2)
def an_adapter_of_another_kind(g: Ground) -> list[str]:
    g.change(g.best / "adapter_config.json", peft_type="PROMPT_TUNING", num_virtual_tokens=10**9)
    return EVAL


@trap("lora", code=2)
def an_adapter_of_a_billion_ranks(g: Ground) -> list[str]:
    g.change(g.best / "adapter_config.json", r=1_000_000_000)
    return EVAL


@trap("lora")
def an_adapter_that_begins_slowly(g: Ground) -> list[str]:
    g.change(g.best / "adapter_config.json", init_lora_weights="pissa_niter_1000000", rank_pattern={"((.*)+)+!": 4})
    return EVAL


# the folder that the user stands in ----------------------------------------------------------------------------------------------------


@trap("run", code=0, fresh=True)
def modules_where_the_user_stands(g: Ground) -> list[str]:
    for name in ("sitecustomize", "usercustomize", "torch", "transformers", "yaml", "json", "peft", "conftest", "tokenizers", "matplotlib"):
        (g.folder / f"{name}.py").write_text(g.code)
        (g.run / f"{name}.py").write_text(g.code)
    return EVAL


@trap("run", code=0, fresh=True)
def plugins_where_the_user_stands(g: Ground) -> list[str]:
    (g.folder / "hydra_plugins" / "evil").mkdir(parents=True)
    (g.folder / "hydra_plugins" / "evil" / "__init__.py").write_text(g.code)
    (g.folder / "hydra_plugins" / "evil.py").write_text(g.code)
    (g.folder / "evil.py").write_text(g.code)
    metadata = g.folder / "evil-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[ftune.tasks]\nevil = evil:TASK\n[console_scripts]\nftune = evil:main\n[torch.backends]\nx = evil:x\n"
    )
    return EVAL


@trap("run", code=0)
def settings_of_matplotlib_where_the_user_stands(g: Ground) -> list[str]:
    (g.folder / "evil.py").write_text(g.code)
    for folder in (g.folder, g.run):
        (folder / "matplotlibrc").write_text("backend: module://evil\nsavefig.directory: /\n")
    return EVAL


@trap("run", code=0)
def a_repository_that_runs_commands(g: Ground) -> list[str]:
    """git runs what the settings of a repository name as soon as it is asked whether files have changed."""

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=g.folder, check=True, capture_output=True)

    git("init", "-q")
    git("add", "train.csv")
    git("commit", "-qm", "a")
    (g.folder / ".gitattributes").write_text("* filter=evil diff=evil\n")
    git("add", "-f", ".gitattributes")
    git("commit", "-qm", "b")
    for name in ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "diff.evil.textconv", "core.pager", "core.sshCommand"):
        git("config", name, f"touch {g.canary}; cat")
    git("config", "core.hooksPath", str(g.outside))
    os.utime(g.folder / "train.csv", (1, 1))
    return ["train", "data.train=train.csv", *SMALL, "run.dir=new"]


# data ----------------------------------------------------------------------------------------------------------------------------------


def train_on(name: str) -> list[str]:
    return ["train", f"data.train={name}", *SMALL, "run.dir=new", "data.validation=null"]


@trap("", code=2, says="unpacked")
def a_gz_of_gigabytes(g: Ground) -> list[str]:
    rows = pa.compress(b"good film,positive\nbad film,negative\n" * 30_000, codec="gzip", asbytes=True)
    with open(g.folder / "bomb.csv.gz", "wb") as file:
        file.write(pa.compress(b"text,label\n", codec="gzip", asbytes=True))
        file.writelines(rows for _ in range(2_000))
    return train_on("bomb.csv.gz")


@trap("", code=2, says="unpacked")
def a_parquet_packed_into_gigabytes(g: Ground) -> list[str]:
    zeros = pa.compress(bytes(64 << 20), codec="gzip", asbytes=True)
    (g.folder / "bomb.parquet.gz").write_bytes(pa.compress(b"PAR1", codec="gzip", asbytes=True) + zeros * 40)
    return train_on("bomb.parquet.gz")


@trap("", code=2)
def a_zst_of_zeros(g: Ground) -> list[str]:
    (g.folder / "bomb.jsonl.zst").write_bytes(pa.compress(bytes(1 << 30), codec="zstd", asbytes=True))
    return train_on("bomb.jsonl.zst")


@trap("", code=2)
def a_cell_of_gigabytes(g: Ground) -> list[str]:
    (g.folder / "bomb.csv.zst").write_bytes(pa.compress(b'text,label\n"' + b"a\n" * (600 << 20), codec="zstd", asbytes=True))
    return train_on("bomb.csv.zst")


@trap("", code=2, says="unpacked")
def a_parquet_of_a_billion_rows(g: Ground) -> list[str]:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int8()), pa.array(["x" * 2_000]))
    table = pa.table({"text": column, "label": column})
    with pq.ParquetWriter(g.folder / "bomb.parquet", table.schema, use_dictionary=True) as writer:
        writer.write_table(table)
    return train_on("bomb.parquet")


@trap("", code=2)
def a_table_whose_type_is_a_pickle(g: Ground) -> list[str]:
    told = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": g.pickled}
    field_of = pa.field("text", pa.binary(), metadata=told)
    table = pa.table([pa.array([g.pickled, g.pickled]), pa.array(["a", "b"])], schema=pa.schema([field_of, pa.field("label", pa.string())]))
    pq.write_table(table, g.folder / "evil.parquet")
    with pa.ipc.new_file(g.folder / "evil.arrow", table.schema) as writer:
        writer.write_table(table)
    return train_on("evil.parquet")


@trap("", code=2)
def an_arrow_whose_type_is_a_pickle(g: Ground) -> list[str]:
    a_table_whose_type_is_a_pickle(g)
    return train_on("evil.arrow")


@trap("", code=2)
def a_pickle_as_data(g: Ground) -> list[str]:
    for name in ("evil.csv", "evil.pkl"):
        (g.folder / name).write_bytes(g.pickled)
    return train_on("evil.csv")


@trap("", code=2)
def names_that_steer_the_terminal(g: Ground) -> list[str]:
    (g.folder / "data").mkdir()
    (g.folder / "data" / "a\x1b]0;evil\x07\x1b[2J\n\nerror: x\r.csv").write_text("text,label\na\n")
    return train_on("data")


@trap("", code=2)
def columns_that_steer_the_terminal(g: Ground) -> list[str]:
    (g.folder / "evil.csv").write_text('"te\x1b]0;evil\x07xt\x9b2J","\u202elabel"\na,b\nc,d\n')
    return train_on("evil.csv")


@trap("", code=2)
def a_data_set_with_a_script(g: Ground) -> list[str]:
    folder = g.folder / "evil"
    folder.mkdir()
    for name in ("evil.py", "dataset_infos.json", "__init__.py", "setup.py"):
        (folder / name).write_text(g.code)
    (folder / "train.csv").write_text("text,label\na\n")
    return train_on("evil")


@trap("", code=2)
def a_config_folder_that_instantiates(g: Ground) -> list[str]:
    (g.folder / "mine" / "exp").mkdir(parents=True)
    (g.folder / "mine" / "exp" / "evil.yaml").write_text(
        f"# @package _global_\ndata: {{train: train.csv}}\nhydra:\n  job: {{name: x}}\n  callbacks: {{evil: {touching(g)}}}\n"
    )
    return ["train", "--config-dir", "mine", "+exp=evil", *SMALL]


@trap("", code=2)
def a_config_folder_with_a_launcher(g: Ground) -> list[str]:
    (g.folder / "mine" / "hydra" / "launcher").mkdir(parents=True)
    (g.folder / "mine" / "hydra" / "launcher" / "evil.yaml").write_text(touching(g).strip("{}").replace(", self", "\nself"))
    return ["train", "--config-dir", "mine", "hydra/launcher=evil", "data.train=train.csv", "train.seed=1,2", "-m", *SMALL]


# stepping in ---------------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, list[str]] = {
    "run": [],
    "lora": ["model.adapter=lora", "model.rank=2"],
    "chat": ["task=text-generation", "task.max_new_tokens=4"],
}


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Callable[[str], Path]:
    """``victims("run")``: a folder with a finished run and its data, made once by each worker."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind or "bare") / "ground"
            folder.mkdir()
            lay_rows(folder, chat=kind == "chat")
            if kind:
                suffix = "jsonl" if kind == "chat" else "csv"
                keys = [f"data.{name}={name}.{suffix}" for name in ("train", "validation", "test")]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
                with forks.start("train", *keys, *SMALL, "run.dir=run", *KINDS[kind], cwd=folder, **quiet) as process:
                    errors = process.communicate()[1]
                assert process.returncode == 0, errors.decode()
        return made[kind]

    return make


def lay_rows(folder: Path, *, chat: bool) -> None:
    """Three splits and a few texts."""
    (folder / "texts.txt").write_text("the soup was lovely\nthe chair was broken\n")
    for name, count, shift in (("train", 40, 0), ("validation", 12, 40), ("test", 12, 60)):
        rows = labelled_rows(count, shift=shift)
        write_rows(folder / f"{name}.csv", rows)
        if chat:
            turns = [[{"role": "user", "content": r["text"]}, {"role": "assistant", "content": r["label"]}] for r in rows]
            write_rows(folder / f"{name}.jsonl", [{"messages": messages} for messages in turns])


@pytest.fixture
def ground(tmp_path: Path, victims: Callable[[str], Path]) -> Callable[[str], Ground]:
    """``ground("run")``: a fresh copy to lay a trap in. The paths in the saved config are those of the copy."""

    def make(kind: str) -> Ground:
        original, folder = victims(kind), tmp_path / "ground"
        shutil.copytree(original, folder, symlinks=True)
        made = Ground(folder, tmp_path / "canary")
        for path in [*folder.glob("run/config.yaml"), *folder.glob("run/checkpoints/step-*/config.yaml")]:
            made.write(path, path.read_text().replace(str(original), str(folder)))
        return made

    return make


def step_in(forks: Forks, arguments: list[str], folder: Path, *, fresh: bool = False) -> Ran:
    """The command in a process of its own, with limits. A command that asks on the terminal would wait until its time is up."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    env = {"FTUNE_TEST_TOKEN": SECRET}
    with forks.start(*arguments, fresh=fresh, cwd=folder, env=env, **pipes) as process:
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            out, err = process.communicate(timeout=WALL_SECONDS)
        except BaseException:
            process.kill()
            raise
    return Ran(process.returncode, out.decode("utf-8"), err.decode("utf-8", "replace"))


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies in a folder, links not followed."""
    found = {path: path.lstat() for path in folder.rglob("*") if not path.is_dir()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def test_the_table_is_long_enough() -> None:
    assert len(TRAPS) >= 40


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_does_not_spring(name: str, ground: Callable[[str], Ground], forks: Forks) -> None:
    kind, lay, expected = TRAPS[name]
    g = ground(kind)
    arguments = lay(g)
    g.canary.unlink(missing_ok=True)  # laying it may have made it
    before = everything(g.outside)
    began = time.time()
    ran = step_in(forks, arguments, g.folder, fresh=expected.get("fresh", False))
    assert not g.canary.exists(), "something ran"
    assert everything(g.outside) == before, "something left its folder"
    assert ran.code in ((expected["code"],) if "code" in expected else (0, 2, 5)), f"exit {ran.code}\n{ran.err}"
    if ran.code:
        ran.fails(ran.code)
    assert expected.get("says", "") in ran.err
    assert SECRET not in ran.out + ran.err
    assert not set(map(chr, [*range(9), *range(11, 32), 127, *range(128, 160), 0x202E])) & set(ran.out + ran.err), "it steers the terminal"
    new = [path for path in g.folder.rglob("*") if path.is_file() and path.stat().st_mtime >= began and g.outside not in path.parents]
    assert not [path for path in new if SECRET.encode() in path.read_bytes()], "a secret was written down"


def test_code_of_the_hub_needs_the_commit_that_was_read(ftune_inside: Callable[..., Ran]) -> None:
    """With it the config holds; every other form is a case of ``bad_inputs/hostile.yaml``."""
    settings = ["train", "data.train=train.csv", "model.path=some/model", "model.trust_remote_code=true"]
    ftune_inside(*settings, f"model.revision={'0123456789abcdef0123' * 2}", "--cfg", "job").ok()
    refused = ftune_inside(*settings, f"model.revision={'0123456789ABCDEF0123' * 2}", "--cfg", "job").fails(2)
    assert "revision" in " ".join(refused)

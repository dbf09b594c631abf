"""The schema: every option of ftune, its type, its default, its range, when it applies, and what it means.

YAML files and the command line only choose values. The string under an option is its help; ``option(...)`` carries what a type
cannot say. ``check`` judges a whole config at once, after Hydra composed it and before anything heavy is imported.
"""

# ruff: noqa: RUF009 (option() makes a dataclass field, not a shared default)

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from finetune_cli.config.choices import (
    AdapterName,
    DataFormat,
    DeviceName,
    ExtraFields,
    OnSpike,
    OptimizerName,
    Order,
    Pooling,
    Precision,
    Quantised,
    Quoting,
    RowPolicy,
    Schedule,
    Split,
)

COUNT = 10**12
"""More rows or steps than there are: every count ends here, so that none overflows."""


def option(
    default: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    applies: str = "",
    path: bool = False,
    form: str = "",
    training: bool = False,
    splits: bool = False,
) -> Any:
    """A field with a range (``above``/``below`` exclusive, ``least``/``most`` inclusive) and a condition.

    ``applies`` reads ``key=value|value`` or ``key>number``: set by the user while the condition is false, the option is an error.
    ``path`` marks values that name files: relative ones mean the directory the user stands in.
    ``form`` names, for values that a type cannot describe, how they must look (``config/forms.py``).
    ``training`` marks options whose effect is fixed once a model is trained: set by the user of another verb, they are an error.
    ``splits`` marks options about the rows of train, validation and test: set by the user of ``predict``, they are an error.
    """
    bounds = {"above": above, "least": least, "below": below, "most": most}
    metadata = {**bounds, "applies": applies, "path": path, "form": form, "training": training, "splits": splits}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What every task has; each task adds its own options in its file."""

    name: str = "???"
    """The task, by Hugging Face's name; chosen with ``task=NAME``."""


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Which weights to start from."""

    path: str | None = option(None, path=True)
    """Hub id, local directory, a run (start from its weights), ``minilm`` (bundled), or null: built from ``model.shape``."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the commit it resolves to is saved in the run."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code on this machine; needs ``model.revision`` to be a full commit hash."""
    pickled_weights: bool = False
    """Accept pickled weights (``pytorch_model.bin``, loaded with weights_only) where a model has no safetensors."""
    dropout: float | None = option(None, least=0, below=1)
    """Dropout of embeddings, hidden layers, attention and head; null keeps the model's own."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, about a third more time."""
    pooling: Pooling = Pooling.own
    """What the head reads: the model's ``own`` choice, or a sentence encoder's ``first`` token or ``mean`` of all tokens (BERT only)."""
    shape: dict[str, int] = option({}, form="shape", applies="model.path=null")
    """For a model built from scratch: layers, hidden, heads, intermediate, vocabulary (largest size), positions."""
    adapter: AdapterName = AdapterName.none
    """``lora``: train small matrices beside the weights, and the head (extra ``lora``); wants 5 to 20 times the usual ``optimizer.lr``."""
    rank: int = option(8, least=1, most=4096, applies="model.adapter=lora")
    """Rank of the adapter's matrices."""
    alpha: int = option(16, least=1, most=65536, applies="model.adapter=lora")
    """The adapter counts ``alpha / rank`` times (with rsLoRA, divided by the root of the rank)."""
    adapter_dropout: float = option(0.0, least=0, below=1, applies="model.adapter=lora")
    """Dropout of the adapter's inputs."""
    targets: Any = option("auto", form="targets", applies="model.adapter=lora")
    """Layers with an adapter: a list of names such as ``[query, value]``, ``all-linear``, or ``auto``: those usual for the architecture."""
    rslora: bool = option(False, applies="model.adapter=lora")
    """Rank-stabilised LoRA: high ranks learn as fast as low ones (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = option(False, applies="model.adapter=lora")
    """DoRA: direction and magnitude of a weight are learnt apart (Liu et al. 2024, arXiv:2402.09353); slower."""
    quantised: Quantised = option(Quantised.none, applies="model.adapter=lora")
    """Hold the frozen weights in 8 or 4 bits: ``int8`` (bitsandbytes on CUDA, else torchao), ``nf4`` (bitsandbytes on CUDA)."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Where the rows are and how to read them."""

    train: Any = option(None, path=True, form="rows", splits=True)
    """Training rows: file, directory, glob, list of them, shipped corpus (``reviews``), or hub dataset id."""
    validation: Any = option(0.1, path=True, form="rows", splits=True)
    """Rows that choose the best checkpoint: as ``data.train``, a fraction to split off train, or null for none."""
    test: Any = option(None, path=True, form="rows", splits=True)
    """Rows scored once, after training: as ``data.train``, a fraction to split off train, or null for none."""
    text: Any = option(None, form="columns")
    """Column that holds the text; null infers it where there is one reading."""
    text_pair: str | None = None
    """Column of a second text, for tasks on pairs."""
    label: Any = option(None, form="columns")
    """Column of the label or target; a list of columns for several targets or several 0/1 labels."""
    group: str | None = option(None, splits=True)
    """Column whose equal values stay in one split (one user, one document)."""
    time: str | None = option(None, splits=True)
    """Column to split by time: the latest rows become validation and test."""
    format: DataFormat = DataFormat.auto
    """File format; auto goes by name and first bytes."""
    delimiter: str | None = None
    """Field delimiter of CSV-like files; null finds it."""
    quoting: Quoting = Quoting.auto
    """``csv``: a double quote wraps a field (RFC 4180); ``plain``: a double quote is text; auto decides per file and says so."""
    header: bool | None = None
    """Whether CSV-like files start with column names; null decides by the columns asked for."""
    columns: list[str] | None = None
    """Column names of files without a header, in order; CoNLL columns are else ``column1``, ``column2`` ..."""
    extra_fields: ExtraFields = ExtraFields.error
    """A row with more fields than columns: an error, or the surplus is ignored and counted."""
    parallel: str | None = option(None, form="parallel", applies="data.format=auto|text")
    """``FROM:TO``, such as ``en:de``: line n of ``train.en`` is answered by line n of ``train.de``, in every split."""
    pattern: str | None = option(None)
    """Form of a line of plain text with a label, such as ``{label} {text}`` or ``{text}@{label}``."""
    encoding: str | None = None
    """Text encoding; null finds UTF-8 (with or without byte order mark) and UTF-16."""
    label_names: Any = option(None, path=True, form="names")
    """Names of numbered labels: a list, or a file with one name a line; numbers count from 0, or from 1 where no 0 occurs."""
    label_delimiter: str | None = None
    """Splits one text cell into several labels (multi-label)."""
    missing_labels: RowPolicy = option(RowPolicy.error, splits=True)
    """Rows of a labelled split without a label: an error, or dropped and counted."""
    max_length: int | None = option(None, least=4, most=1_000_000)
    """Longest input in tokens; null is the model's own limit. Longer rows are cut and counted."""
    max_rows: int | None = option(None, least=1, most=COUNT, splits=True)
    """Use at most this many training rows, drawn by the seed."""
    rows_per_label: int | None = option(None, least=1, most=COUNT, splits=True)
    """Use this many training rows of each label, drawn by the seed: a few-shot experiment."""
    max_truncated: float = option(0.1, least=0, most=1, splits=True)
    """Largest share of training rows that may be cut at ``data.max_length``."""
    max_leaked: float = option(0.05, least=0, most=1, splits=True)
    """Largest share of validation or test rows whose text also stands in train."""
    max_conflicts: float = option(0.05, least=0, most=1, splits=True)
    """Largest share of training rows whose text also stands there with another label."""
    max_empty: float = option(0.01, least=0, most=1, splits=True)
    """Largest share of rows with an empty text."""
    max_unknown: float = option(0.2, least=0, most=1, splits=True)
    """Largest share of tokens that the tokenizer does not know."""


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: OptimizerName = OptimizerName.adamw
    """The algorithm, from torch.optim; ``adamw_8bit`` (bitsandbytes) holds the moments of matrices in 8 bits, those of embeddings in 32."""
    lr: float = option(5e-5, above=0, most=100)
    """Peak learning rate."""
    weight_decay: float = option(0.01, least=0, below=1)
    """Weight decay of matrices; norms and biases have none."""
    betas: list[float] = option([0.9, 0.999], form="betas", applies="optimizer.name=adamw|adamw_8bit|adam|nadam|radam")
    """Decay of the first and second moment."""
    eps: float = option(1e-8, above=0, below=1, applies="optimizer.name=adamw|adamw_8bit|adam|nadam|radam|adagrad|rmsprop")
    """Added to the denominator."""
    momentum: float = option(0.0, least=0, below=1, applies="optimizer.name=sgd|rmsprop")
    """Momentum of SGD and RMSprop."""
    nesterov: bool = option(False, applies="optimizer.name=sgd")
    """Nesterov momentum; needs ``optimizer.momentum`` above 0."""
    schedule: Schedule = Schedule.linear
    """Course of the learning rate after warmup."""
    warmup: float = option(0.1, least=0, most=COUNT, form="warmup")
    """Steps of linear warmup; below 1 a fraction of all steps."""
    min_lr: float = option(0.0, least=0, applies="optimizer.schedule=linear|cosine|polynomial")
    """Learning rate at the last step."""
    power: float = option(2.0, above=0, most=20, applies="optimizer.schedule=polynomial")
    """Exponent of the polynomial schedule."""


@dataclass(kw_only=True, slots=True)
class DeviceConfig:
    """What to run on."""

    name: DeviceName = DeviceName.auto
    """auto takes CUDA, then Apple's MPS, then the CPU."""
    index: int | None = option(None, least=0, most=1023, applies="device.name=auto|cuda")
    """Which CUDA device; null: the first, or one for each of ``device.processes``."""
    precision: Precision = Precision.auto
    """Type of the matrix products; weights and optimizer stay fp32. auto: bf16 where the hardware is fast at it, else fp32."""
    threads: int | None = option(None, least=1, most=4096)
    """CPU threads, of all processes together; null: every core that may be used."""
    processes: Any = option("auto", form="processes")
    """Processes that share the work; auto: one a GPU; on a CPU one, unless a long run finds several faster. ``torchrun`` sets it."""
    deterministic: bool = False
    """Bit-equal runs on CUDA too, at some speed; the CPU always is."""


@dataclass(kw_only=True, slots=True)
class TrainDeviceConfig(DeviceConfig):
    """What to train on."""

    memory_budget: float | None = option(None, above=0, most=1_000_000)
    """Memory that training may take, in GiB, of the GPU or of this process; the heaviest batch is tried first. null: what is free."""
    compile: Any = option("auto", form="automatic")
    """Compile the layers for training; auto: on CUDA, where a long run finds it faster. Results are the same to rounding alone."""
    profile: bool = False
    """Look at five updates, after three of warm-up: where their time goes, on the screen and in the report; a trace in ``profile/``."""


@dataclass(kw_only=True, slots=True)
class TrainSection:
    """How long, how much at a time, when to score and to save."""

    epochs: float = option(3.0, above=0, most=100_000)
    """Passes over the training rows; ignored where ``train.steps`` is set."""
    steps: int | None = option(None, least=0, most=COUNT)
    """Optimizer steps in all; null: from ``train.epochs``; 0: the model as it begins is scored, saved and exported."""
    batch_size: int = option(32, least=1, most=10_000_000)
    """Rows per optimizer step, whatever the hardware."""
    seed: int = option(42, least=0, most=2**32 - 1)
    """Governs split, order, initialisation and dropout."""
    clip: float = option(1.0, least=0)
    """Largest gradient norm; 0 does not clip."""
    order: Order = Order.auto
    """``shuffled``: plain random order; ``buckets``: rows of like length share a batch; auto: shuffled where nothing is padded."""
    monitor: str | None = None
    """Validation metric that picks the best checkpoint; null: the task's own."""
    patience: int | None = option(None, least=1, most=COUNT)
    """Stop after this many scorings without a better ``train.monitor``; null never."""
    eval_every: Any = option("epoch", form="steps")
    """Score the validation rows every so many steps, or every ``epoch``."""
    save_every: Any = option("epoch", form="steps")
    """Write a checkpoint every so many steps, or every ``epoch``."""
    log_every: Any = option(10, form="steps")
    """Write loss and learning rate every so many steps, or every ``epoch``."""
    on_spike: OnSpike = OnSpike.warn
    """Where a recorded loss jumps (3 times the median of the last 100, beyond their noise): ``warn``, ``stop`` (exit 4), or ``rewind``
    to the checkpoint before, leave out the rows since then, and go on; at most 3 times."""
    keep: int = option(0, least=0, most=COUNT)
    """Checkpoints to keep besides best and last."""


@dataclass(kw_only=True, slots=True)
class RootConfig:
    """Where the runs are."""

    root: str = option("runs", path=True)
    """Directory that holds the runs."""


@dataclass(kw_only=True, slots=True)
class RunConfig(RootConfig):
    """Where the run directory goes."""

    name: str | None = None
    """End of the directory's name; null: experiment or task, and model."""
    dir: str | None = option(None, path=True)
    """The run directory itself; must be empty or new, unless ``resume`` goes on with it."""


@dataclass(kw_only=True, slots=True)
class Experiment:
    """What is trained, on what and how: of ``ftune train`` and ``ftune check`` alike."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    device: TrainDeviceConfig = field(default_factory=TrainDeviceConfig)
    train: TrainSection = field(default_factory=TrainSection)
    run: RunConfig = field(default_factory=RunConfig)
    expect: dict[str, Any] = option({}, form="expectations")
    """Stated expectations on the metrics (of train: on test, else validation), such as ``expect.accuracy='>=0.8'``; missed: exit 3."""
    offline: bool = False
    """Any attempt to reach the network is an error."""


@dataclass(kw_only=True, slots=True)
class TrainConfig(Experiment):
    """``ftune train``."""

    resume: str | None = option(None, path=True)
    """A run or checkpoint to go on with, or ``auto``: go on with ``run.dir`` if it holds a run, else start it."""
    resume_allow: list[str] = option([])
    """Keys that may differ from the resumed run, such as ``train.epochs`` or ``data.train``."""


@dataclass(kw_only=True, slots=True)
class CheckConfig(Experiment):
    """``ftune check``: what ``ftune train`` takes, to look at and not to run."""

    ledger: str | None = option(None, path=True)
    """File for what was found, as JSON; null: standard output where a program reads it."""

    def train_config(self) -> TrainConfig:
        """The config of the run that would be."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(Experiment)})


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """``ftune eval``."""

    ckpt: Any = option("???", path=True, form="checkpoint")
    """A run, a checkpoint in one, a Hugging Face model directory, or ``latest``."""
    split: Split = Split.auto
    """Which rows to score; auto: test where there is one, else validation."""
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RootConfig = field(default_factory=RootConfig)
    expect: dict[str, Any] = option({}, form="expectations")
    """Stated expectations on the metrics (of train: on test, else validation), such as ``expect.accuracy='>=0.8'``; missed: exit 3."""
    offline: bool = False
    """Any attempt to reach the network is an error."""


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    """``ftune predict``."""

    ckpt: Any = option("???", path=True, form="checkpoint")
    """A run, a checkpoint in one, a Hugging Face model directory, or ``latest``."""
    input: Any = option(None, path=True, form="rows")
    """File, directory, glob or list to label; ``-`` or nothing with a pipe: standard input. A field has at most 1,048,576 characters."""
    output: str | None = option(None, path=True)
    """File to write, JSON Lines by any name; ``.gz`` and ``.zst`` pack it, names of other formats are refused. null: standard output."""
    format: DataFormat = DataFormat.auto
    """Format of the input; auto goes by name, on standard input by the first line."""
    keep: list[str] = option([])
    """Input columns carried through to the output."""
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    run: RootConfig = field(default_factory=RootConfig)
    offline: bool = False
    """Any attempt to reach the network is an error."""


@dataclass(kw_only=True, slots=True)
class ReplayConfig:
    """``ftune replay``."""

    ckpt: Any = option("???", path=True, form="checkpoint")
    """A run, or a checkpoint in one."""
    step: int | None = option(None, least=1, most=COUNT)
    """The update to compute again, from the last checkpoint before it; null: the one that ``crash/`` tells of."""
    task: TaskConfig = field(default_factory=TaskConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: RootConfig = field(default_factory=RootConfig)
    offline: bool = False
    """Any attempt to reach the network is an error."""


SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "check": CheckConfig,
    "eval": EvalConfig,
    "predict": PredictConfig,
    "replay": ReplayConfig,
}
"""Verb to schema."""


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every option of a config object as (dotted key, value, dataclass field)."""
    for f in fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if is_dataclass(value):
            yield from leaves(value, name + ".")
        else:
            yield name, value, f


def out_of_range(value: Any, metadata: Any) -> str:
    """Why a number is outside its option's range, or an empty string."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return ""
    if not math.isfinite(value):
        return "a finite number"
    low, high = metadata.get("above"), metadata.get("below")
    least, most = metadata.get("least"), metadata.get("most")
    bounds = [
        (low is not None and value <= (low if low is not None else 0), f"above {low}"),
        (least is not None and value < (least if least is not None else 0), f"at least {least}"),
        (high is not None and value >= (high if high is not None else 0), f"below {high}"),
        (most is not None and value > (most if most is not None else 0), f"at most {most}"),
    ]
    return next((text for bad, text in bounds if bad), "")


def applies(condition: str, values: dict[str, Any]) -> bool:
    """Whether an option's condition (``key=value|value`` or ``key>number``) holds among the config's ``values``."""
    if not condition:
        return True
    key, sign, allowed = condition_parts(condition)
    value = values.get(key)
    if sign == ">":
        return isinstance(value, (int, float)) and value > float(allowed)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value] in allowed.split("|")
    return str(value.value if isinstance(value, Enum) else value) in allowed.split("|")


def condition_parts(condition: str) -> tuple[str, str, str]:
    """(key, ``=`` or ``>``, what it must be or exceed) of an option's condition."""
    sign = ">" if ">" in condition else "="
    key, _, allowed = condition.partition(sign)
    return key, sign, allowed

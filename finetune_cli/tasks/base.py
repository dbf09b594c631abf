"""What a task is: everything the engine, the commands and the report need to know about one kind of problem.

A task is immutable and holds no model: its options and the facts it learnt from the training rows (labels, target scale), which are
saved with the weights. Rows become examples once, examples become batches many times, and one ``forward`` serves train, eval and predict.
Modules of tasks import torch and NumPy inside functions, so that composing a config stays quick.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from finetune_cli.config.schema import DataConfig, TaskConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples, Ragged, Targets
    from finetune_cli.tasks.sections import Section, Table

C = TypeVar("C", bound=TaskConfig)

Facts = dict[str, Any]
"""JSON-ready facts about the training rows; saved with the weights."""
Outputs = dict[str, Any]
"""Name to array: what ``infer`` gave, on the host, in the order of the examples."""
Prediction = dict[str, Any]
"""One plain, JSON-ready answer."""
Score = dict[str, dict[str, Any]]
"""Metric to ``{"value", "low", "high", "n"}``."""


@dataclass(frozen=True, slots=True)
class Flat:
    """An output of differing length an example: values end to end, [sum of lengths, ...], and the lengths [B], counted on the CPU."""

    values: Tensor
    lengths: np.ndarray


@dataclass(slots=True)
class Batch:
    """One micro-batch. ``weights`` are the loss's denominators by name, counted on the CPU, so that nothing waits for the device."""

    inputs: dict[str, Any]
    """The model's keyword arguments as the layout gave them: tensors, or an object whose ``each(change)`` changes its tensors."""
    targets: Tensor | None
    """What the loss compares against; None where the rows carry none."""
    weights: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further tensors that only the task reads, such as weights of rows."""
    host: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays that only the task reads and that stay on the CPU, such as how many answers each example has."""

    def to(self, where: device) -> Batch:
        """The same batch on a device; the copies do not wait where the source is pinned."""
        if where.type == "cpu":
            return self

        def move(t: Tensor) -> Tensor:
            return (t.pin_memory() if where.type == "cuda" else t).to(where, non_blocking=True)

        moved = {k: v.each(move) if hasattr(v, "each") else move(v) for k, v in self.inputs.items()}
        extra = {k: move(v) for k, v in self.extra.items()}
        return Batch(moved, None if self.targets is None else move(self.targets), self.weights, extra, self.host)


class Layout(Protocol):
    """How flat token columns become the model's inputs; batching and packing implement it."""

    def lay(self, columns: Mapping[str, Ragged]) -> dict[str, Any]:
        """``input_ids`` and its companions: each [B, T] with a mask where sequences were padded, or [1, N] with where the samples lie."""
        ...

    def tight(self) -> Layout:
        """The same without rounding up: one sequence is laid out as itself, by every layout alike."""
        ...


@dataclass(frozen=True, slots=True)
class Shown:
    """An example as the model gets it: stretches of text, and whether each is learnt from."""

    title: str
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A task's outputs on one labelled split beside what they are compared with."""

    outputs: Outputs
    """Answer by answer, as ``gather`` gave them."""
    targets: Any
    """``read_targets`` of the split, row by row."""
    seed: int
    rows: np.ndarray
    """[answers] index of the row that each answer is about."""


class Task(ABC, Generic[C]):
    """One kind of problem. Subclass it in ``tasks/NAME.py``; nothing else needs to know its name."""

    name: ClassVar[str]
    """Hugging Face's name where there is one."""
    Config: ClassVar[type[TaskConfig]]
    auto_class: ClassVar[str]
    """The transformers class that holds the model and its head."""
    pipeline: ClassVar[str | None] = None
    """The transformers pipeline that runs the exported model."""
    architecture: ClassVar[str] = "encoder"
    """What ``model.shape`` builds: an ``encoder``, a ``decoder``, or an ``encoder-decoder``."""
    heads: ClassVar[tuple[str, ...]] = ()
    """Ends of the transformers class names that tell a plain model of this task, such as ``ForTokenClassification``; see ``recognises``.

    Empty: nothing in a model says that it is for this task, so that the user names it.
    """
    precedence: ClassVar[int] = 0
    """Of several tasks that recognise a model the one with the highest is meant: a task that looks closer stands above one that does not.

    Of equals, the tasks of this package go before those of others, then the names decide.
    """
    fallback: ClassVar[bool] = False
    """Whether a model that no task recognises, or whose config is not at hand (on the hub), is taken for this task's; one task says so."""
    plain_texts: ClassVar[bool] = False
    """Whether the tokenizer alone makes a row's example out of its text, or pair, so that the reload check can hold it to that."""
    pairs: ClassVar[bool] = True
    """Whether a second text is understood."""
    labelled: ClassVar[bool] = True
    """Whether rows carry an answer apart from their text; a language model's rows are their own answer."""
    stratified: ClassVar[bool] = True
    """Whether a validation split keeps the shares of the labels."""

    def __init__(self, config: C, facts: Facts, tokenizer: Any = None) -> None:
        self.config = config
        self.facts = facts
        self.tokenizer = tokenizer
        """That of the model; None before there is one."""

    def reading_with(self, tokenizer: Any) -> Self:
        """The same task with the model's tokenizer at hand."""
        task = copy.copy(self)
        task.tokenizer = tokenizer
        return task

    def knowing(self, facts: Facts) -> Self:
        """The same task with other facts."""
        task = copy.copy(self)
        task.facts = facts
        return task

    @property
    def rows_interact(self) -> bool:
        """Whether a row's loss depends on the other rows of its batch, so that a batch must not be split."""
        return False

    @classmethod
    def recognises(cls, model_config: Mapping[str, Any]) -> bool:
        """Whether a plain model is for this task by more than its head, which is one of ``heads``; ``model_config`` is its config.json.

        Called while a config is composed: nothing heavy may be imported, and the file may hold any JSON.
        """
        return True

    # -- options -------------------------------------------------------------------------------
    @classmethod
    def needs_validation(cls, config: C) -> list[str]:
        """Keys of the options, as they are set, that only validation rows can settle."""
        return []

    def refuse_misfits(self, *, training: bool) -> None:
        """Raise UserError for an option that does not fit the facts; called before a model is loaded."""
        return

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(cls, config: C, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        """The rows in the form that the other methods read, their columns, and notes on what was inferred.

        A task whose rows are more than texts and labels adds columns of its own here, a plain text for people among them, and names
        the user's columns in ``Roles.found_by``. Raises NoColumn where a column is missing.
        """
        from finetune_cli.data import find_roles

        return rows, *find_roles(rows, data, labelled=labelled, pairs=cls.pairs)

    @classmethod
    def arrange_split(cls, config: C, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        """``arrange`` for the rows of a split, where a task may join several to one; rows to be answered stay what they are."""
        return cls.arrange(config, rows, data, labelled=labelled)

    @classmethod
    @abstractmethod
    def learn(cls, config: C, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        """What must be known of the training rows. Raises UserError for rows that cannot be learnt from."""

    @classmethod
    @abstractmethod
    def facts_of(cls, model_config: Any) -> Facts:
        """The same facts read from a plain Hugging Face model's config."""

    @abstractmethod
    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> Targets:
        """Targets of labelled rows, one a row; a value the model does not know is a UserError with its line."""

    @abstractmethod
    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        """What the split table counts as a row's label; None where it counts nothing."""

    @abstractmethod
    def told_facts(self) -> list[tuple[str, str]]:
        """The facts in words, for the first screen and the model card: (what, text)."""

    @abstractmethod
    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        """Tokenise a chunk of rows; ``first_row`` is the index of its first row in the split. Never padded.

        ``asked``: the rows are to be answered (``predict``), not learnt from or scored.
        """

    def recipe(self) -> Any:
        """All of the options and facts that ``encode`` reads, JSON-ready: part of the name under which encoded rows are kept."""
        return asdict(self.config)

    @classmethod
    def vocabulary_texts(cls, rows: Rows, roles: Roles) -> Iterator[str]:
        """The texts of some rows that a tokenizer from scratch learns from."""
        from finetune_cli.data import texts

        for column in filter(None, (roles.text, roles.text_pair)):
            yield from texts(rows, column)

    @abstractmethod
    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        """Lay out some examples as one batch; ``targets`` are those of their rows, None where they are asked; ``key`` seeds masking.

        The key is the step's, 0 where rows are scored: a draw also takes what is the example's own, so that it does not depend on which
        examples share a micro-batch.
        """

    # -- model ---------------------------------------------------------------------------------
    @abstractmethod
    def head(self) -> dict[str, Any]:
        """Config values that the model needs for this task, such as ``num_labels``."""

    def adjust(self, model: nn.Module) -> None:
        """Settings of a model that has just been built or loaded, such as how it generates; saved with it.

        Raises UserError for a model that cannot do what is asked.
        """

    def configure(self, model_config: Any) -> None:
        """Write the head into a transformers config before the model is loaded or built; a model may keep a head that serves the task."""
        for name, value in self.head().items():
            setattr(model_config, name, value)

    def prepare(self, model: nn.Module) -> list[str]:
        """Set what the task can say of a model before its first step, such as a head made of label descriptions; not on a resume.

        The model is as it was loaded: padded, on the CPU. Returns the names of the parameters that were set.
        """
        return []

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The one forward pass of train, eval and predict."""
        return model(**batch.inputs)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums (never means) of the loss by name; the loop divides each by the step's weight of that name."""

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        """(what ``decode`` and ``score`` need, [B, ...] or flat, by name; the loss sums, empty without targets)."""
        outputs = self.forward(model, batch)
        return {"logits": outputs.logits.float()}, self.loss(outputs, batch) if batch.targets is not None else {}

    def gather(self, outputs: Outputs, examples: Examples) -> tuple[Outputs, np.ndarray]:
        """Outputs of examples to answers, and the row that each answer is about: one an example, unless windows of a row are joined."""
        return outputs, examples.row

    def settle(self, evaluation: Evaluation) -> Facts | None:
        """Facts that are learnt from the validation rows after an epoch, such as thresholds; None where there are none.

        They are saved with the checkpoint that gave them, and scores are computed with them.
        """
        return None

    def fitting_head(self) -> Self | None:
        """The task as it looks at the training rows to fit its head to them; None where gradients train the head.

        Asked before each scoring and each checkpoint. What its ``infer`` gives of the training rows goes to ``fit_head``.
        """
        return None

    def fit_head(self, model: nn.Module, evaluation: Evaluation) -> None:
        """Set the head to what fits the training rows best: a function of the evaluation alone, whatever the head was before."""

    def fold(self, model: nn.Module) -> Facts | None:
        """Fold learnt scales into the last layer, so that plain transformers gives the same answers.

        Returns the facts that go with the folded weights, or None where nothing had to change.
        """
        return None

    @abstractmethod
    def answers(self, outputs: Outputs) -> np.ndarray:
        """What the exported model's ``logits`` must be in plain transformers, [N, K]: for the reload check."""

    def reproducible(self, model: nn.Module, batch: Batch) -> np.ndarray:
        """Logits of one example, of any shape, that plain transformers must reproduce from the exported model and the same inputs."""
        return self.answers({"logits": self.forward(model, batch).logits.float().cpu().numpy()})

    # -- before the first step -----------------------------------------------------------------
    def ledger(self, examples: Mapping[str, Examples], rows: Mapping[str, Rows]) -> Table | None:
        """What of each split is learnt from, for the screen and the report. Raises UserError where nothing is."""
        return None

    def shown(self, examples: Examples, rows: Rows) -> list[Shown]:
        """A few training examples as the model gets them, with where their rows stand."""
        return []

    # -- results -------------------------------------------------------------------------------
    @property
    @abstractmethod
    def monitor(self) -> str:
        """The metric that picks the best checkpoint where the user names none."""

    @abstractmethod
    def metric_names(self) -> frozenset[str]:
        """Every metric that ``metrics`` may give."""

    @abstractmethod
    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """Metrics of one split, without intervals (they are what training watches)."""

    @abstractmethod
    def score(self, evaluation: Evaluation) -> Score:
        """Metrics with n and a 95 % bootstrap interval."""

    @abstractmethod
    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        """Answers in the order of ``gather``; ``rows`` are those of the whole split or window."""

    def remarks(self, outputs: Outputs, rows: Rows, roles: Roles) -> dict[str, int]:
        """What deserves to be told of answered rows, in words, and of how many; ``predict`` adds the counts up and says them at its end."""
        return {}

    @abstractmethod
    def told(self, target: Any) -> Any:
        """A target as a user wrote it: a label's name, several names, or numbers."""

    @abstractmethod
    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        """Scores of models that anyone can have for free, on the same (texts, targets): name to metrics."""

    @abstractmethod
    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        """The task's own part of the report; ``lengths`` are tokens of each answer's row."""

"""What a task is: everything the engine, the commands and the report need to know about one kind of problem.

A task is immutable and holds no model: its options and the facts it learnt from the training rows (labels, target scale), which are
saved with the weights. Rows become examples once, examples become batches many times, and one ``forward`` serves train, eval and predict.
Modules of tasks import torch and NumPy inside functions, so that composing a config stays quick.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from finetune_cli.config.schema import DataConfig, TaskConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples, Ragged
    from finetune_cli.tasks.sections import Section

C = TypeVar("C", bound=TaskConfig)

Facts = dict[str, Any]
"""JSON-ready facts about the training rows; saved with the weights."""
Outputs = dict[str, Any]
"""Name to array: what ``infer`` gave, on the host, in the order of the examples."""
Prediction = dict[str, Any]
"""One plain, JSON-ready answer."""
Score = dict[str, dict[str, Any]]
"""Metric to ``{"value", "low", "high", "n"}``."""


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

    def to(self, where: device) -> Batch:
        """The same batch on a device; the copies do not wait where the source is pinned."""
        if where.type == "cpu":
            return self

        def move(t: Tensor) -> Tensor:
            return (t.pin_memory() if where.type == "cuda" else t).to(where, non_blocking=True)

        moved = {k: v.each(move) if hasattr(v, "each") else move(v) for k, v in self.inputs.items()}
        extra = {k: move(v) for k, v in self.extra.items()}
        return Batch(moved, None if self.targets is None else move(self.targets), self.weights, extra)


class Layout(Protocol):
    """How flat token columns become the model's inputs; batching and packing implement it."""

    def lay(self, columns: Mapping[str, Ragged]) -> dict[str, Any]:
        """``input_ids`` and its companions: each [B, T] with a mask where sequences were padded, or [1, N] with where the samples lie."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A task's outputs on one labelled split beside what they are compared with."""

    outputs: Outputs
    targets: np.ndarray
    seed: int


class Task(ABC, Generic[C]):
    """One kind of problem. Subclass it in ``tasks/NAME.py``; nothing else needs to know its name."""

    name: ClassVar[str]
    """Hugging Face's name where there is one."""
    Config: ClassVar[type[TaskConfig]]
    auto_class: ClassVar[str]
    """The transformers class that holds the model and its head."""
    pipeline: ClassVar[str | None] = None
    """The transformers pipeline that runs the exported model."""
    pairs: ClassVar[bool] = True
    """Whether a second text is understood."""
    stratified: ClassVar[bool] = True
    """Whether a validation split keeps the shares of the labels."""
    rows_interact: ClassVar[bool] = False
    """Whether a row's loss depends on the other rows of its batch, so that a batch must not be split."""

    def __init__(self, config: C, facts: Facts) -> None:
        self.config = config
        self.facts = facts

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    @abstractmethod
    def learn(cls, config: C, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        """What must be known of the training rows. Raises UserError for rows that cannot be learnt from."""

    @classmethod
    @abstractmethod
    def facts_of(cls, model_config: Any) -> Facts:
        """The same facts read from a plain Hugging Face model's config."""

    @abstractmethod
    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        """Targets of labelled rows, [N] or [N, T]; a value the model does not know is a UserError with its line."""

    @abstractmethod
    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        """What the split table counts as a row's label; None where it counts nothing."""

    @abstractmethod
    def told_facts(self) -> list[tuple[str, str]]:
        """The facts in words, for the first screen and the model card: (what, text)."""

    @abstractmethod
    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int) -> Examples:
        """Tokenise a chunk of rows; ``first_row`` is the index of its first row in the split. Never padded."""

    @abstractmethod
    def collate(self, columns: Columns, targets: np.ndarray | None, layout: Layout, *, key: int) -> Batch:
        """Lay out some examples as one batch; ``key`` seeds masking and augmentation."""

    # -- model ---------------------------------------------------------------------------------
    @abstractmethod
    def head(self) -> dict[str, Any]:
        """Config values that the model needs for this task, such as ``num_labels``."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The one forward pass of train, eval and predict."""
        return model(**batch.inputs)

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums (never means) of the loss by name; the loop divides each by the step's weight of that name."""

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(what ``decode`` and ``score`` need, [B, ...] by name; the loss sums, empty without targets)."""
        outputs = self.forward(model, batch)
        return {"logits": outputs.logits.float()}, self.loss(outputs, batch) if batch.targets is not None else {}

    def fold(self, model: nn.Module) -> Facts | None:
        """Fold learnt scales into the last layer, so that plain transformers gives the same answers.

        Returns the facts that go with the folded weights, or None where nothing had to change.
        """
        return None

    @abstractmethod
    def answers(self, outputs: Outputs) -> np.ndarray:
        """What plain transformers must reproduce from the exported model: its logits, [N, K]."""

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
    def decode(self, outputs: Outputs) -> Iterator[Prediction]:
        """Answers in the order of the examples."""

    @abstractmethod
    def told(self, target: Any) -> Any:
        """A target as a user wrote it: a label's name, several names, or numbers."""

    @abstractmethod
    def baselines(self, train: tuple[Sequence[str], np.ndarray], test: tuple[Sequence[str], np.ndarray]) -> dict[str, dict[str, float]]:
        """Scores of models that anyone can have for free, on the same rows: name to metrics."""

    @abstractmethod
    def sections(self, evaluation: Evaluation, *, texts: Callable[[int], str], lengths: np.ndarray) -> list[Section]:
        """The task's own part of the report; ``texts(i)`` reads the text of row ``i``."""

"""token-classification: names in a text (NER). Words with tags, or a text with spans, in; spans with type, place and score out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig, TaskConfig, option
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.entities.entity_findings import Compared
from finetune_cli.tasks.entities.entity_rows import Gold, cells_of, lists_of, marked_text, tags_of, words_of
from finetune_cli.tasks.entities.word_pieces import WORD, encode_words, first_pieces, gather_words
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.labelling.labels import class_names

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.data.tags import Span
    from finetune_cli.encoded import Columns, Examples, Ragged
    from finetune_cli.tasks.sections import Section


class TagScheme(str, Enum):
    auto = "auto"
    io = "io"
    iob1 = "iob1"
    iob2 = "iob2"
    iobes = "iobes"
    bmes = "bmes"
    bilou = "bilou"


class TagPolicy(str, Enum):
    auto = "auto"
    strict = "strict"
    repair = "repair"


class SpansEnd(str, Enum):
    exclusive = "exclusive"
    inclusive = "inclusive"


class LabelPieces(str, Enum):
    first = "first"
    all = "all"


@dataclass(kw_only=True, slots=True)
class TokenClassificationConfig(TaskConfig):
    """``task=token-classification``."""

    name: str = "token-classification"
    """Words or a text in, spans of named entities out."""
    scheme: TagScheme = TagScheme.auto
    """Scheme of the tags in the data, auto recognises it; an error where rows have spans. The model's own labels are always iob2."""
    tags: TagPolicy = TagPolicy.auto
    """Misplaced tags, and spans that cut a word: ``strict``: errors; ``repair``: mended and counted; auto mends tags alone."""
    spans_end: SpansEnd = SpansEnd.exclusive
    """Whether a span's end is the place behind its last character or that character itself; an error where rows have tags."""
    label_pieces: LabelPieces = LabelPieces.first
    """Which pieces of a word learn its label; ``all``: those after the first learn that the name goes on. The first one answers."""
    stride: int = option(64, least=0, most=100_000)
    """Pieces that neighbouring windows of a row longer than the model share, at most half a window."""


class TokenClassification(Task[TokenClassificationConfig]):
    """Facts: ``labels`` (tags in the order of the logits) and ``scheme`` (theirs; iob2 but for models from elsewhere)."""

    name = "token-classification"
    Config = TokenClassificationConfig
    auto_class = "AutoModelForTokenClassification"
    heads = ("ForTokenClassification",)
    pipeline = "token-classification"
    pairs = False
    stratified = False

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(cls, config: TokenClassificationConfig, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        from finetune_cli.data.tagged import Policy, Reading, arrange
        from finetune_cli.data.tags import Scheme

        scheme = None if config.scheme is TagScheme.auto else Scheme(config.scheme.value)
        reading = Reading(scheme, Policy(config.tags.value), config.spans_end is SpansEnd.inclusive)
        return arrange(rows, data, reading, labelled=labelled)

    @classmethod
    def learn(cls, config: TokenClassificationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        types = sorted({tag[2:] for tag in tags_of(rows, roles)[0] if tag != "O"})
        if not types:
            raise UserError("the training rows hold no name: every word is O", where=rows.files[0], fix="mark some, or data.label=COLUMN")
        return {"labels": ["O", *(f"{letter}-{name}" for name in types for letter in "BI")], "scheme": "iob2"}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        from finetune_cli.data.tags import recognise

        labels = class_names(model_config)
        if "O" not in labels:
            raise UserError(
                f"the model's labels are no tags: {', '.join(labels[:5])}",
                where="ckpt",
                fix="name a model that marks names, with a label O",
            )
        return {"labels": labels, "scheme": recognise([labels]).value}

    @property
    def labels(self) -> list[str]:
        """Tags in the order of the logits."""
        names: list[str] = self.facts["labels"]
        return names

    @property
    def types(self) -> list[str]:
        """Types of entities, in alphabetical order."""
        return sorted({name for row in ([label] for label in self.labels) for _, _, name in self._spans_of(row)})

    def _spans_of(self, tags: Sequence[str]) -> list[Span]:
        from finetune_cli.data.tags import Scheme, spans

        return spans(tags, Scheme(self.facts["scheme"]))

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> Gold:
        import numpy as np

        from finetune_cli.data.tagged import ENDS, STARTS
        from finetune_cli.encoded import Ragged

        values, offsets = tags_of(rows, roles)
        self._refuse_unknown(rows, values, offsets)
        if self.facts["scheme"] != "iob2":
            values = self._in_own_scheme(values, offsets)
        index = {label: i for i, label in enumerate(self.labels)}
        numbers = np.fromiter((index[tag] for tag in values), np.int32, len(values))
        return Gold(Ragged(numbers, offsets), lists_of(rows, STARTS), lists_of(rows, ENDS))

    def _refuse_unknown(self, rows: Rows, tags: list[str], offsets: np.ndarray) -> None:
        """An error at the first word whose type the model does not have."""
        import numpy as np

        from finetune_cli.data import unknown_label

        known = set(self.types)
        strange = {tag for tag in set(tags) if tag != "O" and tag[2:] not in known}
        if strange:
            at = next(i for i, tag in enumerate(tags) if tag in strange)
            row = int(np.searchsorted(offsets, at, side="right")) - 1
            raise unknown_label(tags[at][2:], self.types, rows.where(row, at - int(offsets[row])))

    def _in_own_scheme(self, tags: list[str], offsets: np.ndarray) -> list[str]:
        """IOB2 tags in the scheme of a model from elsewhere."""
        from finetune_cli.data.tags import Scheme, spans, write

        made: list[str] = []
        for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            made += write(spans(tags[start:end], Scheme.iob2), end - start, Scheme(self.facts["scheme"]))
        return made

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        tags, offsets = tags_of(rows, roles)
        self._refuse_unknown(rows, tags, offsets)
        cells = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        return [[tag[2:] for tag in tags[start:end] if tag.startswith("B-")] for start, end in cells]

    def told_facts(self) -> list[tuple[str, str]]:
        return [("types", f"{', '.join(self.types[:40])} ({len(self.types)}; {len(self.labels)} labels in {self.facts['scheme']})")]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        return encode_words(rows, roles, tokenizer, max_length=max_length, stride=self.config.stride, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        from finetune_cli.encoded import Ragged

        word: Any = columns[WORD]
        first = first_pieces(word)
        laid = {"input_ids": columns["input_ids"], "first": Ragged(first.astype(np.int64), word.offsets)}
        weights = {}
        if targets is not None:
            labels = self._piece_labels(word, first, targets.labels)
            weights["loss"] = float(np.count_nonzero(labels >= 0))
            laid["labels"] = Ragged(labels + 1, word.offsets)  # a layout fills up with 0
        inputs = layout.lay(laid)  # type: ignore[arg-type]
        answered = torch.nonzero(inputs.pop("first").reshape(-1)).squeeze(1)
        count = np.concatenate([[0], np.cumsum(first)])
        extra, host = {"first": answered}, {"words": np.diff(count[word.offsets])}
        return Batch(inputs, inputs.pop("labels") - 1 if targets is not None else None, weights, extra, host)

    def _piece_labels(self, word: Ragged, first: np.ndarray, labels: Ragged) -> np.ndarray:
        """[pieces] the label that each piece learns, -1 for none; ``labels`` are those of the words of each example's row."""
        import numpy as np

        learns = first if self.config.label_pieces is LabelPieces.first else word.values >= 0
        found = np.full(len(word.values), -1, np.int64)
        of = np.repeat(labels.offsets[:-1], word.lengths())[learns] + word.values[learns]
        found[learns] = labels.values[of]
        index = {label: i for i, label in enumerate(self.labels)}
        goes_on = np.array([index.get("I" + name[1:], i) if name.startswith("B") else i for i, name in enumerate(self.labels)])
        later = learns & ~first
        found[later] = goes_on[found[later]]
        return found

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        from torch.nn import functional as F

        assert batch.targets is not None, "a loss needs targets"
        logits = outputs.logits.float().flatten(0, 1)  # [B * T, K]
        return {"loss": F.cross_entropy(logits, batch.targets.flatten(), ignore_index=-1, reduction="sum")}

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        outputs = self.forward(model, batch)
        logits = outputs.logits.flatten(0, 1).index_select(0, batch.extra["first"]).float()  # [words, K]
        return {"logits": Flat(logits, batch.host["words"])}, self.loss(outputs, batch) if batch.targets is not None else {}

    def gather(self, outputs: Outputs, examples: Examples) -> tuple[Outputs, np.ndarray]:
        logits, rows = gather_words(outputs["logits"], examples)
        return {"logits": logits}, rows

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "entity_f1"

    def metric_names(self) -> frozenset[str]:
        entities = {"entity_f1", "entity_precision", "entity_recall", "entity_f1_macro", "entity_partial_f1"}
        return frozenset({"loss", "accuracy"} | entities)

    def _entities(self, labels: np.ndarray, offsets: np.ndarray) -> list[list[Span]]:
        """The spans of each row's labels, read as conlleval reads them."""
        names = self.labels
        tags = [names[i] for i in labels.tolist()]
        return [self._spans_of(tags[a:b]) for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]

    def _compared(self, evaluation: Evaluation) -> Compared:
        gold = evaluation.targets[evaluation.rows].labels
        logits: Ragged = evaluation.outputs["logits"]
        guess = logits.values.argmax(-1)
        return Compared(
            self._entities(gold.values, gold.offsets), self._entities(guess, logits.offsets), gold.values != guess, logits.offsets
        )

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.values(self._compared(evaluation).measures()(slice(None)))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        return metrics.score(self._compared(evaluation).measures(), len(evaluation.rows), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        """Offsets are characters of the row's text, the end exclusive; ``words`` are given where the row was a list of them."""
        from finetune_cli.data.tagged import ENDS, STARTS, came_as_words

        logits: Ragged = outputs["logits"]
        in_words = came_as_words(rows, roles.options["text"])
        for at, (text, starts, ends) in enumerate(cells_of(rows, (roles.text, STARTS, ENDS))):
            p = _softmax(logits.sequence(at))
            guess = p.argmax(-1)
            found = []
            for first, last, name in self._spans_of([self.labels[i] for i in guess.tolist()]):
                start, end = starts[first], ends[last - 1]
                sure = p[first:last].max(-1).mean()
                entity = {"text": text[start:end], "label": name, "start": start, "end": end, "score": figure(sure)}
                found.append(entity | {"words": [first, last]} if in_words else entity)
            yield {"entities": found}

    def told(self, target: Any) -> Any:
        starts, ends = target.starts.values.tolist(), target.ends.values.tolist()
        (found,) = self._entities(target.labels.values, target.labels.offsets)
        return [{"label": name, "start": starts[first], "end": ends[last - 1]} for first, last, name in found]

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli import baselines

        words = [words_of(texts, gold) for texts, gold in (train, test)]
        spans = [self._entities(gold.labels.values, gold.labels.offsets) for _, gold in (train, test)]
        return baselines.entities(words[0], spans[0], words[1], spans[1])

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        import numpy as np

        from finetune_cli.data.tagged import ENDS, STARTS
        from finetune_cli.tasks.entities.entity_findings import of_entities

        compared = self._compared(evaluation)
        sure = np.where(compared.wrong, _softmax(evaluation.outputs["logits"].values).max(-1), 0)

        def marked(i: int, spans: Sequence[Span]) -> str:
            (text, starts, ends) = next(cells_of(rows.slice(int(evaluation.rows[i]), 1), (roles.text, STARTS, ENDS)))
            return marked_text(text, [(starts[first], ends[last - 1], name) for first, last, name in spans])

        return of_entities(compared.gold, compared.predicted, compared.by_row(sure, np.maximum), self.types, marked, lengths)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64 [words, K]."""
    import numpy as np

    x = logits.astype(np.float64)
    powers = np.exp(x - x.max(-1, keepdims=True, initial=-np.inf))
    shares: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return shares


TASK = TokenClassification

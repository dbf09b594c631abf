"""fill-mask: texts whose masked tokens are to be found out, which makes an encoder at home in a domain before it learns labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig, TaskConfig, option
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.masks import masking

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples, Ragged
    from finetune_cli.tasks.masks.masked_findings import Found
    from finetune_cli.tasks.sections import Section


class Lines(str, Enum):
    rows = "rows"
    blocks = "blocks"


@dataclass(kw_only=True, slots=True)
class FillMaskConfig(TaskConfig):
    """``task=fill-mask``. null is what the checkpoint was trained with; in a new run, the value named."""

    name: str = "fill-mask"
    """Texts whose masked tokens are found out (domain-adaptive pretraining)."""
    mask_probability: float | None = option(None, above=0, below=1)
    """Share of the tokens that are masked; at least one in every example. null: 0.15."""
    whole_words: bool | None = None
    """Mask all pieces of a word together, as the tokenizer splits words. null: false."""
    random_share: float | None = option(None, least=0, most=1)
    """Of the masked tokens, the share that is shown as a random token instead of the mask token. null: 0.1."""
    keep_share: float | None = option(None, least=0, most=1)
    """Of the masked tokens, the share that is shown as it is. null: 0.1."""
    lines: Lines | None = None
    """``rows``: a row is an example, a longer one several; ``blocks``: rows are joined into examples of full length. null: rows."""
    top_k: int = option(5, least=1, most=1000)
    """How many tokens ``predict`` names for each mask."""


class FillMask(Task[FillMaskConfig]):
    """Facts: how tokens are masked, so that the exported model alone is scored on the same masks."""

    name = "fill-mask"
    Config = FillMaskConfig
    auto_class = "AutoModelForMaskedLM"
    heads = ("ForMaskedLM",)
    pipeline = "fill-mask"
    pairs = False
    labelled = False
    stratified = False

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(cls, config: FillMaskConfig, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        rows, roles, notes = super().arrange(config, rows, data, labelled=labelled)
        return rows, roles, [*notes, *(["data.label is not read: the texts are their own answers"] if data.label is not None else [])]

    @classmethod
    def learn(cls, config: FillMaskConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        facts = _DEFAULTS | _given(config)
        _ = cls(config, facts).masking  # shares that cannot be are an error now
        return facts

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        return dict(_DEFAULTS)

    @property
    def masking(self) -> masking.Masking:
        """As the options say, else as the checkpoint was trained."""
        told = self.facts | _given(self.config)
        if told["random_share"] + told["keep_share"] > 1:
            raise UserError(
                f"random and kept tokens are {told['random_share']:g} + {told['keep_share']:g} of the masked ones, more than all",
                where="task.random_share",
                fix="task.random_share=0.1 task.keep_share=0.1",
            )
        return masking.Masking(
            told["mask_probability"], told["whole_words"], told["random_share"], told["keep_share"], told["lines"] == Lines.blocks.value
        )

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        import numpy as np

        return np.zeros(len(rows), np.int8)  # the texts are their own answers

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        return None

    def told_facts(self) -> list[tuple[str, str]]:
        m = self.masking
        shares = (1 - m.random_share - m.keep_share, m.random_share, m.keep_share)
        shown = zip(shares, ("the mask token", "a random token", "themselves"), strict=True)
        what = "words, all pieces of one together" if m.whole_words else "tokens"
        told = f"{100 * m.probability:.3g} % of the {what}; shown as {', '.join(f'{name} {100 * share:.3g} %' for share, name in shown)}"
        return [("masks", told), ("examples", "rows joined into full blocks" if m.blocks else "rows, long ones in windows")]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        from finetune_cli.data import texts

        found = texts(rows, roles.text)
        if asked:
            found = [masking.with_mask_token(text, tokenizer) for text in found]
        return masking.encode(found, tokenizer, self.masking, max_length=max_length, first_row=first_row, asked=asked)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        from finetune_cli.encoded import Ragged

        ids = columns["input_ids"]
        assert isinstance(ids, Ragged)
        if targets is None:
            made = masking.Masked(ids.values == self.tokenizer.mask_token_id, np.asarray(ids.values))
        else:
            made = masking.mask(columns, self.masking, self.tokenizer, key=key)
        laid = layout.lay({"input_ids": Ragged(made.shown, ids.offsets), "chosen": Ragged(made.chosen, ids.offsets)})
        positions = laid.pop("chosen").flatten().nonzero()[:, 0]
        at = np.flatnonzero(made.chosen)
        example = np.searchsorted(ids.offsets, at, side="right") - 1
        extra = {"positions": positions, "place": torch.from_numpy(at - ids.offsets[example])}
        host = {"lengths": np.bincount(example, minlength=len(ids))}
        if targets is None:
            return Batch(laid, None, extra=extra, host=host)
        true = torch.from_numpy(ids.values[at].astype(np.int64))
        return Batch(laid, true, {"loss": float(len(at))}, extra, host)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        return {}

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Logits of the masked tokens, [M, V]."""
        from finetune_cli.tasks.masks.masked_head import logits_at

        return logits_at(model, batch.inputs, batch.extra["positions"])

    def loss(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        from torch.nn import functional as F

        assert batch.targets is not None, "a loss needs targets"
        return {"loss": F.cross_entropy(outputs.float(), batch.targets, reduction="sum")}

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        """Asked: the ids and probabilities of the best tokens of each mask. Scored: each masked token, its loss, rank and best guess."""
        logits = self.forward(model, batch).float()
        lengths = batch.host["lengths"]
        logs = logits.log_softmax(-1)
        best = logs.topk(min(self.config.top_k, logits.shape[-1]) if batch.targets is None else 1, dim=-1)
        found: dict[str, Tensor] = {"place": batch.extra["place"]}
        if batch.targets is None:
            found |= {"fills": best.indices, "scores": best.values.exp()}
            return {name: Flat(values, lengths) for name, values in found.items()}, {}
        its = logs.gather(1, batch.targets[:, None])
        shown = batch.inputs["input_ids"].flatten().index_select(0, batch.extra["positions"])
        found |= {"true": batch.targets, "shown": shown, "guess": best.indices[:, 0], "score": best.values[:, 0].exp()}
        found |= {"loss": -its[:, 0], "rank": (logs >= its).sum(-1) - 1}  # an equal counts against it
        return {name: Flat(values, lengths) for name, values in found.items()}, self.loss(logits, batch)

    def gather(self, outputs: Outputs, examples: Examples) -> tuple[Outputs, np.ndarray]:
        """Tokens of windows, or of blocks, to the rows that they stand in. Scored rows without a masked token have no answer."""
        import numpy as np

        from finetune_cli.encoded import Ragged

        place: Ragged = outputs["place"]
        row = np.repeat(examples.row, place.lengths())
        if (rows_of := examples.columns.get("token_row")) is not None:
            assert isinstance(rows_of, Ragged)
            row = rows_of.values[np.repeat(rows_of.offsets[:-1], place.lengths()) + place.values]
        answered = np.unique(row if "true" in outputs else examples.row)
        order = np.argsort(row, kind="stable")
        offsets = np.searchsorted(row[order], np.append(answered, np.iinfo(np.int64).max)).astype(np.int64)
        offsets[-1] = len(row)
        return {name: Ragged(values.values[order], offsets) for name, values in outputs.items()}, answered

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    def reproducible(self, model: nn.Module, batch: Batch) -> np.ndarray:
        return self.answers({"logits": model(**batch.inputs).logits.float().cpu().numpy()})

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "perplexity"

    def metric_names(self) -> frozenset[str]:
        return frozenset({"loss", "perplexity", "accuracy", "recall_at_5"})

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.masked(*_by_token(evaluation.outputs))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        sums = metrics.by_row(*_by_token(evaluation.outputs))
        return metrics.score(lambda rows: metrics.masked_measures(*(s[rows] for s in sums)), len(sums[0]), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        from finetune_cli.data import texts
        from finetune_cli.tasks.masks import masked_findings

        if "true" in outputs:
            yield from masked_findings.told_tokens(self._found(outputs))
            return
        for text, ids, scores in zip(texts(rows, roles.text), _each(outputs["fills"]), _each(outputs["scores"]), strict=True):
            pieces = self.tokenizer.convert_ids_to_tokens(ids[:, 0].tolist()) if len(ids) else []
            fills = [
                [{"token": self.tokenizer.decode([i]).strip(), "score": figure(s)} for i, s in zip(*both, strict=True)]
                for both in zip(ids.tolist(), scores.tolist(), strict=True)
            ]
            best = [(fill[0]["token"], masking.continues(str(piece))) for fill, piece in zip(fills, pieces, strict=True)]
            yield {"fills": fills, "filled": masking.filled(masking.with_mask_token(text, self.tokenizer), self.tokenizer.mask_token, best)}

    def remarks(self, outputs: Outputs, rows: Rows, roles: Roles) -> dict[str, int]:
        from finetune_cli.data import texts

        given, mask = texts(rows, roles.text), self.tokenizer.mask_token
        other = sum(masking.with_mask_token(text, self.tokenizer) != text for text in given)
        none = sum(not ids and bool(text.strip()) for ids, text in zip(outputs["fills"].lengths().tolist(), given, strict=True))
        told = {f"write a mask otherwise: it was read as {mask}": other, f"hold no mask ({mask}): nothing was filled": none}
        return {what: number for what, number in told.items() if number}

    def told(self, target: Any) -> Any:
        return None

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli.tasks.masks import masked_findings

        return masked_findings.frequencies(train[0], test[0], self.tokenizer)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import text_of
        from finetune_cli.tasks.masks import masked_findings

        found = self._found(evaluation.outputs)
        whole = None if self.masking.blocks else lengths
        return masked_findings.of_masked(found, evaluation.rows, partial(text_of, rows, roles), whole)

    def _found(self, outputs: Outputs) -> Found:
        from finetune_cli.tasks.masks.masked_findings import Found

        return Found(tokenizer=self.tokenizer, **outputs)


TASK = FillMask

_DEFAULTS: Facts = {"mask_probability": 0.15, "whole_words": False, "random_share": 0.1, "keep_share": 0.1, "lines": Lines.rows.value}


def _given(config: FillMaskConfig) -> Facts:
    """The options of masking that are set."""
    options = {
        "mask_probability": config.mask_probability,
        "whole_words": config.whole_words,
        "random_share": config.random_share,
        "keep_share": config.keep_share,
        "lines": config.lines.value if config.lines else None,
    }
    return {name: value for name, value in options.items() if value is not None}


def _each(values: Ragged) -> Iterator[np.ndarray]:
    return (values.sequence(i) for i in range(len(values)))


def _by_token(outputs: Outputs) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(losses, ranks, answers that they belong to, number of answers) of all masked tokens."""
    import numpy as np

    count = len(outputs["loss"])
    return outputs["loss"].values, outputs["rank"].values, np.repeat(np.arange(count), outputs["loss"].lengths()), count

"""text2text-generation: a text in, another text out, such as a translation or a summary; scored on what the model writes by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from finetune_cli.config.schema import DataConfig
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Task
from finetune_cli.tasks.text2text import seq2seq
from finetune_cli.tasks.text2text.text2text_options import DEFAULTS, Text2TextGenerationConfig, Tokenize, refuse_contradictions
from finetune_cli.tasks.tokens import encode_texts, tokenise_targets

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import References, Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.metrics import TextTable
    from finetune_cli.tasks.sections import Section


class Text2TextGeneration(Task[Text2TextGenerationConfig]):
    """Facts: ``prefix``, ``target_length``, ``tokenize`` and ``generation``, the options of training that an exported model goes on with.

    A row's references are a list of texts in one column; the first is what the model learns and what the loss is of.
    """

    name = "text2text-generation"
    Config = Text2TextGenerationConfig
    auto_class = "AutoModelForSeq2SeqLM"
    heads = ("ForConditionalGeneration", "MTModel")
    architecture = "encoder-decoder"
    pairs = False
    stratified = False

    def __init__(self, config: Text2TextGenerationConfig, facts: Facts, tokenizer: Any = None) -> None:
        super().__init__(config, facts, tokenizer)
        refuse_contradictions(self.generation)

    @property
    def generation(self) -> dict[str, Any]:
        """How text is generated: the user's options, else those of training, else the defaults."""
        return {**DEFAULTS, **self.facts["generation"], **_chosen(self.config)}

    @property
    def prefix(self) -> str:
        """What stands before every source."""
        return str(self.facts["prefix"] if self.config.prefix is None else self.config.prefix)

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(cls, config: Text2TextGenerationConfig, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        from finetune_cli.tasks.text2text.text2text_columns import arrange

        return arrange(rows, data, config.references, labelled=labelled)

    @classmethod
    def learn(cls, config: Text2TextGenerationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from finetune_cli import metrics
        from finetune_cli.tasks.text2text.text2text_columns import words_of

        metrics.require_generation()
        tokenize = config.tokenize.value if config.tokenize != Tokenize.auto else words_of(rows, roles)
        length = config.target_length
        return {"prefix": config.prefix or "", "target_length": length, "tokenize": tokenize, "generation": _chosen(config)}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        return {"prefix": "", "target_length": None, "tokenize": Tokenize.v13a.value, "generation": {}}

    @property
    def tokenize(self) -> str:
        """sacrebleu's name of how words are cut."""
        return str(self.facts["tokenize"] if self.config.tokenize == Tokenize.auto else self.config.tokenize.value)

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> References:
        from finetune_cli import metrics
        from finetune_cli.data import References

        metrics.require_generation()
        return References(rows.column(roles.labels[0]))

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        return None

    def told_facts(self) -> list[tuple[str, str]]:
        chosen = self.generation
        how = "sampled" if chosen["do_sample"] else "greedy" if chosen["num_beams"] == 1 else f"{chosen['num_beams']} beams"
        beside = {name: value for name, value in chosen.items() if value != DEFAULTS[name]}
        others = ", ".join(f"{name}={value}" for name, value in beside.items() if name not in ("max_new_tokens", "num_beams", "do_sample"))
        told = [("generation", f"{how}, at most {chosen['max_new_tokens']} tokens" + (f", {others}" if others else ""))]
        return told + ([("prefix", repr(self.prefix))] if self.prefix else [])

    def recipe(self) -> Any:
        return [self.prefix, self._target_length]

    @property
    def _target_length(self) -> int | None:
        length: int | None = self.config.target_length or self.facts["target_length"]
        return length

    @classmethod
    def vocabulary_texts(cls, rows: Rows, roles: Roles) -> Iterator[str]:
        from finetune_cli.data import References

        yield from super().vocabulary_texts(rows, roles)
        for several in References(rows.column(roles.labels[0])):
            yield from several

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        from dataclasses import replace

        import numpy as np

        from finetune_cli.data import References

        sources = encode_texts(rows, roles, tokenizer, max_length=max_length, first_row=first_row, prefix=self.prefix)
        sources.columns["place"] = (rows.file_of.astype(np.int64) << 40) + rows.row_of
        if asked or not roles.labels or not rows.has(roles.labels[0]):
            return sources
        limit = self._target_length or max_length
        first = [several[0] if several else "" for several in References(rows.column(roles.labels[0]))]
        lengths, sources.columns["labels"] = tokenise_targets(tokenizer, first, limit)
        cut = (lengths > limit) & (sources.lengths() < max_length)
        counts = sources.counts
        lost = int(np.maximum(lengths - limit, 0).sum())
        return replace(sources, counts=replace(counts, cut_rows=counts.cut_rows + int(cut.sum()), lost=counts.lost + lost))

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        import numpy as np
        import torch

        from finetune_cli.encoded import Ragged

        sources, labels = columns["input_ids"], columns.get("labels")
        assert isinstance(sources, Ragged)
        inputs = layout.lay({"input_ids": sources})
        extra = {"place": torch.from_numpy(np.ascontiguousarray(columns["place"]))}
        if targets is None:
            return Batch(inputs, None, extra=extra)
        assert isinstance(labels, Ragged)
        lengths = labels.lengths()
        real = np.arange(int(lengths.max()))[None, :] < lengths[:, None]
        block = np.full(real.shape, -100, np.int64)
        block[real] = labels.values
        inputs["labels"] = torch.from_numpy(block)
        extra["real"] = torch.from_numpy(np.flatnonzero(real))
        return Batch(inputs, torch.from_numpy(labels.values.astype(np.int64)), {"loss": float(lengths.sum())}, extra)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        return {}

    def adjust(self, model: nn.Module) -> None:
        seq2seq.settle_generation(model, self.generation)
        seq2seq.prove_head(model)

    def forward(self, model: nn.Module, batch: Batch) -> seq2seq.Decoded:
        return seq2seq.decode_targets(model, batch.inputs)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        assert batch.targets is not None, "a loss needs targets"
        return {"loss": seq2seq.target_loss(outputs, batch.targets, batch.extra["real"], self.config.label_smoothing)}

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        """Texts that the model writes by itself; with targets also the loss of those, which it reads."""
        places, wanted = batch.extra["place"].cpu().numpy(), self.generation["num_return_sequences"]
        found = seq2seq.generate(model, batch.inputs, places, sequences=wanted, seed=self.config.sampling_seed)
        outputs: dict[str, Tensor | Flat] = {_name(k): flat for k, flat in enumerate(found)}
        return outputs, self.loss(self.forward(model, batch), batch) if batch.targets is not None else {}

    def reproducible(self, model: nn.Module, batch: Batch) -> np.ndarray:
        logits: np.ndarray = self.forward(model, batch).logits().float().cpu().numpy()
        return logits

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "chrf"

    def metric_names(self) -> frozenset[str]:
        return frozenset({"loss", "bleu", "chrf", "rouge1", "rouge2", "rougeL"})

    def written(self, outputs: Outputs, number: int = 0) -> list[str]:
        """The texts of every row; ``number`` counts further ones of a row."""
        ids = outputs[_name(number)]
        texts: list[str] = self.tokenizer.batch_decode([ids.sequence(i) for i in range(len(ids))], skip_special_tokens=True)
        return texts

    def _counted(self, evaluation: Evaluation) -> TextTable:
        from finetune_cli import metrics

        return metrics.per_text(self.written(evaluation.outputs), evaluation.targets[evaluation.rows], tokenize=self.tokenize)

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.generation(self._counted(evaluation))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        table = self._counted(evaluation)
        return metrics.score(lambda rows: metrics.generation_measures(table, rows), len(table), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        several = [self.written(outputs, k) for k in range(len(outputs)) if _name(k) in outputs]
        for texts in zip(*several, strict=True):
            yield {"generated": texts[0] if len(texts) == 1 else list(texts)}

    def told(self, target: Any) -> Any:
        return target[0] if len(target) == 1 else list(target)

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli.tasks.text2text import text2text_findings

        return text2text_findings.baselines(*test, tokenize=self.tokenize)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.data import texts
        from finetune_cli.tasks.text2text import text2text_findings

        ids = evaluation.outputs[_name(0)]
        return text2text_findings.sections(
            sources=texts(rows.take(evaluation.rows), roles.text),
            references=evaluation.targets[evaluation.rows],
            written=self.written(evaluation.outputs),
            tokens=ids.lengths(),
            most=self.generation["max_new_tokens"],
            source_tokens=lengths,
            table=self._counted(evaluation),
            tokenize=self.tokenize,
        )


TASK = Text2TextGeneration


def _chosen(config: Text2TextGenerationConfig) -> dict[str, Any]:
    """The generation options that somebody set."""
    every = {
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "num_beams": config.num_beams,
        "length_penalty": config.length_penalty,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "repetition_penalty": config.repetition_penalty,
        "do_sample": config.do_sample,
        "temperature": config.temperature,
        "top_k": config.top_k,
        "top_p": config.top_p,
        "num_return_sequences": config.num_return_sequences,
    }
    return {name: value for name, value in every.items() if value is not None}


def _name(number: int) -> str:
    """The output that holds the texts of every row that come as number ``number``."""
    return f"generated{number}"

"""text-generation: plain text to go on with, or conversations whose answers are learnt; new text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from finetune_cli.config.schema import DataConfig
from finetune_cli.errors import UserError
from finetune_cli.tasks.base import Batch, Evaluation, Facts, Flat, Layout, Outputs, Prediction, Score, Shown, Task
from finetune_cli.tasks.figures import figure
from finetune_cli.tasks.sections import Table
from finetune_cli.tasks.writing.generation_options import Lines, LossOn, TextGenerationConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from finetune_cli.data import Roles, Rows
    from finetune_cli.encoded import Columns, Examples
    from finetune_cli.tasks.sections import Section


class TextGeneration(Task[TextGenerationConfig]):
    """Facts: ``chat`` (whether it learnt from conversations; None where a plain Hugging Face model does not say)."""

    name = "text-generation"
    Config = TextGenerationConfig
    auto_class = "AutoModelForCausalLM"
    heads = ("ForCausalLM", "LMHeadModel")
    pipeline = "text-generation"
    architecture = "decoder"
    pairs = False
    labelled = False
    stratified = False

    def __init__(self, config: TextGenerationConfig, facts: Facts, tokenizer: Any = None) -> None:
        super().__init__(config, facts, tokenizer)
        several, most = config.num_return_sequences, config.num_beams
        if several > most and not config.do_sample:
            raise UserError(
                f"{several} continuations of a prompt would be the same one {'' if most == 1 else f'beyond {most} '}without sampling",
                where="task.num_return_sequences",
                fix=f"task.do_sample=true, or task.num_beams={several}",
            )
        if "" in config.stop_strings:
            raise UserError("an empty stop string stops at once", where="task.stop_strings", fix="task.stop_strings=[END]")

    def reading_with(self, tokenizer: Any) -> Self:
        from finetune_cli.data.chat_templates import TEMPLATES

        if self.config.template is not None:
            tokenizer.chat_template = TEMPLATES[self.config.template.value]
        return super().reading_with(tokenizer)

    # -- rows ----------------------------------------------------------------------------------
    @classmethod
    def arrange(cls, config: TextGenerationConfig, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        from finetune_cli.data import find_roles
        from finetune_cli.data.conversations import find_form, with_conversations

        form, notes = find_form(rows, data, config.format.value)
        if form is not None:
            return *with_conversations(rows, form, data), notes
        if data.label is not None:
            raise UserError("plain text has no label or answer", where="data.label", fix="data.label=null, or task.format=prompt")
        return rows, *find_roles(rows, data, labelled=False, pairs=False)

    @classmethod
    def arrange_split(cls, config: TextGenerationConfig, rows: Rows, data: DataConfig, *, labelled: bool) -> tuple[Rows, Roles, list[str]]:
        from finetune_cli.data.conversations import CONVERSATION
        from finetune_cli.data.passages import from_text_files, joined

        made, roles, notes = cls.arrange(config, rows, data, labelled=labelled)
        auto = config.lines == Lines.auto and from_text_files(rows, data)
        if made.has(CONVERSATION) or not (auto or config.lines == Lines.joined):
            return made, roles, notes
        passages, roles, more = joined(rows, roles.text)
        return passages, roles, notes + more

    @classmethod
    def learn(cls, config: TextGenerationConfig, data: DataConfig, rows: Rows, roles: Roles) -> Facts:
        from finetune_cli.data.conversations import CONVERSATION

        return {"chat": rows.has(CONVERSATION)}

    @classmethod
    def facts_of(cls, model_config: Any) -> Facts:
        return {"chat": None}

    def read_targets(self, data: DataConfig, rows: Rows, roles: Roles) -> np.ndarray:
        """Nothing: a row is its own answer, and collate makes the targets out of its tokens."""
        import numpy as np

        return np.zeros(len(rows), np.int8)

    def label_cells(self, data: DataConfig, rows: Rows, roles: Roles) -> list[Any] | None:
        return None

    def told_facts(self) -> list[tuple[str, str]]:
        if not self.facts["chat"]:
            return [("learns", "plain text" + (", attention within documents" if self.config.attention_within_documents else ""))]
        on = "assistant turns with their end token" if self.config.loss_on == LossOn.assistant else "all turns"
        return [("learns", f"conversations; loss on {on}; template: {self._template}")]

    def encode(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int, asked: bool = False) -> Examples:
        from finetune_cli.data.conversations import CONVERSATION, conversations
        from finetune_cli.tasks.writing.blocks import encode_blocks
        from finetune_cli.tasks.writing.supervision import encode_chats

        chat = rows.has(CONVERSATION)
        if asked:
            return self._prompts(rows, roles, tokenizer, max_length=max_length, first_row=first_row)
        if self.facts["chat"] is not None and self.facts["chat"] != chat:
            kinds = ("conversations", "plain texts")
            raise UserError(
                f"the model learnt from {kinds[not self.facts['chat']]}, these rows are {kinds[not chat]}",
                where=rows.where(0),
                fix="data.text=COLUMN names the column, task.format its form",
            )
        if not chat:
            apart = self.config.attention_within_documents
            return encode_blocks(rows, roles, tokenizer, max_length=max_length, first_row=first_row, apart=apart)
        self._require_template(tokenizer)
        return encode_chats(
            rows,
            conversations(rows),
            tokenizer,
            max_length=max_length,
            first_row=first_row,
            everything=self.config.loss_on == LossOn.all,
            too_long=self.config.too_long.value,
        )

    @property
    def _template(self) -> str:
        return self.config.template.value if self.config.template is not None else "the tokenizer's own"

    def _require_template(self, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template", where="task.template", fix="task.template=chatml, llama3 or alpaca"
            )

    def _prompts(self, rows: Rows, roles: Roles, tokenizer: Any, *, max_length: int, first_row: int) -> Examples:
        """What is to be gone on with, one example a row."""
        from finetune_cli.data import texts
        from finetune_cli.data.conversations import CONVERSATION, conversations, question
        from finetune_cli.tasks.writing import prompts

        room = prompts.room(max_length, self.config.max_new_tokens)
        if self.facts["chat"] or self.facts["chat"] is None and rows.has(CONVERSATION):
            self._require_template(tokenizer)
            asked: list[prompts.Question] = (
                [(question(c), c.get("tools")) for c in conversations(rows)]
                if rows.has(CONVERSATION)
                else [([{"role": "user", "content": text}], None) for text in texts(rows, roles.text)]
            )
            return prompts.of_chats(rows, asked, tokenizer, room=room, first_row=first_row)
        return prompts.of_texts(rows, roles, tokenizer, room=room, first_row=first_row)

    def collate(self, columns: Columns, targets: Any, layout: Layout, *, key: int) -> Batch:
        from finetune_cli.tasks.writing import language_batch

        return language_batch.asked(columns, self._pad) if targets is None else language_batch.learnt(columns, layout)

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)

    # -- model ---------------------------------------------------------------------------------
    def head(self) -> dict[str, Any]:
        return {}

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end what is generated: the end of text, and in a conversation the end of a turn."""
        from finetune_cli.tasks.writing.blocks import end_of_text
        from finetune_cli.tasks.writing.supervision import end_of_turn

        turn = end_of_turn(self.tokenizer) if self.facts["chat"] is not False and self.tokenizer.chat_template else None
        return frozenset({end_of_text(self.tokenizer)} | ({turn} if turn is not None else set()))

    def adjust(self, model: nn.Module) -> None:
        from finetune_cli.tasks.writing import documents

        settings: Any = model.generation_config
        settings.eos_token_id = sorted(self.ends | _several(settings.eos_token_id))
        settings.pad_token_id = self._pad
        if self.config.attention_within_documents:
            documents.require_apart(model)

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Hidden states before the supervised tokens; ``loss`` applies the head, chunk by chunk."""
        from finetune_cli.tasks.writing.token_loss import hidden_of

        places = {name: batch.extra[name] for name in ("position_ids",) if name in batch.extra}
        return hidden_of(model, batch.extra["before"], **batch.inputs, **places)

    def loss(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        from finetune_cli.tasks.writing.token_loss import total

        assert batch.targets is not None, "a loss needs targets"
        return {"loss": total(outputs, batch.targets)}

    def infer(self, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor | Flat], dict[str, Tensor]]:
        from finetune_cli.tasks.writing.token_loss import each

        if batch.targets is None:
            return self._continued(model, batch), {}
        losses, hits = each(self.forward(model, batch), batch.targets)
        counts = batch.extra["counts"].cpu().numpy()
        return {
            "losses": Flat(losses, counts),
            "hits": Flat(hits, counts),
            "places": Flat(batch.extra["places"], counts),
            "bytes": batch.extra["bytes"],
        }, {"loss": losses.sum()}

    def _continued(self, model: nn.Module, batch: Batch) -> dict[str, Tensor | Flat]:
        from finetune_cli.tasks.writing.generation import Wish, generate

        ends = self.ends | frozenset(_several(model.generation_config.eos_token_id))  # type: ignore[union-attr]
        numbers = batch.extra["number"].cpu().numpy()
        wish = Wish.of(self.config, ends=ends, pad=self._pad)
        found = generate(model, batch.inputs["input_ids"], batch.extra["mask"], numbers, wish, self.tokenizer)
        return {f"sequence_{number}": flat for number, flat in enumerate(found)}

    def answers(self, outputs: Outputs) -> np.ndarray:
        logits: np.ndarray = outputs["logits"]
        return logits

    def reproducible(self, model: nn.Module, batch: Batch) -> np.ndarray:
        import torch

        from finetune_cli.tasks.writing.token_loss import hidden_of

        ids = batch.inputs["input_ids"]
        hidden = hidden_of(model, torch.arange(ids.numel(), device=ids.device), input_ids=ids)
        found: np.ndarray = hidden.head(hidden.states).cpu().numpy()
        return found

    # -- results -------------------------------------------------------------------------------
    @property
    def monitor(self) -> str:
        return "perplexity"

    def metric_names(self) -> frozenset[str]:
        return frozenset({"loss", "accuracy", "perplexity", "bits_per_byte"})

    def _sums(self, outputs: Outputs) -> tuple[np.ndarray, ...]:
        """(nats, tokens, bytes, hits) of each example, [N]."""
        from finetune_cli.tasks.writing.language_report import sums

        return sums(outputs)

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        from finetune_cli import metrics

        return metrics.language(*self._sums(evaluation.outputs))

    def score(self, evaluation: Evaluation) -> Score:
        from finetune_cli import metrics

        found = self._sums(evaluation.outputs)
        return metrics.score(lambda rows: metrics.language_measures(*(a[rows] for a in found)), len(found[0]), seed=evaluation.seed)

    def decode(self, outputs: Outputs, rows: Rows, roles: Roles) -> Iterator[Prediction]:
        from finetune_cli.tasks.writing.generation import written

        if "losses" in outputs:
            for nats, tokens, _, hits in zip(*self._sums(outputs), strict=True):
                yield {"loss": figure(nats / max(tokens, 1)), "tokens": int(tokens), "correct": int(hits)}
            return
        sequences = [outputs[f"sequence_{number}"] for number in range(self.config.num_return_sequences)]
        for i in range(len(rows)):
            found = [written(self.tokenizer, s.sequence(i), self.config.stop_strings) for s in sequences]
            yield {"generated": found if len(found) > 1 else found[0]}

    def told(self, target: Any) -> Any:
        return None

    def baselines(self, train: tuple[Sequence[str], Any], test: tuple[Sequence[str], Any]) -> dict[str, dict[str, float]]:
        from finetune_cli import baselines

        return {} if self.facts["chat"] else baselines.language(train[0], test[0])

    def ledger(self, examples: Mapping[str, Examples], rows: Mapping[str, Rows]) -> Table | None:
        from finetune_cli.tasks.writing.language_report import ledger

        return ledger(examples, rows, chat=bool(self.facts["chat"]))

    def shown(self, examples: Examples, rows: Rows) -> list[Shown]:
        from finetune_cli.tasks.writing.language_report import shown

        return shown(examples, rows, self.tokenizer)

    def sections(self, evaluation: Evaluation, rows: Rows, roles: Roles, *, lengths: np.ndarray) -> list[Section]:
        from finetune_cli.tasks.writing.language_report import sections

        return sections(evaluation, rows, roles, lengths)


TASK = TextGeneration


def _several(ids: Any) -> set[int]:
    """A setting that is None, one id or a list of ids."""
    return set() if ids is None else {int(ids)} if isinstance(ids, int) else set(map(int, ids))

"""Conversations to tokens, and which of them are learnt from: the template writes, and its own prefixes say where each answer stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_cli.errors import UserError
from finetune_cli.tasks.writing.blocks import backend, token_bytes
from finetune_cli.tasks.writing.deadline import deadline

if TYPE_CHECKING:
    import numpy as np

    from finetune_cli.data import Rows, TokenCounts
    from finetune_cli.encoded import Columns, Examples

Span = tuple[int, int]
"""Characters of a rendered conversation, from and to."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as the template writes it, and the spans of its supervised answers with all that the template puts behind them."""

    text: str
    answers: list[Span]


TEMPLATE_SECONDS = 10.0
"""Processor time that a template may take for one conversation; a thousandth of it is usual."""


class Unfit(ValueError):
    """The template and the conversation do not go together."""


def render(tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, *, ask: bool = False) -> str:
    """The text that the template makes of messages. Raises Unfit with the template's own complaint."""
    try:
        plain = [{k: v for k, v in message.items() if k != "supervised"} for message in messages]
        with deadline(TEMPLATE_SECONDS):
            return str(tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise Unfit(f"the chat template refuses the conversation: {' '.join(str(error).split())[:160]}") from error


def rendered(tokenizer: Any, conversation: dict[str, Any]) -> Rendered:
    """The whole conversation, and where its answers stand. Raises Unfit where the template leaves something out, or writes a turn
    otherwise as soon as others follow."""
    messages, tools = conversation["messages"], conversation.get("tools")
    whole = render(tokenizer, messages, tools)
    _nothing_left_out(whole, messages, tools)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("supervised") is False:
            continue
        before = render(tokenizer, messages[:i], tools, ask=True) if i or tools else _opening(tokenizer, whole)
        after = render(tokenizer, messages[: i + 1], tools)
        if not (whole.startswith(before) and whole.startswith(after) and after.startswith(before)):
            raise Unfit("the chat template writes an answer otherwise when it is asked for, or when turns follow it")
        answers.append((len(before), len(after)))
    return Rendered(whole, answers)


def _opening(tokenizer: Any, whole: str) -> str:
    """What stands before an answer that begins a conversation."""
    try:
        return render(tokenizer, [], None, ask=True)
    except Unfit:
        raise Unfit("the conversation begins with an answer, which the chat template does not know") from None


def _nothing_left_out(whole: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> None:
    """Every content, tool and call must be found in what the template wrote."""
    for message in messages:
        if message["content"].strip() not in whole:
            raise Unfit(f"the chat template leaves out a turn of {message['role']!r}")
        for call in message.get("tool_calls", []):
            if call["function"]["name"] not in whole:
                raise Unfit("the chat template does not write tool calls")
    for tool in tools or []:
        if str(tool["function"].get("name", "")) not in whole:
            raise Unfit("the chat template does not write tools")


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of tokens that are marks, not text."""
    return {int(i) for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(map(int, tokenizer.all_special_ids))


def end_of_turn(tokenizer: Any) -> int | None:
    """The mark with which the template ends an answer; None where it ends with plain text."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        found = rendered(tokenizer, {"messages": messages})
    except Unfit:
        return None
    (start, stop) = found.answers[0]
    marks = special_ids(tokenizer)
    ids = backend(tokenizer).encode(found.text[start:stop], add_special_tokens=False).ids
    return next((i for i in reversed(ids) if i in marks), None)


@dataclass(frozen=True, slots=True)
class Supervised:
    """One conversation in tokens; each [T]."""

    ids: np.ndarray
    counted: np.ndarray
    bytes: np.ndarray
    ends: np.ndarray
    """Where an answer's mark of the end of a turn stands."""
    turns: int
    """Answers that are supervised."""

    def cut(self, length: int) -> Supervised:
        """The first so many tokens."""
        return Supervised(self.ids[:length], self.counted[:length], self.bytes[:length], self.ends[:length], self.turns)


def supervise(found: Rendered, encoding: Any, marks: set[int], *, everything: bool) -> Supervised:
    """Tokens of a rendered conversation. An answer's tokens count up to its last mark, unless text follows that."""
    import numpy as np

    ids = np.array(encoding.ids, np.int32)
    if not len(ids):
        raise Unfit("the conversation has no tokens")
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    marked = np.isin(ids, np.fromiter(marks, np.int64, len(marks)))
    counted, ends = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for start, stop in found.answers:
        inside = np.flatnonzero((spans[:, 0] >= start) & (spans[:, 1] <= stop) & (spans[:, 1] > spans[:, 0]))
        last = inside[marked[inside]][-1:]
        if len(last) and not found.text[spans[last[0], 1] : stop].strip():
            inside = inside[inside <= last[0]]
            ends[last[0]] = True
        counted[inside] = True
    if everything:
        counted[:] = True
    counted[0] = False  # nothing stands before it
    return Supervised(ids, counted, token_bytes(found.text, encoding.offsets) * ~marked, ends, len(found.answers))


def encode_chats(
    rows: Rows, found: list[dict[str, Any]], tokenizer: Any, *, max_length: int, first_row: int, everything: bool, too_long: str
) -> Examples:
    """One example a conversation. Those longer than ``max_length`` are dropped, cut or refused; nothing supervised in one is an error."""
    import numpy as np

    from finetune_cli.data import TokenCounts

    made = _supervised(rows, found, tokenizer, everything=everything)
    lengths = np.array([len(m.ids) for m in made], np.int64)
    over = np.flatnonzero(lengths > max_length)
    if len(over) and too_long == "refuse":
        raise UserError(
            f"{len(over):,} conversations have more than {max_length:,} tokens, this one {lengths[over[0]]:,}",
            where=rows.named(over),
            fix="a larger data.max_length, task.too_long=drop, or task.too_long=cut",
        )
    at = np.flatnonzero(lengths <= max_length) if too_long == "drop" else np.arange(len(made))
    kept = [made[i].cut(max_length) for i in at]
    if empty := [int(i) for i, one in zip(at, kept, strict=True) if not one.counted.any()]:
        raise _nothing_supervised(rows, empty, [found[i] for i in empty])
    cut = np.intersect1d(at, over)
    lost = int((lengths[cut] - max_length).sum())
    counts = TokenCounts(longest=int(lengths.max(initial=0)), cut_rows=len(cut), lost=lost)
    return _examples(kept, at + first_row, counts, tokenizer)


def _supervised(rows: Rows, found: list[dict[str, Any]], tokenizer: Any, *, everything: bool) -> list[Supervised]:
    """Every conversation in tokens; where template and row do not go together, an error with the row's line."""
    marks = special_ids(tokenizer)
    i = 0
    try:
        told = []
        for i in range(len(found)):
            told.append(rendered(tokenizer, found[i]))
        encodings = backend(tokenizer).encode_batch([r.text for r in told], add_special_tokens=False)
        made = []
        for i in range(len(told)):
            made.append(supervise(told[i], encodings[i], marks, everything=everything))
        return made
    except Unfit as error:
        raise UserError(str(error), where=rows.where(i), fix="another task.template (chatml, llama3, alpaca), or mend the row") from error


def _examples(kept: list[Supervised], row: np.ndarray, counts: TokenCounts, tokenizer: Any) -> Examples:
    from dataclasses import replace

    import numpy as np

    from finetune_cli.encoded import Examples, Ragged

    ids = Ragged.of([k.ids for k in kept])
    columns: Columns = {
        "input_ids": ids,
        "supervised": Ragged.of([k.counted for k in kept], np.int8),
        "bytes": np.array([int(k.bytes[k.counted].sum()) for k in kept], np.int64),
        "turns": np.array([k.turns for k in kept], np.int64),
        "ended": np.array([int((k.ends & k.counted).sum()) for k in kept], np.int64),
    }
    unknown = int((ids.values == tokenizer.unk_token_id).sum()) if tokenizer.unk_token_id is not None else 0
    return Examples(columns, row, replace(counts, tokens=len(ids.values), unknown=unknown))


def _nothing_supervised(rows: Rows, empty: list[int], found: list[dict[str, Any]]) -> UserError:
    """Why nothing of a row is learnt from, and where the rows stand."""
    answers = [[m for m in c["messages"] if m["role"] == "assistant"] for c in found]
    if not answers[0]:
        what, fix = "has no answer to learn from", "give every row an assistant's turn, or drop the row"
    elif all(m.get("supervised") is False for m in answers[0]):
        what, fix = "says of every answer that it is not to be learnt from (weight 0)", "drop the row"
    else:
        what, fix = "has no supervised token: it is cut before its first answer", "a larger data.max_length, or task.too_long=drop"
    return UserError(f"the conversation {what}", where=rows.named(empty), fix=fix)

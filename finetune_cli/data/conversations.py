"""Conversations: whatever form rows bring them in, as one column of JSON, and a plain text of each for people.

Known forms: ``messages`` (role, content), ShareGPT (from, value), and a prompt with its answer in two columns (Alpaca's instruction, input
and output among them). A cell of text where a list of turns is expected is JSON, or else one turn of the user.
Functions here raise ValueError for what they cannot understand; the row's line is added in one place.
"""

# ruff: noqa: TRY004 (a value of the wrong type is a wrong value here)

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from finetune_cli.config.schema import DataConfig
from finetune_cli.data.header import plain
from finetune_cli.data.roles import NoColumn, Roles, require
from finetune_cli.data.rows import Rows
from finetune_cli.errors import UserError

CONVERSATION = "conversation as JSON"
"""Our column: ``{"messages": [...], "tools": [...]}``."""
CONVERSATION_TEXT = "conversation as text"
"""Our column for people, and for counting what stands twice."""
TURNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
"""Names of columns that hold a list of turns."""
PROMPTS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
)
"""Names of columns that hold a prompt, what it is about, and the answer."""
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response"), "tool"),
}
"""What speakers are called, to the four roles of chat templates."""
_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Form:
    """Which columns hold what. ``answer`` is None where one column holds all turns."""

    name: str
    turns: str
    about: str | None = None
    answer: str | None = None


def find_form(rows: Rows, data: DataConfig, wanted: str) -> tuple[Form | None, list[str]]:
    """The form of the rows and notes on what was inferred; None where they are plain texts. ``wanted``: as in ``task.format``."""
    if wanted == "text":
        return None, []
    if isinstance(data.text, str):
        return _named(rows, data, data.text, wanted), []
    by_plain = {plain(column): column for column in reversed(rows.columns)}
    if wanted in ("auto", "messages", "sharegpt"):
        for name in TURNS:
            column = by_plain.get(name)
            if column is not None and (wanted != "auto" or _holds_turns(rows, column)):
                return Form(_kind(rows, column), column), [f"conversations: column {column!r}, by its name"]
    if wanted in ("auto", "alpaca", "prompt"):
        for prompt, about, answer in PROMPTS:
            if prompt in by_plain and answer in by_plain:
                more = by_plain.get(about) if about else None
                columns = [by_plain[prompt], *([more] if more else []), by_plain[answer]]
                found = Form("alpaca" if prompt == "instruction" else "prompt", by_plain[prompt], more, by_plain[answer])
                return found, [f"conversations: a prompt and its answer in columns {', '.join(map(repr, columns))}, by their names"]
    if wanted == "auto":
        return None, []
    expected = (
        "a column 'messages' or 'conversations'" if wanted in ("messages", "sharegpt") else "columns such as 'prompt' and 'completion'"
    )
    raise NoColumn(
        f"the rows are not of the form {wanted}: expected {expected}, the columns are {', '.join(map(repr, rows.columns))}",
        where=f"{rows.files[0]}, task.format",
        fix="data.text=COLUMN" + ("" if wanted in ("messages", "sharegpt") else " data.label=COLUMN") + ", or another task.format",
    )


def _named(rows: Rows, data: DataConfig, column: str, wanted: str) -> Form | None:
    """The form where the user, or the run, names the column."""
    require(rows, "data.text", column)
    if data.label is not None and not isinstance(data.label, str):
        raise UserError("a conversation has one answer", where="data.label", fix="data.label=COLUMN")
    if data.label is not None and wanted in ("auto", "alpaca", "prompt"):
        about = data.text_pair if data.text_pair is not None and rows.has(data.text_pair) else None
        answer = data.label if rows.has(data.label) else None
        return Form("prompt", column, about, answer)
    if wanted in ("alpaca", "prompt"):
        return Form(wanted, column)
    if wanted in ("messages", "sharegpt") or _is_list(rows, column) or plain(column) in TURNS:
        return Form(_kind(rows, column), column)
    return None


def _is_list(rows: Rows, column: str) -> bool:
    of = rows.column(column).type
    return bool(pa.types.is_list(of) or pa.types.is_large_list(of))


def _holds_turns(rows: Rows, column: str) -> bool:
    """Whether the first cell is a list of objects, or JSON that looks like one."""
    first = rows.column(column)[0].as_py()
    return isinstance(first, list) or isinstance(first, str) and first.lstrip().startswith("[")


def _kind(rows: Rows, column: str) -> str:
    of = rows.column(column).type
    inner = of.value_type if pa.types.is_list(of) or pa.types.is_large_list(of) else None
    return "sharegpt" if inner is not None and pa.types.is_struct(inner) and inner.get_field_index("from") >= 0 else "messages"


def with_conversations(rows: Rows, form: Form, data: DataConfig) -> tuple[Rows, Roles]:
    """The rows with our two columns. Raises UserError for a turn that cannot be understood, with its line."""
    told, shown = [], []
    for chunk in rows.chunks(_BATCH):
        columns = [
            chunk.column(name).to_pylist() if name is not None and chunk.has(name) else [None] * len(chunk)
            for name in (form.turns, form.about, form.answer, "system", "history", "tools")
        ]
        for i, cells in enumerate(zip(*columns, strict=True)):
            try:
                found = _conversation(form, *cells)
            except ValueError as error:
                raise UserError(str(error), where=chunk.where(i), fix="mend the row, or drop it") from None
            told.append(json.dumps(found, ensure_ascii=False))
            shown.append(as_text(found["messages"]))
    table = rows.table
    for name, made in ((CONVERSATION, told), (CONVERSATION_TEXT, shown)):
        table = table.append_column(name, pa.chunked_array([pa.array(made, pa.large_string())]))
    found_by = {"text": form.turns, "text_pair": form.about or data.text_pair, "label": form.answer or data.label}
    return Rows(table, rows.files, rows.file_of, rows.line_of, rows.row_of), Roles(CONVERSATION_TEXT, None, (), found_by)


def _conversation(form: Form, turns: Any, about: Any, answer: Any, system: Any, history: Any, tools: Any) -> dict[str, Any]:
    """One row's cells as ``{"messages", "tools"}``. Raises ValueError."""
    messages = _turns(turns, "user", form.turns)
    if isinstance(about, str) and about.strip():
        messages[-1]["content"] += "\n" + about
    messages = _past(history) + messages
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if answer is not None and answer != "":
        messages += _turns(answer, "assistant", form.answer or "")
    found: dict[str, Any] = {"messages": messages}
    if (called := _tools(tools)) is not None:
        found["tools"] = called
    return found


def _past(history: Any) -> list[dict[str, Any]]:
    """Alpaca's history: pairs of a prompt and its answer."""
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in history or []):
        raise ValueError("'history' is no list of pairs of a prompt and its answer")
    roles = ("user", "assistant")
    return [_message({"role": role, "content": text}) for pair in history or [] for role, text in zip(roles, pair, strict=True)]


def _turns(cell: Any, role: str, column: str) -> list[dict[str, Any]]:
    """The messages of a cell: a list of turns, the same as JSON, or a text of one ``role``."""
    if isinstance(cell, str) and cell.lstrip().startswith("[{"):
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise ValueError(f"{column!r} begins like a list of turns, but is no JSON: {error}") from None
    if isinstance(cell, str):
        return [{"role": role, "content": cell}]
    if not isinstance(cell, list):
        raise ValueError(f"{column!r} is {'null' if cell is None else type(cell).__name__}, not a list of turns or a text")
    if not cell:
        raise ValueError(f"{column!r} has no turns")
    return [_message(turn) for turn in cell]


def _message(turn: Any) -> dict[str, Any]:
    """A turn of any form as ``{"role", "content"}``, with ``tool_calls`` and ``supervised`` where it says so."""
    if not isinstance(turn, dict):
        raise ValueError(f"a turn is {type(turn).__name__}, not an object with role and content")
    speaker = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if not isinstance(speaker, str) or speaker.casefold() not in ROLES:
        named = "no role" if speaker is None else f"the role {speaker!r}"
        raise ValueError(
            f"a turn has {named}; expected one of {', '.join(dict.fromkeys(ROLES.values()))} (or {', '.join(list(ROLES)[1:4])} …)"
        )
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    message: dict[str, Any] = {"role": ROLES[speaker.casefold()], "content": _content(content)}
    calls = _without_nulls(turn.get("tool_calls")) or []
    if speaker.casefold() == "function_call":
        calls, message["content"] = [_call(message["content"] or "")], ""
    if calls:
        message["tool_calls"] = [_called(call) for call in calls]
        message["content"] = message["content"] or ""
    if message["content"] is None:
        raise ValueError(f"a turn of {speaker!r} has no content")
    if isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    weight = next((turn[key] for key in ("loss_weight", "weight") if turn.get(key) is not None), None)
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"a turn has the loss weight {weight!r}; only 0 and 1 are known")
    if weight == 0:
        message["supervised"] = False
    return message


def _content(content: Any) -> str | None:
    """The text of a turn; parts of text are put together."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            text = part if isinstance(part, str) else next((part[k] for k in ("text", "value") if isinstance(part.get(k), str)), None)
            if text is None or isinstance(part, dict) and part.get("type", "text") != "text":
                raise ValueError(f"a part of a turn is {part.get('type')!r}, not text" if isinstance(part, dict) else "a part is no text")
            texts.append(text)
        return "".join(texts)
    raise ValueError(f"the content of a turn is {type(content).__name__}, not a text")


def _call(text: str) -> dict[str, Any]:
    """ShareGPT's function call: JSON with a name and arguments."""
    try:
        found = json.loads(text)
    except ValueError:
        raise ValueError(f"a function call is no JSON: {text[:60]!r}") from None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError(f"a function call has no name: {text[:60]!r}")
    return found


def _called(call: Any) -> dict[str, Any]:
    """A tool call in OpenAI's form, its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a tool call has no name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise ValueError(f"the arguments of a tool call are no JSON: {arguments[:60]!r}") from None
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(cell: Any) -> list[Any] | None:
    """The tools of a row in OpenAI's form; None where there are none."""
    if isinstance(cell, str):
        if not cell.strip():
            return None
        try:
            cell = json.loads(cell)
        except ValueError as error:
            raise ValueError(f"'tools' is no JSON: {error}") from None
    cell = _without_nulls(cell)
    if not cell:
        return None
    if not isinstance(cell, list) or not all(isinstance(tool, dict) for tool in cell):
        raise ValueError("'tools' is no list of objects")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in cell]


def _without_nulls(value: Any) -> Any:
    """Without the keys that Arrow fills with null because another row has them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def as_text(messages: list[dict[str, Any]]) -> str:
    """For people: a single turn of the user as it stands, else a paragraph a turn."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    lines = []
    for message in messages:
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", [])]
        lines.append(f"{message['role']}: " + "\n".join(filter(None, [message["content"], *calls])))
    return "\n".join(lines)


def conversations(rows: Rows) -> list[dict[str, Any]]:
    """Our column of some rows, parsed."""
    return [json.loads(cell) for cell in rows.column(CONVERSATION).to_pylist()]


def question(conversation: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages up to what is to be answered: without the answers at the end."""
    messages = list(conversation["messages"])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def answerless(found: list[dict[str, Any]]) -> np.ndarray:
    """Indices of conversations without a turn of the assistant."""
    return np.flatnonzero([all(m["role"] != "assistant" for m in c["messages"]) for c in found])

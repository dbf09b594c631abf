"""Words looked up give what the tokenizer gives for the whole text; a tokenizer that may look beyond a space is left alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from finetune_cli import word_table
from finetune_cli.tasks.tokens import tokenise
from finetune_cli.word_table import looked_up

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdeßéçσ新词.,!'-"
PIECES = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "ab", "abc", "##de", "##ab"]
ODD = [" ", "  ", "\n", "\t", "\u00a0", "\u2003", "\x1c", "\x00", "\u0301", "e\u0301", "İ", "Σ", "A", "\ufffd", "🙂"]
ODD += ["[MASK]", "[SEP]", "<new>", "a" * 101]
texts = st.lists(st.sampled_from([*LETTERS, *ODD]), max_size=12).map("".join)


def bert(**options: Any) -> Tokenizer:
    """A tokenizer as BERT has one, with a small vocabulary."""
    backend = Tokenizer(WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(**options)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, PIECES.index(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens([AddedToken("<new>", lstrip=True, normalized=True), AddedToken("ab-", single_word=True)])
    return backend


def fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """The same for transformers."""
    columns = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", model_input_names=columns)


BERTS = [bert(lowercase=low, strip_accents=strip, handle_chinese_chars=chinese) for low, strip, chinese in product((True, False), repeat=3)]


@pytest.mark.parametrize("backend", BERTS, ids=range(len(BERTS)))
@given(st.lists(st.tuples(texts, texts), max_size=6))
def test_words_looked_up_are_the_tokens_of_the_whole_text(backend: Tokenizer, rows: list[tuple[str, str]]) -> None:
    first, second = [a for a, _ in rows], [b for _, b in rows]
    tokenizer = fast(backend)
    alone, pairs = looked_up(tokenizer, first, None), looked_up(tokenizer, first, second)
    assert alone is not None and pairs is not None
    for i, expected in enumerate(backend.encode_batch(first)):
        assert alone["input_ids"].sequence(i).tolist() == expected.ids
    for i, expected in enumerate(backend.encode_batch(rows)):
        assert pairs["input_ids"].sequence(i).tolist() == expected.ids
        assert pairs["token_type_ids"].sequence(i).tolist() == expected.type_ids
    assert alone["input_ids"].offsets[-1] == len(alone["input_ids"].values)


def test_rows_that_are_too_long_are_cut_as_the_tokenizer_cuts() -> None:
    tokenizer = fast(bert())
    first, second = ["a b c d e", "a", "", "abc . ."], ["b", "b b b b b b", "", "a a a a"]
    lengths, columns = tokenise(tokenizer, first, second, max_length=7, segmented=True)
    assert lengths.tolist() == [9, 10, 3, 10]
    expected = tokenizer(first, second, truncation="longest_first", max_length=7)
    for name, column in columns.items():
        assert [column.sequence(i).tolist() for i in range(4)] == expected[name]
    lengths, columns = tokenise(tokenizer, first, max_length=4)
    assert [columns["input_ids"].sequence(i).tolist() for i in range(4)] == tokenizer(first, truncation=True, max_length=4)["input_ids"]
    assert list(columns) == ["input_ids"] and columns["input_ids"].values.dtype == np.int32


def test_a_table_is_kept_while_it_is_small_and_the_tokenizer_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = fast(bert()), []
    numbered = word_table._Table.numbered
    monkeypatch.setattr(word_table._Table, "numbered", lambda table, *given: (asked.append(len(table)), numbered(table, *given))[1])

    def ids(*texts: str) -> list[int]:
        found = looked_up(tokenizer, list(texts), None)
        assert found is not None and [*tokenizer(list(texts))["input_ids"]] == [
            found["input_ids"].sequence(i).tolist() for i in range(len(texts))
        ]
        return asked

    assert ids("a b", "c a") == [0] and ids("a d") == [0, 3]
    tokenizer.add_tokens(["a"])  # what "a" is has changed
    assert ids("a b") == [0, 3, 0]
    monkeypatch.setattr(word_table, "MOST_CHARACTERS", 1)
    assert ids("a b") == [0, 3, 0, 0]
    with pytest.raises(TypeError):
        looked_up(tokenizer, ["\ud800 a"], None)
    assert ids("a") == [0, 3, 0, 0, 0, 0]


def beyond_a_space() -> dict[str, Tokenizer]:
    """Tokenizers whose tokens of a text are not those of its words, or need not be."""
    found = {
        name: bert() for name in ("a normalizer of its own", "a pre-tokenizer of its own", "an added token of two words", "odd segments")
    }
    found["a normalizer of its own"].normalizer = normalizers.Sequence([normalizers.Replace("a b", "c"), normalizers.BertNormalizer()])
    found["a pre-tokenizer of its own"].pre_tokenizer = pre_tokenizers.Metaspace()
    found["an added token of two words"].add_tokens(["a b"])
    found["an added token that is two words when cleaned"] = bert()
    found["an added token that is two words when cleaned"].add_tokens([AddedToken("新词", normalized=True)])
    found["odd segments"].post_processor = processors.TemplateProcessing(single="$A", pair="$A:1 $B:0", special_tokens=[])
    found["chance"] = bert()
    found["chance"].model = BPE({piece: i for i, piece in enumerate(PIECES)}, [], dropout=0.1, unk_token="[UNK]")
    return found


@pytest.mark.parametrize(("told", "backend"), beyond_a_space().items(), ids=list(beyond_a_space()))
def test_a_tokenizer_that_may_look_beyond_a_space_is_left_alone(told: str, backend: Tokenizer) -> None:
    assert looked_up(fast(backend), ["a b"], ["b"]) is None

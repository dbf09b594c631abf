"""Bytes to lines: decompression, encoding and line ends, each found or refused, never guessed over.

One class reads files and pipes alike. Line ends are LF, CRLF and CR and nothing else: U+2028 or a form feed inside a text is text.
A byte that does not decode is reported with its line and its place there.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import select
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa

from finetune_cli.errors import MachineError, UserError

BLOCK = 1 << 20
LONGEST_LINE = 64 << 20
"""Characters of a physical line beyond which a file is taken for something else than text."""
LONGEST_CELL = 1 << 20
"""Characters of one cell."""
MOST_TIMES, MUCH = 200, 64 << 20
"""A file that unpacks to more than ``MUCH`` bytes, and to so many times what was read for them, is a bomb; text packs 3 to 30 times."""
PAUSE = 0.02
"""Seconds without a byte after which a pipe counts as pausing."""

BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"))
FOREIGN = (
    (b"PK\x03\x04", "a ZIP or Excel file", "unpack it, or save the sheet as CSV"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"\xfd7zXZ", "an xz file", "unpack it first"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file", "save it as CSV"),
    (b"%PDF", "a PDF file", "extract its text first"),
    (b"\x80\x04\x95", "a Python pickle", "save the data as CSV, JSON Lines or Parquet"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV"),
)


PUNCTUATION = (
    "\u00a1\u00a3\u00a7\u00a9\u00ab\u00ae\u00b0\u00b7\u00bb\u00bf\u20ac\u2013\u2014\u2018\u2019\u201a\u201c\u201d\u201e\u2022\u2026\u2122"
)
"""What Western texts hold beside letters."""
NO_TEXT = (
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"PAR1\x15", "a Parquet file"),
    (b"ARROW1\0", "an Arrow file"),
    *((start, what) for start, what, _ in FOREIGN if not start.isascii() or min(start) < ord(" ")),
)
"""First bytes that no text has."""


def open_bytes(path: str, name: str) -> BinaryIO:
    """The unpacked bytes of a file; compression goes by the first bytes, so a wrong name does no harm."""
    try:
        raw = open(path, "rb")  # noqa: SIM115 - handed on open
        magic = raw.read(16)
        raw.seek(0)
    except OSError as error:
        raise unreadable(error, name) from None
    packed = next((kind for start, kind in MAGIC if magic.startswith(start)), "")
    if packed == "gzip":
        return cast(BinaryIO, Unpacked(gzip.GzipFile(fileobj=raw), name, raw))
    if packed == "zstd":
        return cast(BinaryIO, Unpacked(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), name, raw))
    suffix = Path(path).suffix.lower()
    if suffix in (".gz", ".zst") and magic:
        raise UserError(
            f"{name} is named {suffix} but is not compressed so", where=name, fix=f"rename it without {suffix}, or pack it again"
        )
    for start, what, fix in FOREIGN:
        if magic.startswith(start):
            raise UserError(f"{name} is {what}", where=name, fix=fix)
    return raw


class Unpacked:
    """What a packed file holds, read block by block until it is too much to be honest."""

    def __init__(self, stream: Any, name: str, packed: BinaryIO) -> None:
        self._stream, self._name, self._packed, self._read = stream, name, packed, 0

    def read(self, size: int = -1) -> bytes:
        """Up to ``size`` bytes; without one, all."""
        if size < 0:
            return b"".join(iter(lambda: self.read(BLOCK), b""))
        data = read_some(self._stream, size, self._name)
        self._read += len(data)
        if data:
            refuse_bomb(self._read, self._packed.tell(), self._name)
        return data

    def close(self) -> None:
        """Close the packed file too."""
        self._stream.close()
        self._packed.close()


def refuse_bomb(unpacked: int, size: int, name: str) -> None:
    """Raise UserError where ``size`` bytes of a file have become absurdly many."""
    if unpacked > MUCH and unpacked > MOST_TIMES * size:
        what = f"{size:,} bytes of {name} hold {unpacked:,} unpacked, more than any text does"
        raise UserError(what, where=name, fix="if that is right, unpack it first, or write it again as plain text")


def unreadable(error: OSError, name: str) -> UserError | MachineError:
    """What an OSError on a data file means for the user."""
    import errno

    if error.errno in (errno.EIO, errno.ESTALE):
        return MachineError(f"{name} cannot be read: {error.strerror}", where=name)
    return UserError(
        f"{name} cannot be read: {error.strerror or error}", where=name, fix="check that the file is whole and that you may read it"
    )


def read_some(stream: BinaryIO, size: int, name: str) -> bytes:
    """Up to ``size`` bytes; a damaged or cut archive is the user's error."""
    try:
        return bytes(stream.read(size))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{name} is damaged or cut off: {error}", where=name, fix="copy or pack the file again") from None
    except OSError as error:
        if isinstance(stream, pa.NativeFile):
            raise UserError(f"{name} is damaged or cut off: {error}", where=name, fix="copy or pack the file again") from None
        raise unreadable(error, name) from None


def found_encoding(head: bytes, name: str, *, guess: bool = True) -> tuple[str, int, str]:
    """Encoding by the first bytes: (codec, bytes of the byte order mark, note). UTF-8 where nothing says otherwise.

    ``guess``: whether zeros may tell UTF-16 without a mark; the few bytes that a pipe begins with tell nothing.
    """
    for mark, codec in BOMS:
        if head.startswith(mark):
            if codec == "utf-32":
                raise UserError(f"{name} is UTF-32 (byte order mark)", where=f"{name}:1", fix="data.encoding=utf-32, or save it as UTF-8")
            note = "" if codec == "utf-8" else f"{name}: read as {codec.upper()} (byte order mark)"
            return codec, len(mark), note
    if not guess:
        return "utf-8", 0, ""
    sample = head[:4096]
    even, odd = sample[0::2].count(0), sample[1::2].count(0)
    half = max(1, len(sample) // 2)
    if odd > 0.3 * half and even < 0.05 * half:
        return "utf-16-le", 0, f"{name}: read as UTF-16-LE (every second byte is 0, no byte order mark)"
    if even > 0.3 * half and odd < 0.05 * half:
        return "utf-16-be", 0, f"{name}: read as UTF-16-BE (every second byte is 0, no byte order mark)"
    return "utf-8", 0, ""


def likely_encoding(sample: bytes) -> str:
    """The codec that bytes which are not UTF-8 most likely have; empty where they are no text in any of the usual ones."""
    for codec in ("gb18030", "big5", "shift_jis", "euc_kr"):
        try:
            text = sample.decode(codec)
        except UnicodeDecodeError as error:
            if error.start < len(sample) - 4:
                continue
            text = sample[: error.start].decode(codec)
        foreign = [c for c in text if ord(c) > 127]
        usual = sum(
            "\u3000" <= c <= "\u30ff" or "\u4e00" <= c <= "\u9fff" or "\uac00" <= c <= "\ud7a3" or "\uff00" <= c <= "\uffef"
            for c in foreign
        )
        if len(foreign) >= 4 and usual >= 0.9 * len(foreign):
            return codec
    for codec in ("cp1252", "latin-1"):
        with contextlib.suppress(UnicodeDecodeError):
            foreign = [c for c in sample.decode(codec) if ord(c) > 127]
            usual = sum(c.isalpha() or c in PUNCTUATION for c in foreign)
            return codec if any(c.isalpha() for c in foreign) and usual >= 0.8 * len(foreign) else ""
    return ""


def codec_named(encoding: str) -> str:
    """A codec that Python knows, in its usual spelling."""
    try:
        info = codecs.lookup(encoding)
        if info.name in ("idna", "punycode", "undefined"):  # codecs of names, not of files
            raise LookupError(encoding)
        "".encode(encoding)
    except (LookupError, TypeError, ValueError):
        raise UserError(
            f"{encoding!r} is no text encoding", where="data.encoding", fix="for example data.encoding=cp1252, gb18030 or utf-16"
        ) from None
    return info.name


class Text:
    """The lines of one byte stream.

    ``head`` is the text of the first block, ``open_end`` says after the last line whether it had no line end. ``ready`` is False when
    a pipe pauses and no whole line is in hand.
    """

    def __init__(
        self, stream: BinaryIO, name: str, encoding: str | None = None, *, pipe: bool = False, notes: list[str] | None = None
    ) -> None:
        self.name, self.open_end, self.characters = name, False, 0
        self._stream, self.pipe, self._drained, self._in_hand = stream, pipe, False, False
        self._ends, self._tail = 0, ""
        self._failure: UserError | None = None
        first = self._first_bytes()
        if pipe and (what := next((kind for start, kind in NO_TEXT if first.startswith(start)), "")):
            raise UserError(f"{name} is {what}, not text", where=f"{name}:1", fix="save it to a file, and input=FILE")
        if encoding is None:
            self.encoding, skip, note = found_encoding(first, name, guess=not pipe)
            if note and notes is not None:
                notes.append(note)
        else:
            self.encoding, skip = codec_named(encoding), 0
            skip = len(codecs.BOM_UTF8) if self.encoding == "utf-8" and first.startswith(codecs.BOM_UTF8) else 0
        self._decoder: Any = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(self.encoding)("strict"), translate=False)
        self._raw_first = first[skip:]
        self.empty = not self._raw_first
        self.head = self._decode(self._raw_first, final=False).lstrip("\ufeff")  # a mark that was written twice

    def _first_bytes(self) -> bytes:
        """Enough to see a byte order mark; of a pipe no more than has come."""
        data = self._read()
        while self.pipe and len(data) < 4 and b"\n" not in data:
            more = self._read()
            if not more:
                break
            data += more
        return data

    def _read(self) -> bytes:
        if not self.pipe:
            return read_some(self._stream, BLOCK, self.name)
        read1 = getattr(self._stream, "read1", self._stream.read)
        data = bytes(read1(BLOCK >> 4))
        self._drained = len(data) < BLOCK >> 4
        return data

    def ready(self) -> bool:
        """Whether another line can be had without waiting; always true for a file."""
        if not self.pipe or self._in_hand or not self._drained:
            return True
        try:
            readable, _, _ = select.select([self._stream], [], [], PAUSE)
        except (OSError, ValueError, TypeError):  # no descriptor behind it, or a system where pipes cannot be asked
            return not hasattr(self._stream, "fileno")
        return bool(readable)

    def blocks(self) -> Iterator[str]:
        """The text in blocks that never part a CR from its LF."""
        if self.head:
            yield self._passed(self.head)
        data = b"more"
        while data and self._failure is None:
            data = self._read()
            text = self._decode(data, final=not data)
            if text:
                yield self._passed(text)
        if not self.pipe:
            self._stream.close()
        if self._failure is not None:
            raise self._failure

    def _passed(self, text: str) -> str:
        """Refuses NUL and keeps account of lines, for the place of a later error."""
        if "\0" in text:
            line = self._ends + line_ends(text[: text.index("\0")]) + 1
            raise UserError(
                "the line holds a NUL character: this is no plain text",
                where=f"{self.name}:{line}",
                fix="save the file again as UTF-8 text, or set data.encoding or data.format",
            )
        self._ends += line_ends(text)
        self.characters += len(text)
        cut = max(text.rfind("\n"), text.rfind("\r")) + 1
        self._tail = text[cut:] if cut else self._tail + text
        return text

    def _decode(self, data: bytes, *, final: bool) -> str:
        """Decoded text; what stands before a bad byte is returned first, the error waits for its turn."""
        try:
            return str(self._decoder.decode(data, final))
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(self.encoding, "replace")
            self._failure = self._bad_byte(error, before)
            return before

    def _bad_byte(self, error: UnicodeDecodeError, before: str) -> UserError:
        line = self._ends + line_ends(before) + 1
        cut = max(before.rfind("\n"), before.rfind("\r")) + 1
        start = before[cut:] if cut else self._tail + before
        byte = len(start.encode(self.encoding, "replace")) + 1
        low = max(0, error.start - 32_768)
        guess = likely_encoding(error.object[low : error.start + 32_768])
        what = f"byte {byte} of the line, 0x{error.object[error.start]:02X}, is not {self.encoding.upper()}"
        if self.encoding.startswith("utf-16"):
            return UserError(what, where=f"{self.name}:{line}", fix="save the file again as UTF-8, or set data.encoding")
        if not guess:
            return UserError(what, where=f"{self.name}:{line}", fix="mend the byte and save the file as UTF-8, or set data.encoding")
        return UserError(
            f"{what}; the file looks like {guess}", where=f"{self.name}:{line}", fix=f"data.encoding={guess}, or save the file as UTF-8"
        )

    def lines(self) -> Iterator[str]:
        """Physical lines with their ends, as they stand."""
        parts: list[str] = []
        for block in self.blocks():
            cut = max(block.rfind("\n"), block.rfind("\r")) + 1
            if not cut:
                parts.append(block)
                self._check_length(parts)
                continue
            whole, parts = "".join([*parts, block[:cut]]), [block[cut:]] if cut < len(block) else []
            if self.pipe:
                yield from self._announced(list(io.StringIO(whole, newline="")))
            else:
                yield from io.StringIO(whole, newline="")
        if parts:
            self.open_end = True
            yield "".join(parts)

    def _announced(self, lines: list[str]) -> Iterator[str]:
        last = len(lines) - 1
        for i, line in enumerate(lines):
            self._in_hand = i < last
            yield line

    def _check_length(self, parts: list[str]) -> None:
        if sum(map(len, parts)) > LONGEST_LINE:
            raise UserError(
                f"the line has more than {LONGEST_LINE >> 20} million characters",
                where=f"{self.name}:{self._ends + 1}",
                fix="check that the file is text with line ends, or set data.format",
            )


def line_ends(text: str) -> int:
    """LF, CRLF and CR, each once."""
    returns = text.count("\r")
    return text.count("\n") + (returns - text.count("\r\n") if returns else 0)

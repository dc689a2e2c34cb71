"""What holds at each byte of Python source: whether it stands in a string or a comment, how many brackets are open
around it, how far its line is indented.

All of it follows from the bytes up to that one, but for the quotes around a string, of which the first does not say
yet whether there will be three.
"""

import re
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np


class Region(IntEnum):
    """The part of the source that a byte belongs to. QUOTE: of the quotes around a string; its prefix, as the f of
    f"...", is CODE, and what stands inside is STRING, replacement fields too."""

    CODE = 0
    COMMENT = 1
    STRING = 2
    QUOTE = 3


TAB = 8  # columns to which a tab goes on, as for Python's own tokenizer
WORDS = re.compile(
    rb"""(?P<comment>\#[^\r\n]*)"""
    rb"""|(?P<long>\"\"\"|\'\'\')(?:\\.|(?!(?P=long)).)*(?:(?P=long)|\Z)"""
    rb"""|(?P<short>["'])(?:\\(?:\r\n|.)|(?!(?P=short))[^\\\r\n])*(?P=short)?"""
    rb"""|(?P<open>[(\[{])|(?P<close>[)\]}])""",
    re.DOTALL,
)
LINE_START = re.compile(rb"^[ \t]*", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Source:
    """region: `Region` of each byte, int8 [N]. depth: brackets that are open behind it, those of strings not counted,
    int32 [N]. indent: columns in front of the first word of its line, as far as they are read, int32 [N]."""

    region: np.ndarray
    depth: np.ndarray
    indent: np.ndarray


def read(source: bytes) -> Source:
    """Return what holds at each byte of a file. Of what is no Python a string without an end goes as far as its line,
    or, with three quotes, as far as the file, and a bracket that closes nothing is not counted."""
    region = np.zeros(len(source), np.int8)
    change, indent = np.zeros((2, len(source)), np.int32)
    opened = 0
    for word in WORDS.finditer(source):
        start, end = word.span()
        if word.lastgroup == "comment":
            region[start:end] = Region.COMMENT
        elif word.lastgroup in ("open", "close"):
            change[start] = 1 if word.lastgroup == "open" else -min(1, opened)
            opened += change[start]
        else:
            quote = word["long"] or word["short"]
            region[start:end] = Region.STRING
            region[start : start + len(quote)] = Region.QUOTE
            if end - start >= 2 * len(quote) and word[0].endswith(quote):
                region[end - len(quote) : end] = Region.QUOTE
    for line in LINE_START.finditer(source):
        column = 0
        for i in range(*line.span()):
            column = column + 1 if source[i : i + 1] == b" " else column // TAB * TAB + TAB
            indent[i] = column
        indent[line.end() : source.find(b"\n", line.end()) + 1 or None] = column
    return Source(region, change.cumsum(dtype=np.int32), indent)


def read_documents(tokens: np.ndarray, eot: int) -> Source:
    """Return what holds at each byte of a stream of documents, each with an `eot` behind it but for the last, which may
    be cut; nothing holds at an eot.

    Raises:
        ValueError: for tokens that are no bytes.
    """
    if eot != 256 or tokens.max() > eot:
        raise ValueError("the source is read byte by byte: choose data whose tokenizer is bytes, as data=python_stdlib")
    ends = [*np.flatnonzero(tokens == eot).tolist(), len(tokens)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    parts = [read(tokens[i:j].astype(np.uint8).tobytes()) for i, j in zip(starts, ends, strict=True)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([np.pad(getattr(part, name), (0, 1)) for part in parts])[:-1]

    return Source(*(joined(field.name) for field in fields(Source)))

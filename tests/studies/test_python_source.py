"""What holds at each byte of Python source, beside Python's own tokenizer."""

import io
import tokenize
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import python_source
from experiments.studies.python_source import Region, read, read_documents

LETTERS = {".": Region.CODE, "c": Region.COMMENT, "s": Region.STRING, "q": Region.QUOTE}


@pytest.mark.parametrize(
    ("source", "region", "depth"),
    [
        ("x = 'a' # b'\n", "....qsq.cccc.", "0000000000000"),
        ('f("(", r"\\"#")', "..qsq...qsssq.", "01111111111110"),
        ('"""a"b"""\'\'', "qqqsssqqqqq", "00000000000"),
        ("'a\n[b]", "qs....", "000110"),
        ("'a\\\nb'+1", "qssssq..", "00000000"),
        (")'''a'", ".qqqss", "000000"),
    ],
)  # fmt: skip
def test_regions_and_brackets_are_told_byte_by_byte(source, region, depth):
    found = read(source.encode())
    assert found.region.tolist() == [LETTERS[letter] for letter in region]
    assert found.depth.tolist() == [int(digit) for digit in depth]


def test_a_line_is_as_far_indented_as_it_has_been_read():
    assert read(b"a\n  b\n\tc\n\n d").indent.tolist() == [0, 0, 1, 2, 2, 2, 8, 8, 8, 0, 1, 1]


FILES = ["tokenize.py", "argparse.py", "_pydecimal.py", "turtle.py", "textwrap.py", "json/decoder.py"]


@pytest.mark.parametrize("name", FILES)
def test_the_standard_library_is_read_as_python_reads_it(name):
    source = (Path(tokenize.__file__).parent / name).read_bytes()
    lines = source.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)])
    region, depth = np.zeros(len(source), np.int8), np.zeros(len(source), np.int32)
    fstrings = []

    def place(position):
        row, column = position
        return int(starts[row - 1]) + len(lines[row - 1].decode()[:column].encode())

    for token in tokenize.tokenize(io.BytesIO(source).readline):
        start, end = (place(p) if p[0] and p[0] <= len(lines) else len(source) for p in (token.start, token.end))
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            region[start:end] = Region.COMMENT
        elif kind == "STRING":
            start += len(token.string) - len(token.string.lstrip("rRbBuUfF"))
            region[start:end] = Region.STRING
        elif kind == "FSTRING_START":
            fstrings.append(start + len(token.string) - len(token.string.lstrip("rRbBuUfF")))
        elif kind == "FSTRING_END":
            region[fstrings.pop() : end] = Region.STRING
        elif kind == "OP" and token.string in "()[]{}" and not fstrings:
            depth[start:] += 1 if token.string in "([{" else -1
    found = read(source)
    joined = np.where(found.region == Region.QUOTE, Region.STRING, found.region)
    assert (joined == region).all() and (found.depth == depth).all()
    assert set(found.region) == set(Region)


@pytest.mark.parametrize("cut", [100, 1000, 5000])
def test_nothing_but_the_quotes_depends_on_what_follows(cut):
    source = Path(python_source.__file__).read_bytes() * 3
    whole, part = read(source), read(source[:cut])
    told = (whole.region[:cut] != Region.QUOTE) & (part.region != Region.QUOTE)
    for name in ("region", "depth", "indent"):
        assert (getattr(whole, name)[:cut] == getattr(part, name))[told].all()


@pytest.mark.parametrize("documents", [[b"('a", b"  b #"], [b"#", b"", b"'''"], [b"x"]])
def test_documents_are_read_one_by_one(documents):
    tokens = np.array([token for text in documents for token in (*text, 256)][:-1])
    found = read_documents(tokens, 256)
    for name in ("region", "depth", "indent"):
        alone = [[*getattr(read(text), name), 0] for text in documents]
        assert getattr(found, name).tolist() == sum(alone, [])[:-1]


@pytest.mark.parametrize(("tokens", "eot"), [([300], 512), ([300], 256)])
def test_tokens_that_are_no_bytes_are_refused(tokens, eot):
    with pytest.raises(ValueError, match="byte by byte: choose data whose tokenizer is bytes"):
        read_documents(np.array(tokens), eot)

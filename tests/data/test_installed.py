"""Text of installed packages, and training on some data with the held-out text of other data."""

import sys
from dataclasses import replace

import numpy as np
import pytest

from experiments.data.heldout_elsewhere import byte_lengths, heldout_elsewhere
from experiments.data.installed import PIECE, Docstrings, InstalledFiles


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package that can be found and must not be imported."""
    folder = tmp_path / "made_up"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""A package."""\nraise RuntimeError("imported")\n')
    (folder / "deep" / "code.py").write_text(
        'def f():\n    """Return one.\n\n    Always:\n        one.\n    """\n    return 1\n'
    )
    (folder / "broken.py").write_text('"""Of another Python."""\nprint "x"\n')
    (folder / "deep" / "long.h").write_bytes(b"// a line\n" * 2000)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_docstrings_are_read_without_importing_the_package(package):
    corpus = Docstrings("made_up")
    assert list(corpus.documents()) == [b"A package.", b"Return one.\n\nAlways:\n    one."]
    assert "made_up" not in sys.modules
    before = corpus.fingerprint()
    (package / "more.py").write_text('"""More."""')
    assert corpus.fingerprint() != before


def test_files_of_a_package_are_cut_into_pieces(package):
    corpus = InstalledFiles("made_up", "**/*.h", "headers")
    pieces = list(corpus.documents())
    assert b"".join(pieces) == (package / "deep" / "long.h").read_bytes()
    assert len(pieces) == 3 and max(map(len, pieces)) <= PIECE
    before = corpus.fingerprint()
    (package / "more.h").write_text("int x;")
    assert corpus.fingerprint() != before


@pytest.mark.parametrize(
    ("name", "pattern", "words"),
    [
        ("made_up", "**/*.rs", "no file of made_up matches"),
        ("no_such_package", "*", "'no_such_package' is not installed"),
        ("ast", "*", "'ast' is not installed as a folder"),
    ],
)
def test_what_is_not_there_is_refused(package, name, pattern, words):
    with pytest.raises(ValueError, match=words):
        InstalledFiles(name, pattern, "x").fingerprint()


def test_held_out_are_the_first_tokens_of_every_test(data):
    other = replace(data, heldout=np.roll(data.heldout, 7), digest="1" * 64)
    found = heldout_elsewhere(data, [data, other], 100)
    assert found.train is data.train
    assert found.heldout.tolist() == [*data.heldout[:100].tolist(), *other.heldout[:100].tolist()]
    assert found.heldout_bytes == 200 - (found.heldout == data.eot).sum() == byte_lengths(data, found.heldout).sum()
    digests = {
        data.digest,
        found.digest,
        heldout_elsewhere(data, [other, data], 100).digest,
        heldout_elsewhere(data, [data, other], 99).digest,
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("change", "tokens", "words"),
    [
        (None, 10, "give at least one data set"),
        ({"eot": 3}, 10, "different vocabularies"),
        ({}, 2000, "tokens=2000 must be from 1 to the 1000"),
    ],
)
def test_tests_that_cannot_be_read_are_refused(data, change, tokens, words):
    with pytest.raises(ValueError, match=words):
        heldout_elsewhere(data, [] if change is None else [replace(data, **change)], tokens)

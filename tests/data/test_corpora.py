import bz2
import gzip
import json
import lzma
import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from experiments.data.corpora import HuggingFace, PythonStdlib, TextFiles, cut
from experiments.data.token_data import character_boundary, prepare
from experiments.data.tokenizers import ByteTokenizer

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACK[".zst"] = partial(pa.compress, codec="zstd", asbytes=True)
ROWS = ["first row", "second\nrow with ünïcode", "", "a lone \ud800 surrogate"]
SHAKESPEARE = Path(__file__).parents[2].parent / "shared" / "data" / "tinyshakespeare.txt"


def read(corpus) -> list[bytes]:
    return list(corpus.documents())


def as_bytes(rows) -> list[bytes]:
    return [row.encode(errors="surrogatepass") for row in rows]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl"])
def test_text_and_rows_are_read_however_they_are_packed(tmp_path, suffix, packed):
    jsonl = "\n\n".join(json.dumps({"text": row, "id": 1}) for row in ROWS).encode()
    content = jsonl if suffix == ".jsonl" else b"one\r\n\xff document\n"
    (tmp_path / f"corpus{suffix}{packed}").write_bytes(PACK[packed](content))
    assert read(TextFiles(str(tmp_path / "*"))) == (as_bytes(ROWS) if suffix == ".jsonl" else [content])


def test_parquet_rows_are_documents(tmp_path):
    parquet.write_table(pa.table({"body": ROWS[:3], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    assert read(TextFiles([str(tmp_path / "*.parquet")], field="body")) == as_bytes(ROWS[:3])


def test_a_folder_is_all_in_it_that_can_be_read(tmp_path):
    for name in ("a.txt", "b.pdf", "deep/c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(TextFiles(str(tmp_path))) == [b"a.txt", b"deep/c.md"]


def test_overlapping_globs_read_a_file_once_and_in_every_depth(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "deep" / "er" / "b.md").write_text("b")
    assert read(TextFiles([f"{tmp_path}/**/*", f"{tmp_path}/*.txt"])) == [b"a", b"b"]


def test_a_long_text_file_is_cut_after_its_lines(tmp_path):
    content = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "long.txt").write_text(content)
    pieces = read(TextFiles(f"{tmp_path}/long.txt", max_document_bytes=50))
    assert b"".join(pieces).decode() == content
    assert len(pieces) > 10 and all(len(piece) <= 50 and piece.endswith(b"\n") for piece in pieces)


@given(text=st.text(alphabet="a\n\u00e4\u4e16\U0001f642", max_size=80), limit=st.integers(4, 30))
@settings(deadline=None, max_examples=100)
def test_cutting_loses_nothing_and_splits_no_character(text, limit):
    pieces = list(cut([text.encode()], limit))
    assert b"".join(pieces).decode() == text
    assert all(len(piece) <= limit and piece.decode() is not None for piece in pieces)
    assert pieces == list(cut([bytes([byte]) for byte in text.encode()], limit)), "read in other blocks"


@given(text=st.binary(max_size=20), limit=st.integers(0, 25))
@settings(deadline=None, max_examples=100)
def test_a_character_boundary_is_at_most_three_bytes_back_on_any_bytes(text, limit):
    at = character_boundary(text, limit)
    assert min(limit, len(text)) - 3 <= at <= min(limit, len(text))


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "id": 2}\n',
            r"a.jsonl, line 2 has no field 'text'.*\['body', 'id'\]",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1 is not a JSON object but list"),
        ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1, field 'text' must be a string and is NoneType"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1 is not JSON"),
        ("a.parquet", b"PAR1 not really", "cannot read .*a.parquet"),
        ("a.txt.gz", b"not packed", "cannot read .*a.txt.gz"),
        ("a.md.xz", b"not packed", "cannot read .*a.md.xz"),
        ("a.txt.bz2", b"not packed", "cannot read .*a.txt.bz2"),
        ("a.jsonl.zst", b"not packed", "cannot read .*a.jsonl.zst"),
        ("a.pdf", b"", "cannot read .*a.pdf: the kinds of files are .txt"),
        ("a.parquet.gz", b"", "cannot read .*a.parquet.gz: the kinds of files are"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(TextFiles(write(tmp_path, name, content)))


@pytest.mark.parametrize("packed", [packed for packed in PACK if packed])
def test_a_packed_file_that_ends_too_early_is_named(tmp_path, packed):
    content = PACK[packed](b"\n".join(b"line %d" % i for i in range(50_000)))
    with pytest.raises(ValueError, match=f"cannot read .*a.txt{packed}"):
        read(TextFiles(write(tmp_path, f"a.txt{packed}", content[:-20])))


def test_a_parquet_file_without_the_column_or_with_a_hole_is_named(tmp_path):
    parquet.write_table(pa.table({"body": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text'; its columns are \['body'\]"):
        read(TextFiles(f"{tmp_path}/*"))
    with pytest.raises(ValueError, match="a.parquet, row 2, field 'body' must be a string"):
        read(TextFiles(f"{tmp_path}/*", field="body"))


def test_a_glob_that_matches_nothing_is_named(tmp_path):
    write(tmp_path, "a.txt", b"a")
    with pytest.raises(ValueError, match="no file matches .*nothing.*md"):
        read(TextFiles([f"{tmp_path}/*.txt", f"{tmp_path}/nothing*.md"]))
    with pytest.raises(ValueError, match="max_document_bytes=3"):
        TextFiles("*.txt", max_document_bytes=3)


def test_the_fingerprint_follows_files_and_settings(tmp_path):
    path = write(tmp_path, "a.txt", b"a")
    fingerprints = [TextFiles(path).fingerprint(), TextFiles(path, field="body").fingerprint()]
    assert TextFiles(path).fingerprint() == fingerprints[0]
    os.utime(path, ns=(1, 1))
    fingerprints.append(TextFiles(path).fingerprint())
    write(tmp_path, "a.txt", b"ab")
    os.utime(path, ns=(1, 1))
    fingerprints.append(TextFiles(path).fingerprint())
    assert len(set(fingerprints)) == 4


def test_the_standard_library_has_no_installed_packages_and_no_build_paths():
    corpus = PythonStdlib()
    files = [path.relative_to(corpus.root) for path in corpus.files()]
    assert {Path("os.py"), Path("json/decoder.py")} <= set(files)
    assert not [path for path in files if {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)]
    assert not [path for path in files if path.name.startswith("_sysconfigdata")]
    assert sum((corpus.root / path).stat().st_size for path in files) > 5e6
    assert corpus.fingerprint() == PythonStdlib().fingerprint()


def test_an_unreadable_file_of_the_standard_library_is_named(tmp_path):
    corpus = PythonStdlib()
    corpus.root = tmp_path
    (tmp_path / "broken.py").symlink_to(tmp_path / "gone.py")
    with pytest.raises(ValueError, match="cannot read .*broken.py"):
        read(corpus)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines = [json.dumps({"body": f"row number {i}"}) for i in range(20)]
    return write(tmp_path, "rows.jsonl", "\n".join(lines).encode())


def test_a_data_set_is_streamed_up_to_max_bytes(rows):
    whole = read(HuggingFace("json", data_files=rows, field="body"))
    assert whole == [f"row number {i}".encode() for i in range(20)]
    assert read(HuggingFace("json", data_files=rows, field="body", max_bytes=40)) == whole[:3]


def test_rows_stop_before_the_first_that_would_pass_max_bytes_of_text(tmp_path):
    said = [[{"role": "user", "content": "x" * number}] for number in (10, 20, 30)]
    path = write(
        tmp_path, "a.jsonl", "\n".join(json.dumps({"messages": row, "id": "long" * 99}) for row in said).encode()
    )
    data = HuggingFace("json", data_files=path, max_bytes=10 + 20 + 2 * len("user"))
    assert [(where, row["messages"]) for where, row in data.rows(["messages"])] == [
        (f"json, row {number}", row) for number, row in enumerate(said[:2], 1)
    ]
    assert len(list(HuggingFace("json", data_files=path, max_bytes=37).rows(["messages"]))) == 1


def test_a_data_set_without_the_field_says_which_there_are(rows):
    with pytest.raises(ValueError, match=r"json, row 1 has no field 'text'; its fields are \['body'\]"):
        read(HuggingFace("json", data_files=rows))


def test_the_fingerprint_of_a_data_set_follows_arguments_and_local_files(rows):
    fingerprints = [HuggingFace("json", data_files=rows, **more).fingerprint() for more in ({}, {"max_bytes": 9})]
    assert HuggingFace("json", data_files=rows).fingerprint() == fingerprints[0]
    os.utime(rows, ns=(1, 1))
    fingerprints.append(HuggingFace("json", data_files=rows).fingerprint())
    assert len(set(fingerprints)) == 3


def test_a_data_set_that_cannot_be_reached_is_named_in_one_line(monkeypatch):
    def unreachable(**arguments):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data set a/b cannot be read \(ConnectionError: no route\): ") as raised:
        read(HuggingFace("a/b"))
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare.txt is not there")
def test_one_big_text_file_makes_a_corpus(tmp_path):
    data = prepare(TextFiles(str(SHAKESPEARE)), ByteTokenizer(), 65536, 0.1, tmp_path)
    assert 65533 <= data.heldout_bytes <= 65536
    assert 0.8e6 < len(data.train) < SHAKESPEARE.stat().st_size

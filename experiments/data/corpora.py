"""Sources of documents and rows: the standard library, files, or a data set of the Hugging Face hub."""

import bz2
import gzip
import io
import json
import lzma
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from experiments.data.token_data import character_boundary

PLAIN = (".txt", ".md", ".jsonl")
TABLES = (".jsonl", ".parquet")
KINDS = (*PLAIN, ".parquet")
BLOCK = 1 << 20  # bytes


def open_zstandard(path: Path, mode: str) -> io.BufferedReader:
    # By Arrow, since the zstandard library takes a file that ends too early for a whole one.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstandard}
READABLE: dict[tuple[str, ...], str] = {
    KINDS: ".txt, .md and .jsonl (each also with .gz, .bz2, .xz or .zst), and .parquet",
    TABLES: ".jsonl (also with .gz, .bz2, .xz or .zst) and .parquet",
}
Row = tuple[str, Mapping[str, Any]]  # where it stands, for messages, and its fields


class Table(Protocol):
    """A source of rows."""

    name: str

    def rows(self, fields: Sequence[str]) -> Iterator[Row]:
        """The rows, in any order, with at least these fields.

        Raises:
            ValueError: one cannot be read, or lacks a field; the message says where it stands.
        """


class PythonStdlib:
    """The source of the running interpreter's standard library, one document a .py file, bytes as they are.

    Some 31 MB in Python 3.11 with the library's own tests, which a few systems package apart, and 12 MB
    without. Installed packages are left out, and so is _sysconfigdata, which holds the paths of the machine
    that built the interpreter.
    """

    name = "python_stdlib"

    def __init__(self):
        self.root = Path(sysconfig.get_path("stdlib"))

    def files(self) -> list[Path]:
        found = []
        for folder, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__")]
            names = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
            found += [Path(folder, f) for f in names]
        return sorted(found)

    def fingerprint(self) -> str:
        return f"python_stdlib {file_state(self.files(), self.root)}"

    def documents(self) -> Iterator[bytes]:
        for path in self.files():
            try:
                yield path.read_bytes()
            except OSError as error:
                raise ValueError(f"cannot read {path}: {error}") from error


class TextFiles:
    """Documents from .txt, .md, .jsonl and .parquet files; all but the last also as .gz, .bz2, .xz or .zst.

    A .txt or .md file is one document; one that is longer than max_document_bytes is cut after its last line
    end before that (in the middle of a longer line), and then its pieces are documents of their own, which
    can be on both sides of the split. Of a .jsonl or .parquet file every row is a document, whole.

    Args:
        globs: one or more files, folders (all in them that can be read) or patterns, ** for any depth.
        field: the JSON field or parquet column with the text of documents.
        max_document_bytes: None for a 512th of all files, from 1024 to 65536, so that one small file gives enough.
        name: for reports and the cache.
    """

    def __init__(
        self,
        globs: str | Iterable[str],
        field: str = "text",
        max_document_bytes: int | None = None,
        name: str = "text_files",
    ):
        if max_document_bytes is not None and max_document_bytes < 4:
            raise ValueError(f"max_document_bytes={max_document_bytes} must be at least 4, the longest character")
        self.globs = [globs] if isinstance(globs, str) else list(globs)
        self.field, self.max_document_bytes, self.name = field, max_document_bytes, name

    def files(self, kinds: tuple[str, ...] = KINDS) -> list[Path]:
        """
        Raises:
            ValueError: a pattern matches no file, or a file is of no kind that can be read.
        """
        found = set()
        for pattern in self.globs:
            matches = matching_files(pattern)
            if Path(pattern).expanduser().is_dir():
                matches = [path for path in matching_files(f"{pattern}/**/*") if kind(path) in kinds]
            if not matches:
                raise ValueError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
            found.update(matches)
        for path in found:
            if kind(path) not in kinds:
                raise ValueError(f"cannot read {path}: the kinds of files are {READABLE[kinds]}")
        return sorted(found)

    def fingerprint(self) -> str:
        return f"text_files {self.field} {self.max_document_bytes} {file_state(self.files())}"

    def documents(self) -> Iterator[bytes]:
        """
        Raises:
            ValueError: a file cannot be read or has no such field; the message names the file and the line.
        """
        files = self.files()
        limit = self.max_document_bytes or min(65536, max(1024, sum(path.stat().st_size for path in files) // 512))
        for path in files:
            if kind(path) in TABLES:
                yield from texts(rows_of(path, [self.field]), self.field)
            else:
                yield from cut(blocks(path), limit)

    def rows(self, fields: Sequence[str]) -> Iterator[Row]:
        for path in self.files(TABLES):
            yield from rows_of(path, fields)


class HuggingFace:
    """A data set of the Hugging Face hub, or local files through a builder ("json", "parquet"), streamed.

    What the hub holds is taken to be fixed by these arguments: give a revision (a commit) where that matters.
    Changes of local data files are noticed.

    Args:
        path, config, split, revision, data_files: as in `datasets.load_dataset`, where config is called name.
        field: the column with the text of documents.
        max_bytes: of text; stop before the first document that would pass it; null reads everything.
    """

    def __init__(
        self,
        path: str,
        config: str | None = None,
        split: str = "train",
        field: str = "text",
        max_bytes: int | None = None,
        revision: str | None = None,
        data_files: str | Iterable[str] | None = None,
    ):
        self.field, self.max_bytes = field, max_bytes
        self.data_files = [data_files] if isinstance(data_files, str) else list(data_files or []) or None
        self.arguments = {"path": path, "name": config, "split": split, "revision": revision}
        self.name = path.rstrip("/").rsplit("/")[-1]

    def fingerprint(self) -> str:
        local = [path for pattern in self.data_files or [] for path in matching_files(pattern)]
        return json.dumps([self.arguments, self.field, self.max_bytes, self.data_files, file_state(local)])

    def documents(self) -> Iterator[bytes]:
        """
        Raises:
            ValueError: no such column, or a value that is not text.
        """
        return texts(self.rows([self.field]), self.field)

    def rows(self, fields: Sequence[str]) -> Iterator[Row]:
        size = 0
        for number, row in enumerate(self._rows(), 1):
            where = f"{self.name}, row {number}"
            require(fields, row, where)
            size += sum(text_size(row[field]) for field in fields)
            if self.max_bytes is not None and size > self.max_bytes:
                return
            yield where, row

    def _rows(self) -> Iterator[dict]:
        from datasets import load_dataset

        try:
            yield from load_dataset(**self.arguments, data_files=self.data_files, streaming=True)
        except Exception as error:  # of the network, the hub and its files, each library with errors of its own
            path = self.arguments["path"]
            raise ValueError(
                f"data set {path} cannot be read ({in_a_line(error)}): it needs the network the first time; check "
                "data.tokens.corpus, or take text of your own with data=text_files data.path=..."
            ) from error


def in_a_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def rows_of(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """The rows of a .jsonl or .parquet file.

    Raises:
        ValueError: it cannot be read, or a row lacks a field; the message names the file and the line.
    """
    return _parquet(path, fields) if kind(path) == ".parquet" else _jsonl(path, fields)


def _jsonl(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(path), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object but {type(row).__name__}")
        require(fields, row, where)
        yield where, row


def _parquet(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            for field in fields:
                if field not in columns:
                    raise ValueError(f"{path} has no column {field!r}; its columns are {sorted(columns)}")
            number = 0
            for batch in file.iter_batches(columns=list(fields)):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def require(fields: Sequence[str], row: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ValueError: the row has no such field.
    """
    for field in fields:
        if field not in row:
            raise ValueError(f"{where} has no field {field!r}; its fields are {sorted(row)}")


def texts(rows: Iterable[Row], field: str) -> Iterator[bytes]:
    """The text of one field of each row."""
    for where, row in rows:
        yield text_bytes(row[field], f"{where}, field {field!r}")


def cut(text: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """Pieces of at most `limit` bytes that end after a line, or after a character where a line is longer."""
    rest = b""
    for block in text:
        rest, start = rest + block, 0
        while len(rest) - start > limit:
            end = rest.rfind(b"\n", start, start + limit) + 1
            end = end or start + character_boundary(rest[start : start + limit + 1], limit)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    yield rest


def kind(path: Path) -> str:
    """The suffix that tells how to read a file: of a compressed one, that of what is in it."""
    inner = Path(path.stem).suffix
    return inner if path.suffix in PACKED and inner in PLAIN else path.suffix


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its suffix says so."""
    return _read(path, lambda file: file)


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked where its suffix says so, some at a time."""
    return _read(path, lambda file: iter(lambda: file.read(BLOCK), b""))


def _read(path: Path, parts: Callable[[Any], Iterable[bytes]]) -> Iterator[bytes]:
    """
    Raises:
        ValueError: it cannot be read; names the file.
    """
    try:
        with PACKED.get(path.suffix, open)(path, "rb") as file:
            yield from parts(file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def text_bytes(text: object, where: str) -> bytes:
    """UTF-8 of a string; half of a surrogate pair, which JSON can hold, is kept as it is."""
    if not isinstance(text, str):
        raise ValueError(f"{where} must be a string and is {type(text).__name__}")
    return text.encode(errors="surrogatepass")


def text_size(value: object) -> int:
    """Bytes of all strings in a value as JSON has them."""
    if isinstance(value, str):
        return len(value.encode(errors="surrogatepass"))
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return sum(map(text_size, parts))


def matching_files(pattern: str) -> list[Path]:
    matches = map(Path, glob(os.path.expanduser(pattern), recursive=True))
    return sorted(path for path in matches if path.is_file())


def file_state(paths: Iterable[Path], root: Path = Path()) -> str:
    """Names (under root), sizes and times of change."""
    stats = ((path, path.stat()) for path in paths)
    return json.dumps([(os.path.relpath(path, root), s.st_size, s.st_mtime_ns) for path, s in stats])

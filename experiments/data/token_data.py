"""Token streams for training and for evaluation, prepared once from a corpus and then only opened."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from filelock import FileLock

from experiments.data.environments.contracts import Environment
from experiments.data.progress import watched

log = logging.getLogger(__name__)

LAYOUT = 2  # part of every cache key: raise it when the files or the rules of the split change
ENCODE_AT_ONCE = 1 << 22  # bytes of documents handed to the tokenizer in one call
FIT_ON = 1 << 27  # bytes of training documents that a tokenizer is trained on, since that keeps every distinct word
EXTENT = np.dtype([("sha256", "S32"), ("offset", "<i8"), ("length", "<i8")])  # of a document in a file of all


class Corpus(Protocol):
    """A source of documents."""

    name: str

    def fingerprint(self) -> str:
        """Text that changes when the documents may have changed; cheap, so names, sizes and times will do."""

    def documents(self) -> Iterator[bytes]:
        """The documents, in any order."""


class Tokenizer(Protocol):
    """Bytes to ids, without loss."""

    name: str
    pieces: list[bytes]  # the bytes that each id stands for; b"" for eot. Known after `fit`.
    eot: int

    def fingerprint(self) -> str:
        """Text that says what `fit` will be, given the documents."""

    def fit(self, documents: Iterable[bytes], folder: Path) -> "Tokenizer":
        """The tokenizer trained on the training documents; a file it wants to keep goes into the folder."""

    def encode(self, documents: list[bytes]) -> list[np.ndarray]:
        """The ids of each document, without eot."""


class Stream(Protocol):
    """Numbers in a row that are read by slices: an array, a file mapped into memory, or shards as one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> np.ndarray: ...


def read_blocks(block: Callable[[int], np.ndarray], length: int, total: int, index: slice) -> np.ndarray:
    """Return a slice of a stream of `total` tokens that is made of blocks, all of one length but the last, which may be
    shorter. block: the tokens of the i-th."""
    start, stop, _ = index.indices(total)
    if stop <= start:
        return block(0)[:0]
    first = start // length
    read = np.concatenate([block(i) for i in range(first, -(-stop // length))])
    return read[start - first * length : stop - first * length]


@dataclass(frozen=True, eq=False)
class TokenData:
    """Tokens for training, and the tokens of a fixed string of held-out bytes.

    bits per byte = nats of `heldout` / ln 2 / `heldout_bytes`.

    Where answers are marked, only they are trained on and scored, and all else is given.
    """

    train: Stream  # uint16 or uint32 (vocab_size > 65536); eot after each document
    heldout: np.ndarray  # 1-D, same dtype, fixed order
    heldout_bytes: int  # bytes that `heldout` encodes; an eot encodes none
    vocab_size: int  # every id is smaller; eot is one of them
    eot: int
    digest: str  # sha256 hex of the tokens of both parts and the vocabulary
    name: str
    pieces: list[bytes] = field(repr=False)  # the bytes that each id stands for
    train_answers: np.ndarray | None = None  # bool, as long as `train`; None: every token is scored
    heldout_answers: np.ndarray | None = None
    heldout_entropy: float | None = None  # nats of `heldout` under its own language, where that is known
    group: int = 1  # windows that stand together and are drawn together, in order: 2 of a chosen and a rejected answer
    filled: bool = False  # whether windows are filled with ends that are learnt
    environment: Environment | None = None  # that the held-out prompts are from, by which answers are scored

    @property
    def counted(self) -> float:
        """Fraction of the training tokens that are trained on."""
        return 1.0 if self.train_answers is None else float(self.train_answers.mean())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of 1-D ids, to be looked at: bytes that are not UTF-8 become U+FFFD, eot a line "<eot>".

        Raises:
            ValueError: an id is not in [0, vocab_size).
        """
        ids = np.asarray(ids).tolist()
        if outside := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"cannot decode id {outside[0]}: {self.name} has ids 0 to {self.vocab_size - 1}")
        text = b"".join(b"\n<eot>\n" if i == self.eot else self.pieces[i] for i in ids)
        return text.decode(errors="replace")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def cache_folder() -> Path:
    """The environment variable ARCHIPELAGO_CACHE, or .cache/archipelago: it can change no result."""
    return Path(os.environ.get("ARCHIPELAGO_CACHE", ".cache/archipelago")).expanduser()


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    heldout_bytes: int,
    heldout_fraction: float,
    cache_dir: str | Path | None = None,
) -> TokenData:
    """Tokens of a corpus. The first call writes them under cache_dir (`cache_folder` where that is None), later ones
    map the files.

    Exact duplicates and empty documents are dropped. A document is held out when its sha256, read as a number
    in [0, 1), is below heldout_fraction, so where it goes depends on its content alone. Both parts are in the
    order of the hashes. `heldout` is the first heldout_bytes bytes of the held-out documents, whatever the
    tokenizer: the last document is cut (at a UTF-8 character, so up to 3 bytes can be missing, and without
    eot). Held-out documents after these are not used at all, so that the training part does not depend on
    heldout_bytes.

    Raises:
        ValueError: a setting is out of range, the corpus has no documents or nothing to train on, the
            held-out documents are shorter than heldout_bytes, or the tokenizer does not give a document back.
    """
    if heldout_bytes < 1:
        raise ValueError(f"heldout_bytes={heldout_bytes} must be at least 1")
    if not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction} must lie between 0 and 1")
    determined_by = [LAYOUT, corpus.fingerprint(), tokenizer.fingerprint(), heldout_bytes, heldout_fraction]
    key = hashlib.sha256(json.dumps(determined_by).encode()).hexdigest()[:16]
    folder = (
        cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    ) / f"{corpus.name}-{tokenizer.name}-{key}"
    try:
        return _open(folder)
    except ValueError:
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        try:
            return _open(folder)  # another process may have written it while this one waited
        except ValueError as error:
            if folder.exists():
                log.warning("rebuilding %s: %s", folder, error)
        unfinished = Path(f"{folder}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
        unfinished.mkdir()
        try:
            _build(unfinished, corpus, tokenizer, heldout_bytes, heldout_fraction)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return _open(folder)


def _open(folder: Path) -> TokenData:
    """Map a finished cache entry: the training part checked by its size, all else by its hash.

    Raises:
        ValueError: it is missing, incomplete or damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        vocabulary = (folder / "vocabulary.json").read_bytes()
        heldout = np.fromfile(folder / "heldout.bin", meta["dtype"])
        guarded = hashlib.sha256(heldout.tobytes() + vocabulary).hexdigest()
        if guarded != meta["heldout_and_vocabulary_sha256"]:
            raise ValueError("heldout.bin or vocabulary.json is not what was written")
        size, written = (folder / "train.bin").stat().st_size, meta["train_tokens"] * heldout.itemsize
        if size != written:
            raise ValueError(f"train.bin has {size} bytes, and {written} were written")
        train = np.memmap(folder / "train.bin", meta["dtype"], mode="r")
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"incomplete: {error!r}") from error
    heldout.flags.writeable = False
    pieces = [piece.encode("latin-1") for piece in json.loads(vocabulary)]
    fields = {name: meta[name] for name in ("heldout_bytes", "eot", "digest", "name")}
    return TokenData(train=train, heldout=heldout, vocab_size=len(pieces), pieces=pieces, **fields)


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer, heldout_bytes: int, heldout_fraction: float) -> None:
    spool = folder / "documents"
    found, extents = _spool(spool, corpus)
    if not len(extents):
        raise ValueError(f"corpus {corpus.name} has no documents that are not empty")
    split = int(np.searchsorted(extents["sha256"], math.floor(heldout_fraction * 2**256).to_bytes(32, "big")))
    held, size = int(extents["length"][:split].sum()), int(extents["length"].sum())
    counts = f"{len(extents)} distinct documents with {size} bytes"
    if held < heldout_bytes:
        raise ValueError(
            f"corpus {corpus.name} has {counts}, and heldout_fraction={heldout_fraction} of them hold out "
            f"only {held} bytes, fewer than heldout_bytes={heldout_bytes}: lower heldout_bytes, raise "
            "heldout_fraction, or give more or shorter documents (TextFiles cuts long text files by "
            "max_document_bytes)"
        )
    if split == len(extents):
        raise ValueError(f"corpus {corpus.name} has {counts}, all of them held out: lower heldout_fraction")

    with open(spool, "rb") as file:

        def read(part: np.ndarray) -> Iterator[bytes]:
            for extent in part:
                file.seek(extent["offset"])
                yield file.read(extent["length"])

        train = extents[split:]
        # In the order of their hashes the first documents are a sample.
        sample = train[: 1 + int(np.searchsorted(np.cumsum(train["length"]), FIT_ON))]
        sampled = watched(read(sample), f"training {tokenizer.name}", int(sample["length"].sum()))
        tokenizer = tokenizer.fit(sampled, folder)
        heldout, left = [], heldout_bytes
        for document in read(extents[:split]):
            heldout.append(document[: character_boundary(document, left)])
            left -= len(document)
            if left <= 0:
                break
        dtype = token_dtype(len(tokenizer.pieces))
        heldout_tokens = _heldout_tokens(heldout, left < 0, tokenizer, dtype)
        documents = watched(read(train), "tokenising", size - held)
        train_sha256, train_tokens = _write_train(folder / "train.bin", documents, tokenizer, dtype)
    spool.unlink()

    heldout_tokens.tofile(folder / "heldout.bin")
    vocabulary = json.dumps([piece.decode("latin-1") for piece in tokenizer.pieces]).encode()
    (folder / "vocabulary.json").write_bytes(vocabulary)
    guarded = hashlib.sha256(heldout_tokens.tobytes() + vocabulary).hexdigest()
    meta = {
        "name": f"{corpus.name}/{tokenizer.name}",
        "dtype": dtype.str,
        "eot": tokenizer.eot,
        "heldout_bytes": sum(map(len, heldout)),
        "heldout_tokens": len(heldout_tokens),
        "train_tokens": train_tokens,
        "digest": hashlib.sha256(f"{train_sha256} {guarded} {tokenizer.eot}".encode()).hexdigest(),
        "heldout_and_vocabulary_sha256": guarded,
        "documents": {
            "found": found,
            "distinct": len(extents),
            "train": len(train),
            "heldout": len(heldout),
        },
        "bytes": size,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    log.info("prepared %s: %s", meta["name"], meta)


def _spool(path: Path, corpus: Corpus) -> tuple[int, np.ndarray]:
    """Write the documents into one file, so that a corpus larger than the memory can be put in order; return how many
    there are, and where each that is not empty lies, one of each kind, in the order of their hashes."""
    found, entries = 0, bytearray()
    with open(path, "wb") as file:
        for document in filter(None, watched(corpus.documents(), f"reading {corpus.name}")):
            found += 1
            entries += np.array((hashlib.sha256(document).digest(), file.tell(), len(document)), EXTENT).tobytes()
            file.write(document)
    extents = np.frombuffer(entries, EXTENT)
    extents = extents[np.argsort(extents["sha256"], kind="stable")]
    new = np.ones(len(extents), bool)
    new[1:] = extents["sha256"][1:] != extents["sha256"][:-1]
    return found, extents[new]


def _heldout_tokens(documents: list[bytes], last_is_cut: bool, tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    encoded = encode_without_loss(tokenizer, documents)
    eot = np.array([tokenizer.eot], dtype)
    ends = [eot] * (len(documents) - last_is_cut) + [eot[:0]] * last_is_cut
    return np.concatenate([part.astype(dtype) for pair in zip(encoded, ends, strict=True) for part in pair])


def encode_without_loss(tokenizer: Tokenizer, documents: list[bytes]) -> list[np.ndarray]:
    """Returns the ids of each document, without eot.

    Raises:
        ValueError: they do not give it back.
    """
    encoded = tokenizer.encode(documents)
    for document, ids in zip(documents, encoded, strict=True):
        if b"".join(tokenizer.pieces[i] for i in ids) != document:
            raise ValueError(
                f"tokenizer {tokenizer.name} does not give the document that starts with {document[:40]!r} "
                "back: bits per byte need a tokenizer without loss (byte-level BPE with no normaliser and no "
                "prefix space)"
            )
    return encoded


def _write_train(path: Path, documents: Iterable[bytes], tokenizer: Tokenizer, dtype: np.dtype) -> tuple[str, int]:
    """Write every document and an eot after it; returns the sha256 and the number of tokens."""
    sha256, eot = hashlib.sha256(), np.array([tokenizer.eot], dtype).tobytes()
    with open(path, "wb") as file:
        for batch in _batches(documents):
            for ids in tokenizer.encode(batch):
                tokens = ids.astype(dtype).tobytes() + eot
                sha256.update(tokens)
                file.write(tokens)
        return sha256.hexdigest(), file.tell() // dtype.itemsize


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= ENCODE_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def character_boundary(text: bytes, limit: int) -> int:
    """The largest position <= limit that is not inside a UTF-8 character; never more than 3 before limit."""
    if limit >= len(text):
        return len(text)
    starts = (i for i in range(limit, max(limit - 4, -1), -1) if text[i] & 0xC0 != 0x80)
    return next(starts, limit)


def beginning(data: TokenData, train_tokens: int) -> TokenData:
    """The same data with only its first training tokens.

    Raises:
        ValueError: when it has not so many.
    """
    if not 1 <= train_tokens <= len(data.train):
        raise ValueError(f"train_tokens={train_tokens} must be from 1 to the {len(data.train)} that there are")
    return replace(
        data,
        train=data.train[:train_tokens],
        train_answers=None if data.train_answers is None else data.train_answers[:train_tokens],
        digest=hashlib.sha256(f"{data.digest} {train_tokens}".encode()).hexdigest(),
        name=f"{data.name}[:{train_tokens}]",
    )

"""Token shards that others have written: nanoGPT's and llm.c's .bin files."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments.data.corpora import matching_files
from experiments.data.downloads import downloaded
from experiments.data.token_data import TokenData
from experiments.data.tokenizers import PretrainedTokenizer

TOKEN = np.dtype("<u2")
MAGIC, VERSION, HEADER = 20240520, 1, 256  # of llm.c: int32 magic, version, number of tokens, and zeros
SAMPLED, BLOCK = 64, 1 << 15  # blocks read of each training shard, and tokens in one


class Chained:
    """1-D arrays of one dtype as one, by length and slices; only slices across a seam are copied."""

    def __init__(self, parts: list[np.ndarray]):
        self.parts, self.dtype = parts, parts[0].dtype
        self.starts = np.cumsum([0] + [len(part) for part in parts]).tolist()

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: slice) -> np.ndarray:
        start, stop, step = index.indices(len(self))
        if step != 1:
            raise ValueError(f"slices of a chain of shards have step 1, not {step}")
        first, pieces = bisect_right(self.starts, start) - 1, []
        for part, offset in zip(self.parts[first:], self.starts[first:], strict=False):
            if offset >= stop:
                break
            pieces.append(part[max(start - offset, 0) : stop - offset])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [self.parts[0][:0]])


def token_bins(
    train: str | Iterable[str],
    val: str | Iterable[str],
    format: str,
    heldout_tokens: int,
    vocab_size: int = 50257,
    eot: int = 50256,
    bytes_per_token: float | None = None,
    tokenizer: str | Path | None = None,
    name: str = "token_bins",
) -> TokenData:
    """Shards of uint16 tokens as data: mapped, in the order of their names; nothing is copied but what URLs name, into
    the cache.

    The split is the shards' own. The digest covers all held-out tokens, and of each training shard its size
    and 64 blocks of 32768 tokens spread evenly over it, since reading terabytes to start a run would not do.

    Args:
        train, val: one or more globs, or URLs of single files.
        format: "nanogpt" (raw uint16) or "llm.c" (a header of 256 int32, then uint16).
        heldout_tokens: the first so many tokens of `val` are evaluated.
        vocab_size, eot: GPT-2's by default.
        bytes_per_token: bytes of text per held-out token, eot included, when it is known.
        tokenizer: a tokenizers JSON file, from which the bytes of the held-out tokens are counted exactly.

    Raises:
        ValueError: a glob matches nothing, a file is not of the format, an id is not below vocab_size, there
            are fewer held-out tokens than asked for, or not exactly one of bytes_per_token and tokenizer is
            given.
    """
    if (bytes_per_token is None) == (tokenizer is None):
        raise ValueError(
            "bits per byte need the bytes of the held-out tokens: give exactly one of "
            "bytes_per_token=<bytes of text per token> and tokenizer=<path of a tokenizers JSON file>"
        )
    if heldout_tokens < 1 or not 0 <= eot < vocab_size <= 1 << 16 or (bytes_per_token or 1) <= 0:
        raise ValueError(
            f"heldout_tokens={heldout_tokens} must be at least 1, eot={eot} at least 0 and below vocab_size="
            f"{vocab_size}, that at most {1 << 16}, and bytes_per_token={bytes_per_token} above 0"
        )
    train_parts = {path: read_shard(path, format) for path in _files(train)}
    val_chain = Chained([read_shard(path, format) for path in _files(val)])
    if len(val_chain) < heldout_tokens:
        raise ValueError(
            f"val={val!r} has {len(val_chain)} tokens, fewer than heldout_tokens={heldout_tokens}: lower it"
        )
    heldout = np.array(val_chain[:heldout_tokens])
    _check_ids(heldout, vocab_size, f"val={val!r}")

    sha256 = hashlib.sha256(f"{vocab_size} {eot} {bytes_per_token} ".encode() + heldout.tobytes())
    for path, part in train_parts.items():
        sha256.update(f" {len(part)} ".encode())
        for start in sorted(set(np.linspace(0, max(len(part) - BLOCK, 0), SAMPLED, dtype=np.int64).tolist())):
            block = part[start : start + BLOCK]
            _check_ids(block, vocab_size, str(path))
            sha256.update(block.tobytes())

    if bytes_per_token is not None:
        pieces = [f"<{i}>".encode() for i in range(vocab_size)]
        heldout_bytes = round(bytes_per_token * heldout_tokens)
    else:
        known = PretrainedTokenizer(str(tokenizer))
        pieces = known.pieces
        if (len(pieces), known.eot) != (vocab_size, eot):
            raise ValueError(
                f"{tokenizer} has {len(pieces)} ids and eot={known.eot}, and the shards "
                f"vocab_size={vocab_size} and eot={eot}: give the tokenizer that wrote the shards"
            )
        heldout_bytes = sum(len(pieces[i]) for i in heldout.tolist())
        sha256.update(repr(pieces).encode())
    parts = list(train_parts.values())
    return TokenData(
        train=parts[0] if len(parts) == 1 else Chained(parts),
        heldout=heldout,
        heldout_bytes=heldout_bytes,
        vocab_size=vocab_size,
        eot=eot,
        digest=sha256.hexdigest(),
        name=name,
        pieces=pieces,
    )


def read_shard(path: Path, format: str) -> np.ndarray:
    """The tokens of one shard, mapped.

    Raises:
        ValueError: the file is not of the format; names it.
    """
    if format not in ("nanogpt", "llm.c"):
        raise ValueError(f"format={format!r} must be 'nanogpt' (raw uint16) or 'llm.c' (a header of 256 int32 first)")
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", HEADER)
    has_magic = len(header) > 0 and header[0] == MAGIC
    if format == "nanogpt":
        if has_magic:
            raise ValueError(f"{path} has the header of an llm.c shard: set format=llm.c")
        if size == 0 or size % TOKEN.itemsize:
            raise ValueError(f"{path} has {size} bytes, which is not one or more uint16 tokens")
        return np.memmap(path, TOKEN, mode="r")
    if not has_magic or len(header) < HEADER:
        raise ValueError(f"{path} does not start with llm.c's header of 256 int32 and its magic number {MAGIC}")
    version, tokens = header[1:3].tolist()
    if version != VERSION:
        raise ValueError(f"{path} is an llm.c shard of version {version}; only version {VERSION} can be read")
    if size != header.nbytes + tokens * TOKEN.itemsize or tokens < 1:
        raise ValueError(
            f"{path} has {size} bytes, and its header promises {tokens} tokens of 2 bytes after 1024 bytes"
        )
    return np.memmap(path, TOKEN, mode="r", offset=header.nbytes)


def _files(globs: str | Iterable[str]) -> list[Path]:
    found = []
    for pattern in [globs] if isinstance(globs, str) else list(globs):
        if "://" in pattern:
            found.append(downloaded(pattern))
            continue
        if not (matches := matching_files(pattern)):
            raise ValueError(f"no file matches {pattern!r} (looked from {Path.cwd()})")
        found += matches
    return sorted(set(found))


def _check_ids(tokens: np.ndarray, vocab_size: int, where: str) -> None:
    if tokens.max() >= vocab_size:
        raise ValueError(f"{where} holds id {tokens.max()}, and vocab_size={vocab_size}: it is of another tokenizer")

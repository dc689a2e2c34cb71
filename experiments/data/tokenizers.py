"""Tokenizers that lose no byte: an id stands for a fixed string of bytes (`pieces`), on any input."""

import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

END_OF_TEXT = "<|endoftext|>"


class ByteTokenizer:
    """One id per byte, and eot: 257 ids."""

    name = "bytes"
    eot = 256
    pieces = [bytes([byte]) for byte in range(256)] + [b""]

    def fingerprint(self) -> str:
        return "bytes"

    def fit(self, documents: Iterable[bytes], folder: Path) -> "ByteTokenizer":
        return self

    def encode(self, documents: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(document, np.uint8) for document in documents]


class BPETokenizer:
    """Byte-level BPE (Sennrich et al., arXiv 1508.07909; Radford et al. 2019, section 2.2) trained on
    training documents. Kept beside the tokens as tokenizer.json, the format of the `tokenizers` library.

    Args:
        vocab_size: number of ids, of which 256 are the single bytes and one is eot; at least 257.
    """

    def __init__(self, vocab_size: int):
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} must be at least 257: the 256 bytes and eot")
        self.vocab_size = vocab_size
        self.name = f"bpe{vocab_size}"

    def fingerprint(self) -> str:
        return self.name

    def fit(self, documents: Iterable[bytes], folder: Path) -> "PretrainedTokenizer":
        """
        Raises:
            ValueError: the documents have too few distinct pairs for so many ids.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),  # of the merges, which the bar of documents says nothing of
        )
        texts = (part for document in documents for part in utf8_parts(document) if isinstance(part, str))
        tokenizer.train_from_iterator(texts, trainer)
        if tokenizer.get_vocab_size() < self.vocab_size:
            raise ValueError(
                f"the training documents give a vocabulary of {tokenizer.get_vocab_size()} ids and not of "
                f"vocab_size={self.vocab_size}: lower vocab_size or choose a larger corpus"
            )
        tokenizer.save(str(folder / "tokenizer.json"))
        return PretrainedTokenizer(folder / "tokenizer.json", name=self.name)


class PretrainedTokenizer:
    """A byte-level BPE tokenizer from a file of the `tokenizers` library: GPT-2's, or one from our cache.

    Bytes that are not UTF-8 get the ids of single bytes, so no input is lost. The text of a special token
    inside a document is encoded as the text that it is.

    Args:
        path: a tokenizers JSON file.
        eot_token: the special token that ends a document.
        name: for reports and the cache; the file's name by default.

    Raises:
        ValueError: the file cannot be read, has no such token, or is not byte-level.
    """

    def __init__(self, path: str | Path, eot_token: str = END_OF_TEXT, name: str | None = None):
        from tokenizers import Tokenizer

        self.path = Path(path).expanduser()
        self.name = name or self.path.stem
        try:
            self._tokenizer = Tokenizer.from_file(str(self.path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"cannot read {self.path} as a tokenizers JSON file: {error}") from error
        if (eot := self._tokenizer.token_to_id(eot_token)) is None:
            special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise ValueError(f"{self.path} has no token {eot_token!r}; its special tokens are {special}")
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.eot, self.eot_token = eot, eot_token
        byte_ids = [self._tokenizer.token_to_id(character) for character in byte_characters()]
        self._byte_ids = [i for i in byte_ids if i is not None]
        if self._byte_ids != byte_ids or self._tokenizer.normalizer is not None:
            raise ValueError(
                f"{self.path} is not a byte-level BPE tokenizer without a normaliser, so it can lose bytes: "
                "choose one that is (GPT-2's for instance), or train one with BPETokenizer"
            )

    def fingerprint(self) -> str:
        return f"{hashlib.sha256(self.path.read_bytes()).hexdigest()} {self.eot_token}"

    @cached_property
    def pieces(self) -> list[bytes]:
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=False)
        pieces = [b""] * (1 + max(self._tokenizer.get_vocab().values()))
        for token, i in vocabulary.items():
            if set(token) <= byte_of.keys():
                pieces[i] = bytes(byte_of[character] for character in token)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            pieces[i] = b"" if token.special else token.content.encode()
        return pieces

    def fit(self, documents: Iterable[bytes], folder: Path) -> "PretrainedTokenizer":
        return self

    def encode(self, documents: list[bytes]) -> list[np.ndarray]:
        parts = [list(utf8_parts(document)) for document in documents]
        texts = [part for document in parts for part in document if isinstance(part, str)]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))

        def ids(part: str | bytes) -> list[int]:
            return next(encoded).ids if isinstance(part, str) else [self._byte_ids[byte] for byte in part]

        return [np.array([i for part in document for i in ids(part)], np.uint32) for document in parts]


def utf8_parts(document: bytes) -> Iterator[str | bytes]:
    """The document in order: str where it is UTF-8, bytes where it is not."""
    for part in re.split("([\udc80-\udcff]+)", document.decode(errors="surrogateescape")):
        if part:
            yield part.encode(errors="surrogateescape") if "\udc80" <= part[0] <= "\udcff" else part


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level BPE (Radford et al. 2019): Latin-1's
    printable ones for themselves, and U+0100 onwards for the others in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

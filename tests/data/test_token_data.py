import json
import logging
import os
import random
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest

from experiments.data.corpora import TextFiles
from experiments.data.token_data import TokenData, prepare, token_dtype
from experiments.data.tokenizers import BPETokenizer, ByteTokenizer

TEXTS = [f"document {i}: {'ünïcode wörds ' * (i % 7 + 1)}{i * i}\n".encode() for i in range(200)]


@dataclass
class Documents:
    texts: list[bytes] = field(default_factory=lambda: list(TEXTS))
    name: str = "documents"
    version: int = 0
    reads: int = 0

    def fingerprint(self) -> str:
        return f"documents {self.version}"

    def documents(self):
        self.reads += 1
        yield from self.texts


class CountedBytes(ByteTokenizer):
    encoded = 0

    def encode(self, documents):
        self.encoded += len(documents)
        return super().encode(documents)


def text(data: TokenData, tokens) -> bytes:
    return b"".join(data.pieces[i] for i in tokens.tolist())


def documents(data: TokenData, tokens) -> list[bytes]:
    parts = np.split(tokens, np.flatnonzero(tokens == data.eot) + 1)
    return [text(data, part) for part in parts if len(part)]


def build(cache, corpus=None, tokenizer=None, heldout_bytes=1500, heldout_fraction=0.2) -> TokenData:
    return prepare(corpus or Documents(), tokenizer or ByteTokenizer(), heldout_bytes, heldout_fraction, cache)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else BPETokenizer(300)


def test_tokens_are_mapped_typed_and_below_the_vocabulary(tmp_path, tokenizer):
    data = build(tmp_path, tokenizer=tokenizer)
    assert isinstance(data.train, np.memmap) and data.train.ndim == data.heldout.ndim == 1
    assert data.train.dtype == data.heldout.dtype == np.uint16
    assert max(data.train.max(), data.heldout.max()) < data.vocab_size == len(data.pieces)
    assert data.train[-1] == data.eot
    assert len(data.digest) == 64 and int(data.digest, 16)
    with pytest.raises(ValueError, match="read-only"):
        data.heldout[0] = 1


def test_no_document_is_in_both_parts_and_none_is_made_up(tmp_path, tokenizer):
    data = build(tmp_path, tokenizer=tokenizer)
    train, heldout = documents(data, data.train), documents(data, data.heldout)
    assert set(train) <= set(TEXTS) and set(heldout[:-1]) <= set(TEXTS)
    assert any(original.startswith(heldout[-1]) for original in TEXTS)
    assert not set(train) & set(heldout)
    assert not [original for original in train if original.startswith(heldout[-1])]


def test_the_held_out_bytes_are_the_same_for_every_tokenizer(tmp_path):
    by_byte, by_bpe = build(tmp_path), build(tmp_path, tokenizer=BPETokenizer(300))
    assert text(by_byte, by_byte.heldout) == text(by_bpe, by_bpe.heldout)
    assert by_byte.heldout_bytes == by_bpe.heldout_bytes == len(text(by_byte, by_byte.heldout))
    assert len(by_bpe.heldout) < len(by_byte.heldout)
    assert documents(by_byte, by_byte.train) == documents(by_bpe, by_bpe.train)


@pytest.mark.parametrize("heldout_bytes", range(1490, 1500))
def test_the_held_out_text_is_cut_at_a_character_with_at_most_three_bytes_missing(tmp_path, heldout_bytes):
    data = build(tmp_path, heldout_bytes=heldout_bytes)
    assert heldout_bytes - 3 <= data.heldout_bytes <= heldout_bytes
    assert text(data, data.heldout).decode()
    assert data.heldout[-1] != data.eot


def test_a_held_out_document_that_ends_at_the_limit_keeps_its_eot(tmp_path):
    first = documents(data := build(tmp_path), data.heldout)[0]
    data = build(tmp_path, heldout_bytes=len(first))
    assert text(data, data.heldout) == first and data.heldout[-1] == data.eot


def test_exact_duplicates_and_empty_documents_are_dropped(tmp_path):
    plain = build(tmp_path)
    doubled = build(tmp_path, Documents([b"", *TEXTS, *TEXTS, b""], version=1))
    assert doubled.digest == plain.digest
    counts = [json.loads(path.read_text())["documents"] for path in tmp_path.glob("*/meta.json")]
    assert sorted((c["found"], c["distinct"]) for c in counts) == [(200, 200), (400, 200)]


def test_the_split_and_the_order_do_not_depend_on_the_order_of_files(tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert build(tmp_path, Documents(shuffled, version=1)).digest == build(tmp_path).digest


def test_where_a_document_goes_does_not_depend_on_other_documents(tmp_path):
    whole, half = build(tmp_path), build(tmp_path, Documents(TEXTS[::2], version=1), heldout_bytes=500)
    trained = set(documents(whole, whole.train))
    assert set(documents(half, half.train)) == trained & set(TEXTS[::2])


def test_the_training_part_does_not_depend_on_heldout_bytes(tmp_path):
    assert np.array_equal(build(tmp_path).train, build(tmp_path, heldout_bytes=700).train)


def test_a_tokenizer_is_trained_on_so_much_of_the_training_documents_and_all_are_encoded(tmp_path, monkeypatch):
    seen = []

    class Fitted(ByteTokenizer):
        def fit(self, documents, folder):
            seen.extend(documents)
            return self

    monkeypatch.setattr("experiments.data.token_data.FIT_ON", 1000)
    data = build(tmp_path, tokenizer=Fitted())
    assert sum(map(len, seen[:-1])) < 1000 <= sum(map(len, seen))
    assert documents(data, data.train)[: len(seen)] == seen
    assert len(documents(data, data.train)) > 2 * len(seen)


def test_a_second_call_opens_what_the_first_wrote(tmp_path, tokenizer):
    first_corpus, second_corpus, second_tokenizer = Documents(), Documents(), CountedBytes()
    first = build(tmp_path, first_corpus, CountedBytes())
    second = build(tmp_path, second_corpus, second_tokenizer)
    assert (first_corpus.reads, second_corpus.reads, second_tokenizer.encoded) == (1, 0, 0)
    assert np.array_equal(first.train, second.train) and np.array_equal(first.heldout, second.heldout)
    for name in ("digest", "heldout_bytes", "vocab_size", "eot", "name", "pieces"):
        assert getattr(first, name) == getattr(second, name)


def test_a_changed_corpus_or_setting_is_prepared_again(tmp_path):
    digests = {build(tmp_path).digest, build(tmp_path, heldout_bytes=700).digest}
    digests |= {
        build(tmp_path, heldout_fraction=0.3).digest,
        build(tmp_path, tokenizer=BPETokenizer(300)).digest,
    }
    digests |= {build(tmp_path, Documents(TEXTS[:-20], version=1)).digest}
    assert len(digests) == 5 == len(list(tmp_path.glob("*/meta.json")))


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("train.bin", truncate),
        ("heldout.bin", truncate),
        ("heldout.bin", flip),
        ("vocabulary.json", truncate),
        ("meta.json", truncate),
        ("meta.json", lambda path: path.write_text("{}")),
        *[(name, os.unlink) for name in ("train.bin", "heldout.bin", "vocabulary.json", "meta.json")],
    ],
)
def test_a_damaged_entry_is_rebuilt_and_this_is_said(tmp_path, caplog, file, damage):
    digest = build(tmp_path).digest
    (path,) = tmp_path.glob(f"*/{file}")
    damage(path)
    corpus = Documents()
    with caplog.at_level(logging.WARNING):
        assert build(tmp_path, corpus).digest == digest
    assert corpus.reads == 1
    assert [
        record for record in caplog.records if "rebuilding" in record.message and str(path.parent) in record.message
    ]


def test_a_preparation_that_fails_leaves_nothing_half_done(tmp_path):
    class Broken(Documents):
        def documents(self):
            yield TEXTS[0]
            raise ValueError("cannot read some/file.txt")

    with pytest.raises(ValueError, match="some/file.txt"):
        build(tmp_path, Broken())
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert build(tmp_path).heldout_bytes


@pytest.mark.thorough
def test_processes_that_prepare_at_once_agree_and_one_of_them_works(tmp_path):
    code = (
        "import sys, time, logging; logging.basicConfig(level=logging.INFO)\n"
        "from experiments.data.corpora import TextFiles; from experiments.data.token_data import prepare\n"
        "from experiments.data.tokenizers import ByteTokenizer\n"
        "class Slow(TextFiles):\n"
        "    def documents(self):\n        time.sleep(1)\n        yield from super().documents()\n"
        "print(prepare(Slow(sys.argv[1]), ByteTokenizer(), 1500, 0.2, sys.argv[2]).digest)"
    )
    rows = "\n".join(json.dumps({"text": text.decode()}) for text in TEXTS)
    (tmp_path / "rows.jsonl").write_text(rows)
    command = [sys.executable, "-c", code, str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert {out for out, _ in outputs} == {build(tmp_path).digest + "\n"}
    assert sum("prepared" in err for _, err in outputs) == 1


def test_samples_decode_to_text_whatever_they_hold(tmp_path):
    data = build(tmp_path)
    assert data.decode([104, 105, data.eot, 0xFF, 104]) == "hi\n<eot>\n\ufffdh"
    assert data.decode(np.array([], np.uint16)) == ""
    assert data.decode(data.heldout).startswith("document")
    with pytest.raises(ValueError, match="id 257: .* ids 0 to 256"):
        data.decode([257])


@pytest.mark.parametrize(("vocab_size", "bits"), [(257, 16), (1 << 16, 16), ((1 << 16) + 1, 32)])
def test_the_smallest_type_that_holds_the_vocabulary_is_taken(vocab_size, bits):
    assert token_dtype(vocab_size) == np.dtype(f"uint{bits}")


def test_a_vocabulary_above_16_bits_is_kept_whole(tmp_path):
    class Wide(ByteTokenizer):
        pieces = [b"\x00"] * 70000 + ByteTokenizer.pieces
        eot = 70256

        def encode(self, documents):
            return [ids.astype(np.uint32) + 70000 for ids in super().encode(documents)]

    data = build(tmp_path, tokenizer=Wide())
    assert data.train.dtype == data.heldout.dtype == np.uint32 and data.vocab_size == 70257
    assert set(documents(data, data.train)) < set(TEXTS)


class Lossy(ByteTokenizer):
    def encode(self, documents):
        return super().encode([document.lower() for document in documents])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": Documents([b"", b""])}, "corpus documents has no documents"),
        (
            {"heldout_bytes": 10**6},
            r"200 distinct documents with \d+ bytes, .* only \d+ bytes, fewer than heldout_bytes=",
        ),
        ({"heldout_bytes": 10**6}, "lower heldout_bytes, raise heldout_fraction"),
        (
            {"corpus": Documents(TEXTS[:3]), "heldout_fraction": 0.999999, "heldout_bytes": 5},
            "lower heldout_fraction",
        ),
        ({"heldout_bytes": 0}, "heldout_bytes=0 must be at least 1"),
        ({"heldout_fraction": 0.0}, "heldout_fraction=0.0 must lie between 0 and 1"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0"),
        (
            {"tokenizer": Lossy(), "corpus": Documents([t.upper() for t in TEXTS])},
            "does not give the document",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_way_out(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **settings)


def test_a_large_text_is_prepared_in_little_memory(tmp_path):
    size = 1 << 25
    (tmp_path / "large.txt").write_bytes(b"".join(b"line number %d\n" % i for i in range(size // 16)))
    tracemalloc.start()
    data = prepare(TextFiles(str(tmp_path / "large.txt")), ByteTokenizer(), 65536, 0.1, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.train) > size * 0.8 and peak < size / 2

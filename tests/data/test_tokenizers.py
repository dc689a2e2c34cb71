import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from experiments.data.tokenizers import BPETokenizer, ByteTokenizer, PretrainedTokenizer, utf8_parts

TEXT = "def f(x):\n    return x + 1\n\nfür alle, 世界 🙂 <|endoftext|>\t\r\n" * 3
DOCUMENTS = [TEXT.encode(), b"\xff\xfe binary \x00\x80", b"class A:\n    pass\n" * 4]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return BPETokenizer(300).fit(DOCUMENTS, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


def decoded(tokenizer, ids) -> bytes:
    return b"".join(tokenizer.pieces[i] for i in ids)


@given(documents=st.lists(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), max_size=4))
@settings(deadline=None, max_examples=100)
def test_any_bytes_come_back_and_never_as_eot(tokenizer, documents):
    encoded = tokenizer.encode(documents)
    assert [decoded(tokenizer, ids) for ids in encoded] == documents
    assert all(tokenizer.eot not in ids for ids in encoded)


def test_every_id_stands_for_bytes_and_only_eot_for_none(tokenizer):
    empty = [i for i, piece in enumerate(tokenizer.pieces) if not piece]
    assert empty == [tokenizer.eot]
    assert {bytes([b]) for b in range(256)} <= set(tokenizer.pieces)


def test_bpe_has_the_size_asked_for_and_is_shorter_than_bytes(bpe):
    assert len(bpe.pieces) == 300
    assert len(bpe.encode([TEXT.encode()])[0]) < len(TEXT.encode())


def test_a_special_token_written_in_a_document_is_text(bpe):
    (ids,) = bpe.encode([b"a<|endoftext|>b"])
    assert bpe.eot not in ids and decoded(bpe, ids) == b"a<|endoftext|>b"


def test_training_in_another_process_gives_the_same_file(bpe, tmp_path):
    code = "import sys; from pathlib import Path; from experiments.data.tokenizers import BPETokenizer\n"
    code += f"BPETokenizer(300).fit({DOCUMENTS!r}, Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == bpe.path.read_bytes()


def test_a_trained_file_can_be_loaded_as_a_pretrained_one(bpe):
    loaded = PretrainedTokenizer(bpe.path)
    assert loaded.pieces == bpe.pieces and loaded.eot == bpe.eot
    assert loaded.encode(DOCUMENTS)[0].tolist() == bpe.encode(DOCUMENTS)[0].tolist()


def test_padding_and_truncation_that_a_file_asks_for_are_not_done(bpe, tmp_path):
    tokenizer = Tokenizer.from_file(str(bpe.path))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=3)
    tokenizer.save(str(tmp_path / "padded.json"))
    padded = PretrainedTokenizer(tmp_path / "padded.json").encode(DOCUMENTS)
    assert [ids.tolist() for ids in padded] == [ids.tolist() for ids in bpe.encode(DOCUMENTS)]


def test_the_fingerprint_of_a_file_follows_its_content_and_eot(bpe, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_bytes(bpe.path.read_bytes())
    assert PretrainedTokenizer(copy).fingerprint() == bpe.fingerprint()
    content = json.loads(copy.read_text())
    content["added_tokens"].append(dict(content["added_tokens"][0], id=300, content="<|other|>"))
    copy.write_text(json.dumps(content))
    fingerprints = {PretrainedTokenizer(copy, eot).fingerprint() for eot in ("<|endoftext|>", "<|other|>")}
    assert len({*fingerprints, bpe.fingerprint()}) == 3


def test_utf8_parts_keep_the_order_and_every_byte():
    parts = list(utf8_parts(b"ab\xff\xfe\xe4\xb8\x96\x80"))
    assert parts == ["ab", b"\xff\xfe", "世", b"\x80"]


def test_a_vocabulary_that_the_documents_cannot_fill_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary of 25[0-9] ids and not of vocab_size=500: lower vocab_size"):
        BPETokenizer(500).fit([b"ab"], tmp_path)
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        BPETokenizer(256)


def test_files_that_are_no_byte_level_tokenizer_are_refused(bpe, tmp_path):
    with pytest.raises(ValueError, match="cannot read .*missing.json"):
        PretrainedTokenizer(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot read .*broken.json"):
        PretrainedTokenizer(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="no token '</s>'; its special tokens are .*endoftext"):
        PretrainedTokenizer(bpe.path, eot_token="</s>")
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ValueError, match="words.json is not a byte-level BPE tokenizer"):
        PretrainedTokenizer(tmp_path / "words.json")
    normalised = Tokenizer.from_file(str(bpe.path))
    normalised.normalizer = normalizers.Lowercase()
    normalised.save(str(tmp_path / "lower.json"))
    with pytest.raises(ValueError, match="lower.json is not a byte-level BPE tokenizer without a normaliser"):
        PretrainedTokenizer(tmp_path / "lower.json")

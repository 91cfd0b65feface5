"""Tokenizers: the built-in bytes, and tokenizer.json files with everything that can surprise in them."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from etils import epath

from fathom.train.tokenizers import load_tokenizer

TEXT = "Déjà vu: 深い, 🐟\r\n\tx = {'a': 1}\0"


def train_bpe(folder: Path, *, special=("</s>",), vocab_size=300) -> tokenizers.Tokenizer:
    """Writes a small byte-level BPE as <folder>/tokenizer.json."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the loss falls when the model learns"] * 4, trainer)
    save(bpe, folder)
    return bpe


def save(tokenizer: tokenizers.Tokenizer, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def test_bytes():
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    every_byte = bytes(range(256))
    ids = tokenizer.encode(every_byte)
    assert ids.dtype == np.int32 and ids.tolist() == list(range(256))
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.encode(b"").shape == (0,)
    assert tokenizer.decode([256, *tokenizer.encode(TEXT), 257]) == TEXT
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match=r"ids 3\.\.258 to decode, expected 0\.\.257"):
        tokenizer.decode([3, 258])


def test_a_file_round_trips(tmp_path):
    train_bpe(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.encode(TEXT.encode()).tolist() == ids.tolist()
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == TEXT
    assert len(tokenizer.encode("the loss")) < 8, "merges are not used"


def test_threads_encode_as_the_library_does(tmp_path):
    """Each text by itself, whatever is encoded beside it; the library starts no threads of its own."""
    bpe = train_bpe(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    texts = ["", " ", TEXT, *("the model learns " * i + TEXT[i % 20 :] for i in range(60))]
    with ThreadPoolExecutor(4) as pool:
        found = [ids.tolist() for ids in pool.map(tokenizer.encode, texts)]
    assert found == [bpe.encode(text, add_special_tokens=False).ids for text in texts]


def test_a_document_cannot_end_itself(tmp_path):
    bpe = train_bpe(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "a</s>b"
    assert tokenizer.eos_id in bpe.encode(text).ids  # what the library does by itself
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids and tokenizer.decode(ids) == text


def test_truncation_padding_and_added_tokens_of_the_file_are_off(tmp_path):
    bpe = train_bpe(tmp_path, special=("</s>", "<s>"))
    text = "the model learns " * 20
    whole = bpe.encode(text).ids
    bpe.enable_truncation(5)
    bpe.enable_padding(length=500)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 0)]
    )
    assert len(bpe.encode(text).ids) == 500
    tokenizer = load_tokenizer(save(bpe, tmp_path))
    assert tokenizer.encode(text).tolist() == whole


def test_vocab_size_counts_from_the_largest_id(tmp_path):
    """A vocabulary with gaps: three tokens, ids up to 9."""
    words = tokenizers.models.WordLevel({"a": 0, "</s>": 4, "z": 9}, unk_token="a")
    assert load_tokenizer(save(tokenizers.Tokenizer(words), tmp_path)).vocab_size == 10


@pytest.mark.parametrize("token", ["<stop>", {"content": "<stop>", "lstrip": False}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_eos_from_the_files_beside_it(tmp_path, file, token):
    bpe = train_bpe(tmp_path, special=("</s>", "<stop>"))
    name = str(tmp_path / "tokenizer.json")
    without = load_tokenizer(name)
    assert without.eos_id == bpe.token_to_id("</s>")
    (tmp_path / file).write_text(json.dumps({"eos_token": token}))
    tokenizer = load_tokenizer(name)
    assert tokenizer.eos_id == bpe.token_to_id("<stop>") and tokenizer.hash != without.hash


def test_eos_of_deepseek_by_name(tmp_path):
    bpe = train_bpe(tmp_path, special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"))
    assert load_tokenizer(save(bpe, tmp_path)).eos_id == 1


@pytest.mark.parametrize(
    ("special", "files", "message"),
    [
        ((), {}, "no token is known to end a text; put .*tokenizer_config.json"),
        (("</s>", "<|endoftext|>"), {}, "could all end a text"),
        (("</s>",), {"tokenizer_config.json": '{"eos_token": "<no>"}'}, "eos_token '<no>' is not a token"),
        (("</s>",), {"tokenizer_config.json": '{"eos_token": 2}'}, "eos_token 2 is not a token"),
        (("</s>",), {"special_tokens_map.json": "{"}, "special_tokens_map.json is not readable JSON"),
    ],
)
def test_eos_that_cannot_be_told(tmp_path, special, files, message):
    train_bpe(tmp_path, special=special)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("folder", "Is a directory"),
        (b"", "is not a tokenizer.json"),
        (b'{"version": "1.0"}', "is not a tokenizer.json"),
        (b"\xff\xfe\x00", "is not a tokenizer.json"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(path) in str(caught.value)


def test_a_remote_file(tmp_path, monkeypatch):
    """Read through etils, as checkpoints are; what it cannot read is told."""
    train_bpe(tmp_path, special=("</s>", "<stop>"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    here = load_tokenizer(str(tmp_path / "tokenizer.json"))
    with monkeypatch.context() as patch:
        patch.setattr(epath, "Path", lambda name: Path(name.replace("gs://bucket", str(tmp_path))))
        remote = load_tokenizer("gs://bucket/tokenizer.json")
        with pytest.raises(ValueError, match="no.json: No such file"):
            load_tokenizer("gs://bucket/no.json")
    assert (remote.hash, remote.eos_id) == (here.hash, here.eos_id) and remote.name == "gs://bucket/tokenizer.json"
    with pytest.raises(ValueError, match=r"nowhere://a/b: not a path that can be read here .*; copy the file"):
        load_tokenizer("nowhere://a/b")

    def read_bytes(path):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(type(epath.Path("gs://bucket/a")), "read_bytes", read_bytes)
    with pytest.raises(ValueError, match=r"gs://bucket/a cannot be read: Please install gcsfs"):
        load_tokenizer("gs://bucket/a")


def test_the_hash_follows_the_content(tmp_path):
    train_bpe(tmp_path / "a")
    train_bpe(tmp_path / "b")
    train_bpe(tmp_path / "c", special=("</s>", "<s>"))
    a, b, c = (load_tokenizer(str(tmp_path / name / "tokenizer.json")).hash for name in "abc")
    assert a == b != c and load_tokenizer("bytes").hash not in (a, c)

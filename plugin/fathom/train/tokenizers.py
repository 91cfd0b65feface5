"""Tokenizers: raw bytes, built in, and any `tokenizer.json`, from a local path or a remote one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

BYTES = "bytes"
"""The name of the built-in tokenizer in recipes."""

KNOWN_EOS = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""End-of-text tokens of the common families, looked for when no file beside the tokenizer names one."""


class Tokenizer(Protocol):
    """What the loader needs of a tokenizer.

    Attributes:
      name: as in the recipe. vocab_size: largest id + 1. eos_id: appended to every document.
      hash: hex digest of everything that decides the ids.
      needs_text: True when documents must be valid UTF-8.
    """

    name: str
    vocab_size: int
    eos_id: int
    hash: str
    needs_text: bool

    def encode(self, document: bytes | str) -> np.ndarray:
        """Ids [n] int32, no special token added. UnicodeDecodeError on bytes that are not UTF-8."""
        ...

    def decode(self, ids: Any) -> str:
        """Text of ids, special tokens left out."""
        ...


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a recipe: "bytes", or the path of a `tokenizer.json`, local or remote ("gs://...").

    Raises:
      ValueError: when the file is missing, unreadable, not a tokenizer, or has no end-of-text token.
    """
    return ByteTokenizer() if name == BYTES else FileTokenizer(name)


class ByteTokenizer:
    """Ids 0..255 are bytes, 256 begins a text and 257 ends one. Every file has an encoding."""

    name = BYTES
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    hash = hashlib.blake2b(b"fathom bytes: 0-255 bytes, 256 BOS, 257 EOS", digest_size=16).hexdigest()
    needs_text = False

    def encode(self, document: bytes | str) -> np.ndarray:
        """Ids [n] int32, one per byte (of the UTF-8, for a str)."""
        data = document.encode("utf-8") if isinstance(document, str) else document
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        """Text of ids; BOS and EOS are left out, bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: for an id outside 0..257.
        """
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"ids {ids.min()}..{ids.max()} to decode, expected 0..{self.vocab_size - 1}")
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` library.

    Documents are plain text: "</s>" written in one is encoded as its characters, never as the
    control token, and the file's own truncation and padding are switched off. Added tokens that the file does not call
    special (DeepSeek's `<think>` and `<｜User｜>`) are found in documents all the same, unless `literal` is set.

    Several threads may encode at once, each on a core of its own. The library's own threads are therefore switched
    off, in the whole process, unless TOKENIZERS_PARALLELISM is set: they would compete, and forking warns of them.

    Args:
      name: a path. literal: encode all added tokens but those of spaces as their characters.

    Raises:
      ValueError: see `load_tokenizer`.
    """

    needs_text = True

    def __init__(self, name: str, literal: bool = False):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # Imported here: runs on bytes do without it.
        import tokenizers

        path = _path_of(name)
        data = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(_all_special(data) if literal else data)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"tokenizer {path} has no tokens")
        self.name = name
        # Ids may have gaps, so their number is no bound.
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_token = _eos_token(path, vocabulary)
        self.eos_id = vocabulary[self.eos_token]
        self.hash = hashlib.blake2b(data + b"\0%d" % self.eos_id, digest_size=16).hexdigest()

    def token_id(self, token: str) -> int | None:
        """The id of a token, None where the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, document: bytes | str) -> np.ndarray:
        """Ids [n] int32, no special token among them."""
        text = document if isinstance(document, str) else document.decode("utf-8")
        # A batch of one: the library gives the interpreter's lock away for batches only. "fast" leaves out offsets.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def decode(self, ids: Any) -> str:
        """Text of ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in np.asarray(ids).reshape(-1)])


def _path_of(name: str) -> Path:
    if "://" not in name:
        return Path(name).expanduser()
    # Imported here: a local file does without it.
    from etils import epath

    try:
        return epath.Path(name)
    except Exception as error:  # a KeyError for a scheme that it does not know
        raise ValueError(f"tokenizer {name}: not a path that can be read here ({error!r}); copy the file") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror or error}; give a tokenizer.json") from None
    except Exception as error:  # what a remote file system raises, and an ImportError where its package is missing
        raise ValueError(f"tokenizer {path} cannot be read: {error}; give a tokenizer.json, or copy it here") from None


def _all_special(data: bytes) -> bytes:
    """A tokenizer.json with all added tokens special, but for those of spaces: that makes the library skip them."""
    content = json.loads(data)
    for token in content.get("added_tokens") or ():
        token["special"] = bool(token["special"] or token["content"].strip())
    return json.dumps(content).encode("utf-8")


def _eos_token(path: Path, vocabulary: dict[str, int]) -> str:
    """The end-of-text token: as the files beside the tokenizer say, or else a well-known name."""
    for file in (path.parent / "tokenizer_config.json", path.parent / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not readable JSON: {error}") from None
        token = config.get("eos_token") if isinstance(config, dict) else None
        if isinstance(token, dict):
            token = token.get("content")
        if token is None:
            continue
        if not isinstance(token, str) or token not in vocabulary:
            raise ValueError(f"{file}: eos_token {token!r} is not a token of {path}; correct it")
        return token
    found = [token for token in KNOWN_EOS if token in vocabulary]
    if len(found) != 1:
        raise ValueError(
            f"tokenizer {path}: {f'{found} could all end' if found else 'no token is known to end'} a text; "
            f'put {{"eos_token": "..."}} into {path.parent / "tokenizer_config.json"}'
        )
    return found[0]

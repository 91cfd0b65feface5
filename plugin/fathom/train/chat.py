"""Conversations as DeepSeek-V4 and V3.2 encode them, and which of their tokens a fine-tuning trains.

Source of the encoding: the functions `encode_messages` that the releases ship in place of a chat template
(`encoding/encoding_dsv4.py` of DeepSeek-V4, `encoding/encoding_dsv32.py` of DeepSeek-V3.2). Without tools the two
give the same text, which is what is made here:

    BOS system USER question ASSISTANT </think> answer EOS                    an answer without reasoning
    BOS system USER question ASSISTANT <think> reasoning </think> answer EOS  one in thinking mode

with nothing in between, no line breaks either. In thinking mode only the answer to the last question has its
reasoning; the turns before it are encoded as without. V4's later revision 4.1, which puts a token before the system's
text, is not what is made here.

Trained is what the model generates itself: reasoning and the `</think>` that ends it, answer, EOS, of every turn. The
opening `<think>`, or the `</think>` of an answer without reasoning, belongs to the prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fathom.train.json_records import DataError, RecordReader, json_kind, json_object
from fathom.train.tokenizers import BYTES, ByteTokenizer, FileTokenizer

CHAT = "chat"
"""The name of the source in recipes."""

THINKING_MODES = ("chat", "thinking", "mixed")
"""Answers without reasoning; the last answer of every conversation with it; with it where a conversation has it."""

ENCODING = "deepseek-v4 1"
"""What is made of a conversation, for the fingerprint of the data: another number when that changes."""

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
CONTROLS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

ROLES = ("system", "user", "assistant")
REFUSED_BESIDE = ("tools", "functions", "response_format")
"""Keys beside the messages that would change the encoding in ways that are not supported; other keys are ignored."""


class Message(NamedTuple):
    """One message: `reasoning` is None where none is encoded."""

    role: str
    content: str
    reasoning: str | None = None


class Piece(NamedTuple):
    """A stretch of an encoded conversation: a control token or plain text, and whether its tokens are trained."""

    text: str
    control: bool
    trained: bool


# --- Records --------------------------------------------------------------------------------------


def record_reader(thinking_mode: str) -> RecordReader:
    """What `sources.JsonLines` calls for each line: (record, field, where) -> the conversation as JSON.

    The result has nothing but what is encoded, so that it is equal for conversations that are; `conversation_of`
    reads it.
    """

    def read(record: bytes, field: str, where: str) -> bytes:
        messages = parse_record(record, field, where, thinking_mode)
        return json.dumps(messages, ensure_ascii=False, separators=(",", ":")).encode("utf-8")

    return read


def conversation_of(document: bytes) -> list[Message]:
    """The messages of what a `record_reader` gave."""
    return [Message(*message) for message in json.loads(document)]


def parse_record(record: bytes, field: str, where: str, thinking_mode: str) -> list[Message]:
    """A line of JSON as a conversation: perhaps a system message, then questions and answers in turn.

    Args:
      record: an object whose `field` is a list of {"role": ..., "content": ...}; an assistant's may have a text under
        "reasoning_content" too. Keys that are null, and empty reasoning, count as absent.
      thinking_mode: one of THINKING_MODES.

    Returns:
      The messages, without an empty system message and without the reasoning that the mode leaves out.

    Raises:
      DataError: beginning with `where`, for whatever is not such a conversation, or has nothing to train on.
    """
    value = json_object(record, field, where)
    for key in REFUSED_BESIDE:
        if value.get(key):
            raise DataError(f"{where} has {key!r}, which the chat source does not encode; leave such records out")
    messages = value[field]
    if not isinstance(messages, list):
        found = json_kind(messages)
        raise DataError(f"{where}: field {field!r} is a {found}, expected a list of messages; set data.field")
    parsed = [_message(message, f"{where}: {field}.{i}") for i, message in enumerate(messages)]
    _check_turns(parsed, where, field)
    last = parsed[-1]
    if thinking_mode == "thinking" and last.reasoning is None:
        raise DataError(
            f"{where}: the last answer has no 'reasoning_content', which data.thinking_mode=thinking trains; add it, "
            "or set data.thinking_mode=mixed, which takes conversations without too"
        )
    if thinking_mode == "chat":
        last = last._replace(reasoning=None)
    earlier = [message._replace(reasoning=None) for message in parsed[:-1]]
    return [message for message in (*earlier, last) if message.content or message.role != "system"]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise DataError(f"{where} is a {json_kind(message)}, expected an object with 'role' and 'content'")
    message = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in message:
            keys = ", ".join(map(repr, message)) or "none"
            raise DataError(f"{where} has no {key!r}; its keys are {keys}; add it")
    role = message["role"]
    if role not in ROLES:
        raise DataError(
            f"{where}: role is {role!r}, expected one of {', '.join(ROLES)}; leave records with other roles "
            "(tool, developer, ...) out, they are not supported"
        )
    allowed = ("role", "content", *(("reasoning_content",) if role == "assistant" else ()))
    for key in message:
        if key not in allowed:
            raise DataError(
                f"{where} has {key!r}, which the chat source does not encode; a message of role {role} has "
                f"{', '.join(allowed)}; remove it, or leave the record out"
            )
    texts = [_text(message[key], f"{where}: {key}") for key in allowed[1:] if key in message]
    for text in texts:
        if role == "assistant" and (THINK in text or END_THINK in text):
            found = THINK if THINK in text else END_THINK
            raise DataError(f"{where} has {found} in its text; put the reasoning into 'reasoning_content'")
    if not texts[0].strip() and role != "system":
        raise DataError(f"{where}: the {role}'s content is empty; fill it, or leave the record out")
    return Message(role, texts[0], texts[1] if texts[1:] and texts[1].strip() else None)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} is a {json_kind(value)}, expected text; contents of several parts are not supported")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where} is not Unicode text: {error.reason}") from None
    return value


def _check_turns(messages: Sequence[Message], where: str, field: str) -> None:
    """Perhaps a system message, then user and assistant in turn, an assistant at the end."""
    if not any(message.role == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the assistant: nothing to train on; leave the record out")
    begin = int(messages[0].role == "system")
    for i, message in enumerate(messages[begin:], begin):
        if message.role == "system":
            raise DataError(f"{where}: {field}.{i} is a system message, expected at most one, as the first message")
        expected = ("user", "assistant")[(i - begin) % 2]
        if message.role != expected:
            raise DataError(
                f"{where}: {field}.{i} is of role {message.role}, expected {expected}: questions and answers in turn; "
                "join messages that follow each other, or leave the record out"
            )
    if messages[-1].role != "assistant":
        raise DataError(f"{where} ends with a question, expected an answer as the last message; remove the question")


# --- Encoding -------------------------------------------------------------------------------------


def render(messages: Sequence[Message]) -> list[Piece]:
    """The pieces of a conversation as `parse_record` gives it; their texts joined are the release's encoding."""
    pieces = [Piece(BOS, True, False)]
    for message in messages:
        if message.role == "system":
            pieces.append(Piece(message.content, False, False))
        elif message.role == "user":
            pieces += [Piece(USER, True, False), Piece(message.content, False, False), Piece(ASSISTANT, True, False)]
        elif message.reasoning is None:
            pieces += [Piece(END_THINK, True, False), Piece(message.content, False, True), Piece(EOS, True, True)]
        else:
            pieces += [Piece(THINK, True, False), Piece(message.reasoning, False, True), Piece(END_THINK, True, True)]
            pieces += [Piece(message.content, False, True), Piece(EOS, True, True)]
    return pieces


class ChatTokenizer:
    """A tokenizer with an id for each control token; text never becomes one of them, whatever is written in it.

    With "bytes", BOS and EOS have the ids they have there (256, 257) and the other four the next ones, so that the
    model's vocab_size must be 262 or more. A `tokenizer.json` must have all six as tokens.

    Attributes: as `fathom.train.tokenizers.Tokenizer`.

    Raises:
      ValueError: when the file is no tokenizer, or lacks control tokens.
    """

    def __init__(self, name: str):
        self.name = name
        if name == BYTES:
            self._base: Any = ByteTokenizer()
            ids = (self._base.bos_id, self._base.eos_id, 258, 259, 260, 261)
            self._ids = dict(zip(CONTROLS, ids, strict=True))
            text = f"{self._base.hash} {self._ids}"
            self.hash = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        else:
            self._base = FileTokenizer(name, literal=True)
            found = {token: self._base.token_id(token) for token in CONTROLS}
            missing = [token for token, id_ in found.items() if id_ is None]
            if missing:
                raise ValueError(
                    f"tokenizer {name} has no token {', '.join(missing)}, which data.source=chat needs; give the "
                    "tokenizer.json of the model's own release"
                )
            self._ids = found
            self.hash = self._base.hash
        self.needs_text = self._base.needs_text
        self.vocab_size = max(self._base.vocab_size, *(id_ + 1 for id_ in self._ids.values()))
        self.eos_id = self._ids[EOS]
        self._control_ids = np.array(list(self._ids.values()), np.int32)

    def encode(self, document: bytes | str) -> np.ndarray:
        """Ids [n] int32 of plain text, no control token among them."""
        ids = self._base.encode(document)
        found = self._control_ids[np.isin(self._control_ids, ids)]
        if found.size:  # a vocabulary whose ordinary tokens these are too
            names = [token for token, id_ in self._ids.items() if id_ in found]
            raise DataError(f"text that the tokenizer {self.name} reads as {', '.join(names)}; leave the record out")
        return ids

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n] int32, trained [n] int32: 1 where the token is one that is trained)."""
        ids = [
            np.array([self._ids[piece.text]], np.int32) if piece.control else self.encode(piece.text)
            for piece in pieces
        ]
        trained = [np.full(len(part), piece.trained, np.int32) for part, piece in zip(ids, pieces, strict=True)]
        return np.concatenate(ids), np.concatenate(trained)

    def decode(self, ids: Any) -> str:
        """Text of ids, special tokens left out."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        return self._base.decode(ids[~np.isin(ids, self._control_ids)])


# --- Batches --------------------------------------------------------------------------------------


def loss_mask(batch: Mapping[str, np.ndarray], trained: np.ndarray) -> np.ndarray:
    """[B, S] int32: 1 where the next token is trained and of the same segment, which is `layers.losses`' convention.

    Args:
      batch: has "segment_ids" [B, S]. trained: [B, S], 1 where the token itself is trained.
    """
    segments = batch["segment_ids"]
    mask = np.zeros(segments.shape, np.int32)
    mask[:, :-1] = (trained[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
    return mask

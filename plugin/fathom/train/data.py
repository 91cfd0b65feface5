"""Text to packed rows: a deterministic stream of batches per shard, which resumes exactly at any step.

documents -> holdout split -> shuffle, anew each epoch -> one shard's documents -> tokens + EOS -> rows
of sequence_length -> batches. Of conversations (`fathom.train.chat`) a batch also says which tokens are
trained. Everything is a function of the settings and a position, so that the state in a checkpoint is a
few numbers. Which process reads which shards is said in `fathom.train.streams`.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from fathom.train import row_pipeline
from fathom.train.chat import CHAT, ENCODING, THINKING_MODES, ChatTokenizer, loss_mask, record_reader
from fathom.train.json_records import DataError
from fathom.train.row_pipeline import (
    ChatSource,
    Counted,
    TokenSource,
    document_dataset,
    row_dataset,
    shuffles_wrongly,
    with_tuples,
)
from fathom.train.sources import SOURCES, Documents, FileEntry, open_documents
from fathom.train.tokenizers import BYTES, Tokenizer, load_tokenizer

__all__ = ["DataError", "Loader", "batch_hash", "load_tokenizer", "make_loader"]

Batch = dict[str, np.ndarray]

STATE_VERSION = 3
SPLITS = ("train", "holdout")
PACKINGS = ("concat_split", "first_fit", "best_fit", "none")

ORDER = ("pattern", "exclude", "field", "shuffle", "seed", "holdout", "max_bytes", "thinking_mode", "chat_encoding")
"""The settings on which the order of the documents depends, whatever rows are made of them."""

LISTED_FILES = 1000
"""Fingerprints of more files than this hold their common hash only: they are part of every checkpoint."""


class DataSettings(Protocol):
    """What is read of `fathom.recipe_blocks.DataBlock`, which documents these fields."""

    source: str
    path: str
    pattern: str
    exclude: tuple[str, ...]
    field: str
    thinking_mode: str | None
    tokenizer: str
    sequence_length: int
    batch_size: int
    packing: str
    shuffle: bool
    shuffle_rows: int
    seed: int
    holdout: float
    max_bytes: int | None


def make_loader(
    block: DataSettings, *, vocab_size: int, shard_index: int = 0, shard_count: int = 1, split: str = "train"
) -> Loader:
    """Opens the data of a recipe.

    Args:
      block: the recipe's data block. vocab_size: of the model.
      shard_index, shard_count: which of how many equal parts of each batch's rows; each has its own documents.
      split: "train", or "holdout": the documents that `block.holdout` keeps out of the former.

    Returns:
      An endless iterator over the shard's rows: all documents once, then again in another order.

    Raises:
      DataError: (a ValueError) for impossible settings, data that is missing, empty or broken, a
        tokenizer with ids that the model does not have, fewer documents than shards.
    """
    _check_settings(block, shard_index, shard_count, split)
    chat = block.source == CHAT
    tokenizer = ChatTokenizer(block.tokenizer) if chat else load_tokenizer(block.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {block.tokenizer} has ids up to {tokenizer.vocab_size - 1}, the model's "
            f"vocab_size is {vocab_size}; set it to {tokenizer.vocab_size} or more"
        )
    documents = open_documents(
        block.source,
        block.path,
        pattern=block.pattern,
        exclude=block.exclude,
        field=block.field,
        max_bytes=block.max_bytes,
        needs_text=tokenizer.needs_text,
        read_chat=record_reader(block.thinking_mode) if chat else None,
    )
    indices = _select(documents, block, split, shard_count)
    return Loader(block, documents, indices, tokenizer, vocab_size, shard_index, shard_count, split)


class Loader:
    """The batches of one shard; made by `make_loader`.

    Iterating yields dicts of "tokens", "segment_ids" and "positions", each [B, S] int32 with
    B = batch_size / shard_count. Segments are documents, or the pieces of one that was split between
    rows: counted from 1 in each row, positions from 0 in each segment, 0 and 0 at padding (token 0).
    Of conversations also "loss_mask", [B, S] int32: 1 where the next token is one that is trained.

    Attributes:
      tokenizer: see `fathom.train.tokenizers.Tokenizer`.
      fingerprint: what decides the stream, JSON-able: files with sizes and hashes, tokenizer, settings;
        equal on all processes and for both splits.
      step: batches given out. num_documents: of this split, in all shards.
      documents: of the shard's, repeated without end, how many have been read or passed over.
    """

    def __init__(
        self,
        block: DataSettings,
        documents: Documents,
        indices: Sequence[int],
        tokenizer: Tokenizer,
        vocab_size: int,
        shard_index: int,
        shard_count: int,
        split: str,
    ):
        self.tokenizer = tokenizer
        self.fingerprint = _fingerprint(block, documents, tokenizer)
        self.step = self.documents = 0
        self.num_documents = len(indices)
        self._vocab_size = vocab_size
        self._marked = block.source == CHAT
        self._opened = (block, documents, tokenizer, vocab_size, split)
        self._local_rows = block.batch_size // shard_count
        self._identity = {
            "version": STATE_VERSION,
            "split": split,
            "shard_count": shard_count,
            "shard_index": shard_index,
        }
        self._earlier: list[dict[str, Any]] = []  # what stages before have read of other documents, see _reading
        self._source = (ChatSource if self._marked else TokenSource)(documents, indices, tokenizer)
        self.begin(0)

    def begin(self, start: int) -> None:
        """Goes to the beginning of a stream that passes over the shard's first `start` documents."""
        block, _, tokenizer, _, _ = self._opened
        shard = (self._identity["shard_index"], self._identity["shard_count"])
        # Reading ahead costs more than it brings where a document is one file and tokens are its bytes.
        ahead = tokenizer.needs_text or block.source == "array_record"
        self._read = Counted(document_dataset(self._source, block, *shard, start, ahead))
        self._rows = iter(row_dataset(self._read, block))
        self._start, self.step, self.documents = start, 0, start

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          DataError: for a document that cannot be read or decoded, or an id outside the vocabulary.
        """
        rows = [next(self._rows) for _ in range(self._local_rows)]
        batch = {
            name: np.stack([row[key] for row in rows]).astype(np.int32, copy=False)
            for name, key in (
                ("tokens", "tokens"),
                ("segment_ids", "tokens_segment_ids"),
                ("positions", "tokens_positions"),
            )
        }
        if self._marked:
            batch["tokens"], trained = batch["tokens"] >> 1, batch["tokens"] & 1
            batch["loss_mask"] = loss_mask(batch, trained)
        _check_ids(batch["tokens"], self._vocab_size, self.step + 1)
        self.step += 1
        self.documents = self._start + self._read.count
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as plain JSON values that share nothing with the loader."""
        return json.loads(
            json.dumps(
                {
                    **self._identity,
                    "step": self.step,
                    "start": self._start,
                    "documents": self.documents,
                    "earlier": self._earlier,
                    "settings": self.fingerprint["settings"],
                    "data": _data_digest(self.fingerprint),
                    "iterator": self._rows.get_state(),
                }
            )
        )

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where `get_state` was taken; the stream continues as if uninterrupted.

        Raises:
          DataError: naming both values, when the state is from other data, other settings, another
            split, shard or number of shards, or is not a state at all.
        """
        own = self.get_state()
        _check_version(state)
        if not isinstance(state, Mapping) or own.keys() - state.keys():
            missing = sorted(own.keys() - state.keys()) if isinstance(state, Mapping) else "everything"
            raise DataError(f"not the state of a loader: it lacks {missing}")
        problems = [
            f"{key}: {state[key]!r} in the state, {own[key]!r} here"
            for key in (*self._identity, "data")
            if state[key] != own[key]
        ]
        theirs, ours = state["settings"], own["settings"]
        if not isinstance(theirs, Mapping):
            raise DataError(f"the state of the loader is damaged: its settings are {theirs!r}")
        problems += [
            f"data.{key}: {theirs.get(key)!r} in the state, {ours.get(key)!r} here"
            for key in sorted(theirs.keys() | ours.keys())
            if theirs.get(key) != ours.get(key)
        ]
        if problems:
            raise DataError(
                "the state belongs to another stream of data:\n  "
                + "\n  ".join(problems)
                + "\nput those values back, or begin a new run"
            )
        try:
            step, start, documents = (operator.index(state[key]) for key in ("step", "start", "documents"))
            if start != self._start:
                self.begin(start)
            self._rows.set_state(with_tuples(json.loads(json.dumps(state["iterator"]))))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(f"the state of the loader is damaged: {error!r}") from None
        self.step, self.documents, self._earlier = step, documents, json.loads(json.dumps(state["earlier"]))

    def follow(self, states: Mapping[int, Mapping[str, Any]]) -> bool:
        """Begins behind the documents that stages before have read, given all shards' states at the end of the last.

        Where that made the same rows in as many shards, their streams go on. Else the stream begins behind the
        documents: of its own shard where there were as many, behind those of the furthest shard where there were not,
        so that none is read twice. What lay in windows, in rows half full and ahead of them is passed over.

        Returns:
          False, at the very beginning, when no stage before had these documents in this order.

        Raises:
          DataError: for states of another version, or damaged ones.
        """
        self.begin(0)
        own, shard = self.get_state(), self._identity["shard_index"]
        for state in states.values():
            _check_version(state)
        try:
            readings = [_reading([states[k] for k in sorted(states)]), *states[shard % len(states)]["earlier"]]
            mine = _reading([own])["order"]
            known = [reading["documents"] for reading in readings if reading["order"] == mine]
            self._earlier = [reading for reading in readings if reading["order"] != mine]
            if not known:
                return False
            if len(states) == self._identity["shard_count"] and _same_rows(states[shard], own):
                self.set_state({**states[shard], "settings": own["settings"], "earlier": self._earlier})
                self.step = 0
            else:
                self.begin(self._behind(known[0]))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the data states of the stage before are damaged: {error!r}") from None
        return True

    def _behind(self, documents: Sequence[int]) -> int:
        """Where this shard is behind the documents that shards, others in number maybe, have read of theirs."""
        shard, shards, count = self._identity["shard_index"], self._identity["shard_count"], len(documents)
        if count == shards:
            return documents[shard]
        epoch, read = max(divmod(read, self._shard_size(k, count)) for k, read in enumerate(documents))
        size = self._shard_size(shard, shards)
        return epoch * size + min(-(-read * count // shards), size)

    def _shard_size(self, index: int, count: int) -> int:
        """Documents of a shard."""
        return len(range(index, self.num_documents, count))

    def shard(self, index: int, count: int) -> Loader:
        """The loader, at its beginning, of another shard of the same split: its documents are open already.

        Raises:
          DataError: when `count` shards do not divide the rows of a batch, or are more than the documents.
        """
        block, documents, tokenizer, vocab_size, split = self._opened
        _check_settings(block, index, count, split)
        indices = _select(documents, block, split, count)
        return Loader(block, documents, indices, tokenizer, vocab_size, index, count, split)


def _check_version(state: Any) -> None:
    if isinstance(state, Mapping) and state.get("version", STATE_VERSION) != STATE_VERSION:
        raise DataError(
            f"version: {state['version']!r} in the state of the data, {STATE_VERSION} here; go on with the version of "
            "Fathom that saved it, or begin a new run"
        )


def _reading(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far the shards of a stage have read: {"order": of which documents in which order, "documents": by shard}."""
    first = states[0]
    order = {"split": first["split"], "data": first["data"], **{key: first["settings"].get(key) for key in ORDER}}
    return {"order": order, "documents": [operator.index(state["documents"]) for state in states]}


def _same_rows(state: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the newest stage's rows are those of a stream, however many of them are a batch."""
    alike = state["data"] == own["data"] and state["split"] == own["split"]
    return alike and state["settings"] | {"batch_size": 0} == own["settings"] | {"batch_size": 0}


def batch_hash(batch: Mapping[str, np.ndarray]) -> str:
    """Hex digest of names, dtypes, shapes and values; equal for equal batches on any machine."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch):
        array = np.asarray(batch[name])
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


# --- Checks ---------------------------------------------------------------------------------------


def _check_settings(block: DataSettings, shard_index: int, shard_count: int, split: str) -> None:
    """All problems of the settings at once."""
    wanted = [
        ("data.source", block.source, block.source in SOURCES, f"one of {', '.join(SOURCES)}"),
        ("data.packing", block.packing, block.packing in PACKINGS, f"one of {', '.join(PACKINGS)}"),
        ("data.sequence_length", block.sequence_length, block.sequence_length >= 2, "2 or more"),
        ("data.seed", block.seed, block.seed >= 0, "0 or more"),
        ("data.holdout", block.holdout, 0 <= block.holdout < 1, "at least 0 and below 1"),
        ("data.max_bytes", block.max_bytes, block.max_bytes is None or block.max_bytes >= 1, "1 or more"),
        (
            "data.shuffle_rows",
            block.shuffle_rows,
            not shuffles_wrongly(block.shuffle_rows),
            "one more or fewer, for grain shuffles as many so that one row comes twice and one never",
        ),
        (
            "data.batch_size",
            block.batch_size,
            block.batch_size >= 1 and block.batch_size % shard_count == 0,
            f"a multiple of the {shard_count} shards",
        ),
        ("shard_index", shard_index, 0 <= shard_index < shard_count, f"below {shard_count}"),
        ("split", split, split in SPLITS, f"one of {', '.join(SPLITS)}"),
    ]
    if block.source == CHAT:
        mode, modes = block.thinking_mode, ", ".join(THINKING_MODES)
        wanted.append(("data.thinking_mode", mode, mode in THINKING_MODES, f"one of {modes}"))
    problems = [f"{key} is {found!r}, expected {text}" for key, found, ok, text in wanted if not ok]
    if split == "holdout" and block.holdout == 0:
        problems.append("data.holdout is 0: no documents are held out; set it, 0.01 for one in a hundred")
    if problems:
        raise DataError("; ".join(problems))


def _check_ids(tokens: np.ndarray, vocab_size: int, step: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        row, column = (int(i) for i in np.argwhere(tokens == bad)[0])
        raise DataError(
            f"batch {step} has token id {bad} at row {row}, column {column}, expected 0..{vocab_size - 1}; "
            "the tokenizer does not fit the model's vocab_size"
        )


def _select(documents: Documents, block: DataSettings, split: str, shard_count: int) -> Sequence[int]:
    """Indices of the documents of a split."""
    splits = documents.split(block.holdout)._asdict()
    counts = {name: len(indices) for name, indices in splits.items()}
    needed = SPLITS if block.holdout else ("train",)  # a run that will evaluate must not find out late
    for name in needed:
        if counts[name] < shard_count:
            raise DataError(
                f"data.path {block.path} has {len(documents)} documents, {counts[name]} of them in the "
                f"{name} split at data.holdout={block.holdout}, expected at least one for each of "
                f"{shard_count} shards; add documents, or change data.holdout or data.shards"
            )
    return splits[split]


# --- Identity -------------------------------------------------------------------------------------


def _fingerprint(block: DataSettings, documents: Documents, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the stream. Folders are not part of it: data may be moved."""
    settings = {
        "pattern": block.pattern,
        "exclude": list(block.exclude),
        "field": block.field,
        "tokenizer": BYTES if block.tokenizer == BYTES else "file",
        "sequence_length": block.sequence_length,
        "batch_size": block.batch_size,
        "packing": block.packing,
        "packing_bins": row_pipeline.PACKING_BINS,
        "shuffle": block.shuffle,
        "shuffle_rows": block.shuffle_rows,
        "seed": block.seed,
        "holdout": block.holdout,
        "max_bytes": block.max_bytes,
    }
    if block.source == CHAT:
        settings |= {"thinking_mode": block.thinking_mode, "chat_encoding": ENCODING}

    def describe(file: FileEntry) -> dict[str, Any]:
        return {"bytes": file.size, "blake2b": file.digest, "hashed": file.hashed}

    files = {file.name: describe(file) for file in documents.files}
    return {
        "source": block.source,
        "num_files": len(files),
        "num_documents": len(documents),
        "num_bytes": documents.num_bytes,
        "files": files if len(files) <= LISTED_FILES else f"more than {LISTED_FILES}, see files_hash",
        "files_hash": _digest(files),
        "tokenizer": {"hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id},
        "settings": settings,
    }


def _data_digest(fingerprint: Mapping[str, Any]) -> str:
    """Of everything but the settings, which a state holds in full."""
    return _digest({key: value for key, value in fingerprint.items() if key not in ("files", "settings")})


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()

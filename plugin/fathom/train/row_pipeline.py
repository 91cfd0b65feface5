"""Documents to packed rows, by grain: a shard's documents -> tokens + EOS -> rows of sequence_length -> shuffled rows.

Each piece's state is a few numbers, and the whole goes to any of its states exactly. `fathom.train.data` makes batches
of the rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from fathom.train.chat import conversation_of, render
from fathom.train.json_records import DataError
from fathom.train.sources import Documents
from fathom.train.tokenizers import Tokenizer

if TYPE_CHECKING:
    from fathom.train.data import DataSettings

PACKING_BINS = 64
"""Rows that first_fit and best_fit fill side by side. More pad less, and cost more to rebuild at a resume."""

READ_THREADS = 16
READ_AHEAD = 64
"""Documents read and tokenized ahead, where that takes time: real tokenizers, and ArrayRecord. No more threads than
cores. Making an array of a document's ids holds the interpreter's lock, a 30th of the time of tokenizing: about as many
threads can be of use. Measured on two cores only."""


class TokenSource:
    """Random access to the token ids of the documents of a split, each with EOS at its end."""

    def __init__(self, documents: Documents, indices: Sequence[int], tokenizer: Tokenizer):
        self._documents, self._indices, self._tokenizer = documents, indices, tokenizer

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = int(self._indices[index])
        text = self._documents.read(document)
        try:
            ids = self._tokenizer.encode(text)
        except UnicodeDecodeError as error:  # files too large to be read at the start, Parquet that lies
            raise DataError(f"{self._documents.name(document)} is not UTF-8: {error}; convert it") from None
        tokens = np.empty(len(ids) + 1, np.int32)
        tokens[:-1] = ids
        tokens[-1] = self._tokenizer.eos_id
        return {"tokens": tokens}


class ChatSource(TokenSource):
    """As `TokenSource`, of conversations; the lowest bit of 2 * id + 1 says that a token is trained.

    As one array it is shuffled, cut and laid into rows, and its state saved, just as other documents are: beside an
    array of their own grain's ConcatThenSplit fails on documents longer than a row.
    """

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = int(self._indices[index])
        pieces = render(conversation_of(self._documents.read(document)))
        try:
            tokens, trained = self._tokenizer.encode_pieces(pieces)
        except DataError as error:
            raise DataError(f"{self._documents.name(document)}: {error}") from None
        return {"tokens": 2 * tokens + trained}


class _Split(grain.experimental.FlatMapTransform):
    """Cuts a document into pieces of at most `length` tokens."""

    max_fan_out = 2**31

    def __init__(self, length: int):
        self._length = length

    def flat_map(self, element: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        tokens = element["tokens"]
        return [{"tokens": tokens[i : i + self._length]} for i in range(0, len(tokens), self._length)]


class Counted(grain.IterDataset):
    """The elements of a dataset, counted.

    Attributes:
      count: elements that the newest iterator has given out, those before a state that it was set to included.
    """

    def __init__(self, parent: grain.IterDataset):
        super().__init__(parent)
        self._newest: _CountedIterator | None = None

    @property
    def count(self) -> int:
        return self._newest.count if self._newest else 0

    def __iter__(self) -> _CountedIterator:
        self._newest = _CountedIterator(iter(self._parent))
        return self._newest


class _CountedIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator):
        super().__init__(parent)
        self.count = 0

    def __next__(self) -> dict[str, np.ndarray]:
        element = next(self._parent)
        self.count += 1
        return element

    def get_state(self) -> dict[str, Any]:
        return {"parent": self._parent.get_state(), "count": self.count}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self.count = state["count"]


def document_dataset(
    source: TokenSource, block: DataSettings, shard_index: int, shard_count: int, start: int, ahead: bool
) -> grain.IterDataset:
    """A shard's documents after the first `start`, without end: all of them, then all in another order."""
    dataset = grain.MapDataset.source(source)
    if block.shuffle:
        dataset = shuffled(dataset, _seed32(block.seed))
    dataset = dataset[shard_index::shard_count].repeat()[start:]
    threads = min(READ_THREADS, os.cpu_count() or 1) if ahead else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD if ahead else 0)
    return dataset.to_iter_dataset(options)


def shuffles_wrongly(length: int) -> bool:
    """Whether grain gives the first of so many elements twice, and the last never: 4**8 + 1, 4**9 + 1, ..."""
    return length > 4**8 and (length - 1).bit_count() == 1 and length.bit_length() % 2 == 1


def shuffled(dataset: grain.MapDataset, seed: int) -> grain.MapDataset:
    """All elements in another order each epoch, for up to 2**48 of them: grain's order, where that is right.

    grain enciphers an index with as many bits as the largest one needs, an even number and 16 or more. Two cases:
    * Where the largest is a power of four from 4**8 on, it takes too few: the first element would come twice and the
      last one never. Of such a length the last element stays at its place.
    * Four rounds do not mix more than 32 bits: of 1e12 elements a thousand neighbours would come from a few places.
      From 2**32 on the order is shuffled again.
    """
    length = len(dataset)
    if shuffles_wrongly(length):
        return grain.MapDataset.concatenate([shuffled(dataset[:-1], seed), dataset[-1:]])
    dataset = dataset.shuffle(seed=seed)
    return dataset if length < 2**32 else dataset.shuffle(seed=seed)


def row_dataset(documents: grain.IterDataset, block: DataSettings) -> grain.IterDataset:
    """Rows: dicts of tokens, tokens_segment_ids, tokens_positions, each [S] int32, without end."""
    seed = _seed32(block.seed)
    rows = _packed(documents, block, seed)
    if block.shuffle_rows:
        rows = grain.experimental.WindowShuffleIterDataset(rows, window_size=block.shuffle_rows, seed=seed)
    return rows


def _packed(rows: grain.IterDataset, block: DataSettings, seed: int) -> grain.IterDataset:
    """Documents laid into rows as data.packing says."""
    length = block.sequence_length
    if block.packing == "none":
        return rows.map(lambda element: _one_row(element["tokens"], length))
    lengths = {"tokens": length}
    if block.packing == "concat_split":
        return grain.experimental.ConcatThenSplitIterDataset(rows, length_struct=lengths)
    packers = {
        "first_fit": grain.experimental.FirstFitPackIterDataset,
        "best_fit": grain.experimental.BestFitPackIterDataset,
    }
    return packers[block.packing](
        grain.experimental.FlatMapIterDataset(rows, _Split(length)),
        length_struct=lengths,
        num_packing_bins=PACKING_BINS,
        seed=seed,
        shuffle_bins=block.shuffle,
    )


def _one_row(tokens: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """A document cut or padded to a row."""
    count = min(len(tokens), length)
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "tokens_segment_ids", "tokens_positions")}
    row["tokens"][:count] = tokens[:count]
    row["tokens_segment_ids"][:count] = 1
    row["tokens_positions"][:count] = np.arange(count)
    return row


def _seed32(seed: int) -> int:
    """grain takes 32 bits and counts epochs on the seed: hashed, so that seed 1 is not seed 0 an epoch late."""
    return int.from_bytes(hashlib.blake2b(f"data {seed}".encode(), digest_size=4).digest(), "little")


def with_tuples(state: Any) -> Any:
    """Makes tuples of the pairs under "remainder_slices" again, which JSON turned into lists.

    grain's ConcatThenSplit compares them with the tuple (-1, -1), "nothing left over": a list is never
    equal to it, and the stream would silently resume at the wrong document.
    """
    if not isinstance(state, dict):
        return state
    return {
        key: {name: tuple(pair) for name, pair in value.items()} if key == "remainder_slices" else with_tuples(value)
        for key, value in state.items()
    }

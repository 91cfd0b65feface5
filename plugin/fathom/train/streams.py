"""The rows of each batch that this process's devices hold, out of document streams that know of no process.

A batch of B rows comes from a number of streams, n: stream k gives rows k B/n to (k+1) B/n, out of documents of its own
(a shard of `fathom.train.data`). A process opens the streams that reach its rows, and leaves out the rows of others. So
the order of the data depends on n alone, and a run goes on exactly with another number of processes or on another mesh:
n is `data.shards`, else the number of row parts that the processes held at the first start, which checkpoints keep.

What it costs: with fewer streams than row parts, several processes read the same stream, each using a part of it; with
more, a process keeps several at once, each with its own `data.shuffle_rows` and packing bins.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from fathom.recipe_checks import Problem, RecipeError
from fathom.train.data import Batch, DataError, Loader, batch_hash, make_loader

logger = logging.getLogger(__name__)

Rows = tuple[tuple[int, int], ...]
"""Stretches [start, stop) of a batch's rows, rising."""


class RowStreams:
    """Endless batches of one process's rows: dicts as a `Loader` gives, [number of its rows, S] each.

    Args:
      block: the recipe's data block. vocab_size: of the model. split: "train" or "holdout".
      rows: process -> the rows that its devices hold; some processes may hold the same.
      process: this one. count: of streams at a first start, where `block.shards` does not say.

    Attributes:
      count: of streams, in the whole run.
      batch_hash: of the newest batch's rows in the first stream that this process reads, "" before there is one. It is
        the same for any number of processes; where the stream is all that the process reads, it is that of its rows.

    Raises:
      DataError: see `make_loader`.
    """

    def __init__(
        self,
        block: Any,
        *,
        vocab_size: int,
        rows: Mapping[int, Rows],
        process: int = 0,
        count: int = 1,
        split: str = "train",
    ):
        self._block, self._rows, self._process = block, rows, process
        self.batch_hash, self.count = "", block.shards or count
        # Streams are opened when they are used: a checkpoint may say that there are others.
        self._documents = make_loader(block, vocab_size=vocab_size, split=split)
        self._loaders: dict[int, Loader] = {}

    def use(self, count: int | None = None) -> None:
        """Cuts the data into `count` streams and begins them; nothing where they are open already.

        Raises:
          DataError: when they do not divide the rows of a batch, or are more than the documents.
        """
        count = count or self.count
        if self._loaders and count == self.count:
            return
        length = self._block.batch_size // count
        own = _reached(self._rows[self._process], length)
        self._loaders = {k: self._documents.shard(k, count) for k in own}
        self.count, self._length = count, length
        used = sum(stop - start for start, stop in self._rows[self._process])
        read = len(self._loaders) * self._length
        if used < read:
            logger.info(
                "data: this process reads %d rows a step (%d of %d streams) and uses %d; a new run with more streams "
                "(data.shards) would spare that", read, len(self._loaders), count, used,
            )  # fmt: skip

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the data, see `Loader`."""
        return self._documents.fingerprint

    @property
    def step(self) -> int:
        """Batches given out."""
        return next(iter(self._loaders.values()), self._documents).step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch's rows of this process, rising; DataError as `Loader` raises it."""
        self.use()
        batches = {k: next(loader) for k, loader in self._loaders.items()}
        first = next(iter(batches.values()))
        self.batch_hash = batch_hash(first)
        n, pieces = self._length, []
        for start, stop in self._rows[self._process]:
            for k in range(start // n, -(-stop // n)):
                pieces.append((k, slice(max(start - k * n, 0), min(stop - k * n, n))))
        return {name: np.concatenate([batches[k][name][part] for k, part in pieces]) for name in first}

    def follow(self, states: Sequence[Any]) -> None:
        """Begins behind the documents that stages before have read of the same ones in the same order.

        There are as many streams as a checkpoint of that stage has, where the recipe does not say and they divide the
        rows of this one: then the data does not depend on how many processes there are.

        Raises:
          DataError: when the states are not those of streams.
        """
        saved, count = _complete(states)
        kept = self._block.shards is None and self._block.batch_size % count == 0
        self.use(count if kept else None)
        followed = [loader.follow(saved) for loader in self._loaders.values()]
        if not all(followed):
            logger.info("data: no stage before had these documents in this order: from the first on")

    def restart(self) -> None:
        """Goes to the beginning of the streams there are."""
        self._loaders = {}

    def get_state(self) -> list[dict[str, Any]]:
        """The states of the streams that this process reads, for `set_state`."""
        self.use()
        return [loader.get_state() for loader in self._loaders.values()]

    def states_to_save(self) -> list[dict[str, Any]]:
        """The states that this process adds to a checkpoint: all processes together give each stream's once."""
        self.use()
        return [loader.get_state() for k, loader in self._loaders.items() if self._is_ours(k)]

    def _is_ours(self, stream: int) -> bool:
        readers = [process for process, rows in self._rows.items() if stream in _reached(rows, self._length)]
        return min(readers) == self._process

    def set_state(self, states: Sequence[Any]) -> None:
        """Goes to where `get_state` of this process was taken; DataError as `Loader.set_state` raises it."""
        self.use()
        for loader, state in zip(self._loaders.values(), states, strict=True):
            loader.set_state(state)

    def restore(self, states: Sequence[Any]) -> None:
        """Goes to where a checkpoint's states were taken, with as many streams as there were then.

        Args:
          states: one for each stream, in any order; older checkpoints may hold equal ones several times.

        Raises:
          DataError: naming the difference, when the states are of other data or settings, or of another number of
            streams than `data.shards`.
        """
        saved, count = self._saved(states)
        self.use(count)
        self.set_state([saved[k] for k in self._loaders])

    def check(self, states: Sequence[Any]) -> None:
        """DataError when a checkpoint's states are not those of streams like these; reads no data."""
        self._saved(states)

    def _saved(self, states: Sequence[Any]) -> tuple[dict[int, Any], int]:
        """`_complete`, of streams that these may go on as."""
        saved, count = _complete(states)
        if self._block.shards not in (None, count):
            raise DataError(
                f"data.shards: {count} streams in the checkpoint, {self._block.shards} in the recipe; set "
                f"data.shards={count}, or leave it out to keep what the checkpoint has"
            )
        if self._block.batch_size % count:
            raise DataError(
                f"data.batch_size: {self._block.batch_size} in the recipe, expected a multiple of the {count} streams "
                "in the checkpoint; put the value back that it had"
            )
        return saved, count


def row_parts(recipe: Any, sharding: jax.sharding.Sharding) -> dict[int, Rows]:
    """Process -> the rows of a batch that its devices hold.

    Mesh axes that do not cut rows (`tensor`, `context`) may span processes: these hold the same part. A part need
    not be contiguous: on a torus the devices of a host often are not neighbours in the mesh.

    Args:
      sharding: of the [B, S] arrays of a batch.

    Raises:
      RecipeError: when the parts of two processes overlap, or are not equally large.
    """
    shape = (recipe.data.batch_size, recipe.data.sequence_length)
    rows: dict[int, set[tuple[int, int]]] = {}
    for device, (block, _) in sharding.devices_indices_map(shape).items():
        rows.setdefault(device.process_index, set()).add(block.indices(shape[0])[:2])
    parts = {process: tuple(sorted(blocks)) for process, blocks in rows.items()}
    blocks = [block for part in set(parts.values()) for block in part]
    if len(set(blocks)) != len(blocks) or len({len(part) for part in parts.values()}) != 1:
        shown = ", ".join(f"process {p}: {_ranges(blocks)}" for p, blocks in sorted(parts.items())[:4])
        problem = Problem(
            "mesh",
            f"{dict(recipe.mesh.shape)}, whose devices hold these rows of a batch: {shown}",
            "that any two processes hold the same rows or none in common, and all as many",
            "change the mesh axes so that those that cut the batch split evenly over the processes",
        )
        raise RecipeError([problem], recipe.name)
    return parts


def _ranges(blocks: Rows) -> str:
    return " and ".join(f"{start} to {stop - 1}" for start, stop in blocks)


def rows_read(recipe: Any, sharding: jax.sharding.Sharding) -> int:
    """Of how many rows the process that reads most makes the tokens for a step, those that it does not use included."""
    parts = row_parts(recipe, sharding)
    length = recipe.data.batch_size // (recipe.data.shards or len(set(parts.values())))
    return max(len(_reached(rows, length)) for rows in parts.values()) * length


def _complete(states: Sequence[Any]) -> tuple[dict[int, Any], int]:
    """Stream -> state, and the number of streams, of what a checkpoint holds; DataError unless it holds each one's."""
    try:
        counts = {state["shard_count"] for state in states}
        saved = {state["shard_index"]: state for state in states}
        count = max(counts)
        complete = len(counts) == 1 and sorted(saved) == list(range(count))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"data order: the checkpoint's states are not those of streams: {error!r}") from None
    if not complete:
        raise DataError(
            f"data order: the checkpoint holds the states of streams {sorted(saved)} of {sorted(counts)}, expected "
            "one for each stream; resume from another step"
        )
    return saved, count


def _reached(rows: Rows, length: int) -> list[int]:
    """The streams of `length` rows a batch that give some of the rows, rising."""
    return sorted({k for start, stop in rows for k in range(start // length, -(-stop // length))})

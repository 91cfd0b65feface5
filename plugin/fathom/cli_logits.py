"""`fathom logits`: token ids in, logits out, as arrays in files."""

from __future__ import annotations

import argparse
import inspect
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fathom.cli_problem import ArgumentProblem


def read_token_ids(path: str | os.PathLike[str]) -> np.ndarray:
    """Integer ids [B, S] from a .npy file that holds [B, S] or [S].

    Raises:
      ArgumentProblem: naming the file, for anything else, ids below 0 included.
    """
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentProblem(f"--tokens {path}: not a readable .npy file ({error})") from error
    if not isinstance(ids, np.ndarray):
        raise ArgumentProblem(
            f"--tokens {path}: an archive of several arrays, expected one array; use numpy.save"
        )
    if ids.dtype.kind not in "iu":
        raise ArgumentProblem(f"--tokens {path}: dtype {ids.dtype}, expected integer token ids")
    if ids.ndim not in (1, 2) or ids.size == 0:
        raise ArgumentProblem(
            f"--tokens {path}: shape {ids.shape}, expected [S] or [B, S] with at least one token"
        )
    ids = ids[None] if ids.ndim == 1 else ids
    _refuse(ids, ids < 0, f"--tokens {path}", "0 or more")
    return ids


def check_vocabulary(ids: np.ndarray, vocab_size: int, where: str) -> np.ndarray:
    """The ids as int32, once all are inside the vocabulary.

    Raises:
      ArgumentProblem: with position and value of the first id outside, and the vocabulary's size.
    """
    expected = f"0 to {vocab_size - 1}, the model's vocabulary has {vocab_size} tokens"
    _refuse(ids, (ids < 0) | (ids >= vocab_size), where, expected)
    return ids.astype(np.int32)


def _refuse(ids: np.ndarray, wrong: np.ndarray, where: str, expected: str) -> None:
    positions = np.argwhere(wrong)
    if len(positions):
        row, column = map(int, positions[0])
        more = f" ({len(positions)} such ids)" if len(positions) > 1 else ""
        raise ArgumentProblem(
            f"{where}: row {row}, position {column} holds token id {int(ids[row, column])}{more}; "
            f"expected {expected}"
        )


def run_model(model: Any, ids: np.ndarray, streams: bool) -> dict[str, np.ndarray]:
    """The arrays that `fathom logits` writes, all float32.

    Args:
      model: a module whose call takes tokens and gives `.logits`, and where it has them
        `.mtp_logits` and, with `return_streams`, `.streams`.
      ids: int32 [B, S].

    Returns:
      "logits" [B, S, V]; "mtp_logits" [B, S, V] where the model has them; with `streams`
      "hidden_streams_<layer>" [B, S, n, D].
    """
    import jax
    from flax import nnx

    keywords = {"return_streams": True} if streams else {}
    if streams and "return_streams" not in inspect.signature(type(model).__call__).parameters:
        raise ArgumentProblem(f"--streams: {type(model).__name__} has no residual streams to show")
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state, tokens):
        out = nnx.merge(graphdef, state)(tokens, **keywords)
        return out.logits, getattr(out, "mtp_logits", None), getattr(out, "streams", ())

    # "highest" makes fp32 mean fp32 on accelerators too, whose default multiplies in fewer bits.
    with jax.default_matmul_precision("highest"):
        logits, mtp_logits, hidden = forward(state, ids)
    arrays = {"logits": logits}
    if mtp_logits is not None:
        arrays["mtp_logits"] = mtp_logits
    if streams:
        arrays |= {f"hidden_streams_{layer}": x for layer, x in enumerate(hidden)}
    return {name: np.asarray(x).astype(np.float32) for name, x in arrays.items()}


def write_npz(path: str | os.PathLike[str], arrays: dict[str, np.ndarray]) -> None:
    """Writes an .npz under a temporary name beside `path`, then renames: complete or not there."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_logits(arguments: argparse.Namespace) -> str:
    """The command; returns the line to print.

    Raises:
      ArgumentProblem: for token ids or an output path that cannot be used.
      ValueError: for a checkpoint that cannot be read.
    """
    ids = read_token_ids(arguments.tokens)
    out = Path(arguments.out)
    if not out.resolve().parent.is_dir() or out.is_dir():
        raise ArgumentProblem(
            f"--out {out}: expected a file name in a folder that exists; make {out.parent} first"
        )
    if not os.access(out.resolve().parent, os.W_OK):
        raise ArgumentProblem(f"--out {out}: the folder cannot be written")
    if not Path(arguments.path).exists():
        raise ArgumentProblem(f"{arguments.path}: no such file or folder")
    import fathom

    model = fathom.load(
        arguments.path, dtype=arguments.dtype, simulate_quant=arguments.simulate_quant or None
    )
    tokens = check_vocabulary(ids, model.config.vocab_size, f"--tokens {arguments.tokens}")
    arrays = run_model(model, tokens, arguments.streams)
    write_npz(out, arrays)
    listing = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
    return f"{out}: {listing}"

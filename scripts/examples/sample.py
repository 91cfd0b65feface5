"""Prints text sampled from a trained byte-level model.

    python scripts/examples/sample.py RUN_FOLDER --prompt "def " [--length 200] [--temperature 0.7] [--seed 0]
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fathom


def sample(model: nnx.Module, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
    """Continues `prompt` byte by byte; every step runs the whole row, so shapes compile once.

    Args:
      temperature: 0 takes the likeliest byte every time.
    """
    total = len(prompt) + length
    tokens = np.zeros((1, total), np.int32)
    tokens[0, : len(prompt)] = list(prompt)
    graphdef, state = nnx.split(model)

    @jax.jit
    def next_logits(state, tokens, index):
        # Causal: what lies beyond `index` does not change the logits there.
        return nnx.merge(graphdef, state)(tokens).logits[0, index, :256]

    rng = np.random.default_rng(seed)
    for index in range(len(prompt), total):
        logits = np.asarray(next_logits(state, jnp.asarray(tokens), index - 1), np.float64)
        tokens[0, index] = pick(logits, temperature, rng)
    return bytes(tokens[0].astype(np.uint8))


def pick(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> int:
    """An index drawn from softmax(logits / temperature), whose limit at 0 is the largest logit."""
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    return int(rng.choice(len(logits), p=weights / weights.sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="run folder or checkpoint folder")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature: found {args.temperature}, expected 0 or more")
    if args.length < 1 or not args.prompt:
        parser.error("--length must be at least 1, and --prompt at least one character")
    model = fathom.load(args.checkpoint)
    text = sample(model, args.prompt.encode(), args.length, args.temperature, args.seed)
    print(text.decode("utf-8", errors="replace"))


if __name__ == "__main__":
    main()

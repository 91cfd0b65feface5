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
    """Continues `prompt` byte by byte; every step runs the whole row, so shapes compile once."""
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
        weights = np.exp((logits - logits.max()) / temperature)
        tokens[0, index] = rng.choice(256, p=weights / weights.sum())
    return bytes(tokens[0].astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="run folder or checkpoint folder")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = fathom.load(args.checkpoint)
    text = sample(model, args.prompt.encode(), args.length, args.temperature, args.seed)
    print(text.decode("utf-8", errors="replace"))


if __name__ == "__main__":
    main()

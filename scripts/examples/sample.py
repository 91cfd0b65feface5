"""Prints text sampled from a trained byte-level model.

    python scripts/examples/sample.py RUN_FOLDER --prompt "def " [--length 200] [--temperature 0.7] [--seed 0]
    python scripts/examples/sample.py RUN_FOLDER --chat --prompt "What does a cat say?"     # of one fine-tuned on chats
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import fathom
from fathom.train.chat import ASSISTANT, BOS, END_THINK, USER, ChatTokenizer, Piece


def sample(
    model: nnx.Module,
    prompt: Sequence[int],
    length: int,
    temperature: float,
    seed: int,
    choices: int = 256,
    stop: int | None = None,
) -> list[int]:
    """Continues `prompt` token by token; every step runs the whole row, so shapes compile once.

    Args:
      temperature: 0 takes the likeliest token every time. choices: ids below this one are drawn, all bytes unless
        given. stop: the id after which nothing more is drawn.
    """
    total = len(prompt) + length
    tokens = np.zeros((1, total), np.int32)
    tokens[0, : len(prompt)] = list(prompt)
    graphdef, state = nnx.split(model)

    @jax.jit
    def next_logits(state, tokens, index):
        # Causal: what lies beyond `index` does not change the logits there.
        return nnx.merge(graphdef, state)(tokens).logits[0, index, :choices]

    rng = np.random.default_rng(seed)
    for index in range(len(prompt), total):
        logits = np.asarray(next_logits(state, jnp.asarray(tokens), index - 1), np.float64)
        tokens[0, index] = pick(logits, temperature, rng)
        if tokens[0, index] == stop:
            total = index + 1
            break
    return tokens[0, :total].tolist()


def question(tokenizer: ChatTokenizer, text: str) -> list[int]:
    """A conversation up to where the answer, without reasoning, begins."""
    texts = ((BOS, True), (USER, True), (text, False), (ASSISTANT, True), (END_THINK, True))
    return tokenizer.encode_pieces([Piece(text, control, False) for text, control in texts])[0].tolist()


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
    parser.add_argument("--chat", action="store_true", help="the prompt is a question; print the answer")
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 0 <= args.temperature < float("inf"):
        parser.error(f"--temperature: found {args.temperature}, expected 0 or more")
    if args.length < 1 or not args.prompt:
        parser.error("--length must be at least 1, and --prompt at least one character")
    model = fathom.load(args.checkpoint)
    if not args.chat:
        ids = sample(model, args.prompt.encode(), args.length, args.temperature, args.seed)
        print(bytes(ids).decode("utf-8", errors="replace"))
        return
    tokenizer = ChatTokenizer("bytes")
    asked = question(tokenizer, args.prompt)
    choices, stop = tokenizer.vocab_size, tokenizer.eos_id
    ids = sample(model, asked, args.length, args.temperature, args.seed, choices, stop)
    print(tokenizer.decode(ids[len(asked) :]))


if __name__ == "__main__":
    main()

"""Writes small conversations to fine-tune the tiny models on: made up here, the same for the same seed.

    python scripts/examples/make_chat_data.py [runs/chat.jsonl] [--count 2000] [--seed 0]

Each line is {"messages": [{"role": ..., "content": ...}, ...]}; some answers have "reasoning_content" too.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

ANIMALS = {
    "cat": ("meow", 4), "dog": ("woof", 4), "cow": ("moo", 4), "duck": ("quack", 2), "bee": ("buzz", 6),
    "owl": ("hoot", 2), "pig": ("oink", 4), "sheep": ("baa", 4),
}  # fmt: skip


def ask(rng: random.Random) -> list[dict[str, Any]]:
    """A question and its answer; those that add have the reasoning that leads to it."""
    name, other = rng.choice(list(ANIMALS)), rng.choice(list(ANIMALS))
    sound, legs = ANIMALS[name]
    kind = rng.randrange(3)
    if kind == 0:
        return message("user", f"What does a {name} say?") + message("assistant", f"A {name} says {sound}.")
    if kind == 1:
        return message("user", f"How many legs has a {name}?") + message("assistant", f"A {name} has {legs} legs.")
    more = ANIMALS[other][1]
    return message("user", f"How many legs have a {name} and a {other}?") + message(
        "assistant", f"Together {legs + more}.", f"A {name} has {legs}, a {other} {more}: {legs}+{more}={legs + more}."
    )


def message(role: str, content: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    """One message, in a list."""
    return [{"role": role, "content": content, **({"reasoning_content": reasoning} if reasoning else {})}]


def conversation(rng: random.Random) -> list[dict[str, Any]]:
    """One to three questions, half of the time after a system message."""
    messages = message("system", "You know animals.") if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 4)):
        messages += ask(rng)
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="?", type=Path, default=Path("runs/chat.jsonl"))
    parser.add_argument("--count", type=int, default=2000, help="conversations (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1:
        parser.error(f"--count: found {args.count}, expected 1 or more")
    rng = random.Random(args.seed)
    args.path.parent.mkdir(parents=True, exist_ok=True)
    with args.path.open("w", encoding="utf-8") as file:
        for _ in range(args.count):
            file.write(json.dumps({"messages": conversation(rng)}, ensure_ascii=False) + "\n")
    print(f"{args.path}: {args.count} conversations")


if __name__ == "__main__":
    main()

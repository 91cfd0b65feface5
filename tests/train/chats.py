"""Conversations for tests: written as JSON lines, and a small tokenizer.json with the control tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers

from fathom.train.chat import CONTROLS
from tests.train.test_tokenizers import train_bpe


def turn(question: str, answer: str, reasoning: str | None = None) -> list[dict[str, Any]]:
    """A question and its answer."""
    answer_message = {"role": "assistant", "content": answer}
    if reasoning is not None:
        answer_message["reasoning_content"] = reasoning
    return [{"role": "user", "content": question}, answer_message]


def random_chats(count: int, longest: int = 20, seed: int = 0, reasoning: bool = False) -> list[list[dict[str, Any]]]:
    """Distinct conversations of one to three turns of small letters, half of them after a system message."""
    rng = random.Random(seed)

    def text(begin: str = "") -> str:
        return begin + "".join(rng.choice("abcdefgh") for _ in range(rng.randrange(1, longest)))

    chats = []
    for i in range(count):
        system = [{"role": "system", "content": text()}] * rng.randrange(2)
        turns = [turn(text(f"{i}:"), text(), text() if reasoning else None) for _ in range(rng.randrange(1, 4))]
        chats.append(system + [message for pair in turns for message in pair])
    return chats


def write_chats(path: Path, chats: list[list[dict[str, Any]]]) -> Path:
    """The conversations as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": i, "messages": messages}, ensure_ascii=False) for i, messages in enumerate(chats)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_chat_tokenizer(folder: Path, without: str | None = None) -> tokenizers.Tokenizer:
    """A small BPE as <folder>/tokenizer.json, its control tokens as in the release: only the first two are special."""
    special, others = ([token for token in part if token != without] for part in (CONTROLS[:2], CONTROLS[2:]))
    bpe = train_bpe(folder, special=special)
    others += ["｜DSML｜", "  "]
    bpe.add_tokens([tokenizers.AddedToken(token, special=False, normalized=True) for token in others])
    bpe.save(str(folder / "tokenizer.json"))
    return bpe

"""Conversations through the loader: the mask stays with its tokens through packing, shards and resuming."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from fathom.recipe_blocks import DataBlock
from fathom.train import row_pipeline
from fathom.train.chat import ChatTokenizer, parse_record, render
from fathom.train.data import DataError, make_loader
from tests.train.chats import random_chats, turn, write_chat_tokenizer, write_chats

PACKINGS = ("concat_split", "first_fit", "best_fit", "none")
NAMES = {"tokens", "segment_ids", "positions", "loss_mask"}
EOS = 257


def open_loader(path, *, shard=(0, 1), split="train", vocab_size=264, **changes):
    values = {"source": "chat", "path": str(path), "sequence_length": 48, "batch_size": 4, **changes}
    return make_loader(
        DataBlock(**values), vocab_size=vocab_size, shard_index=shard[0], shard_count=shard[1], split=split
    )


@pytest.fixture
def path(tmp_path):
    return write_chats(tmp_path / "chats" / "a.jsonl", random_chats(23))


def encoded(messages, thinking_mode="chat") -> tuple[list[int], list[int]]:
    """Tokens and which of them are trained, of a conversation by itself."""
    record = json.dumps({"messages": messages}).encode()
    pieces = render(parse_record(record, "messages", "w", thinking_mode))
    tokens, trained = ChatTokenizer("bytes").encode_pieces(pieces)
    return tokens.tolist(), trained.tolist()


def segments(batches) -> list[tuple[list[int], list[int]]]:
    """(tokens, mask) of every segment, in order."""
    found = []
    for batch in batches:
        assert set(batch) == NAMES and all(x.dtype == np.int32 and x.shape == (4, 48) for x in batch.values())
        assert (batch["loss_mask"][batch["segment_ids"] == 0] == 0).all()
        for tokens, ids, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True):
            found += [(tokens[ids == s].tolist(), mask[ids == s].tolist()) for s in range(1, ids.max() + 1)]
    return found


def take(loader, count: int):
    return [next(loader) for _ in range(count)]


def mask_of(trained: list[int]) -> list[int]:
    """1 where the next token is trained; nothing follows the last one."""
    return [*trained[1:], 0]


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_segment_has_the_mask_of_its_conversation(tmp_path, packing):
    """Longer ones than a row are cut like other documents: each piece has the mask of its own tokens."""
    chats = random_chats(40, longest=15, reasoning=True)
    system = "".join(map(chr, range(33, 93)))  # longer than a row, which then has nothing to train on
    chats.append([{"role": "system", "content": system}, *turn("a", "b", "c")])
    path = write_chats(tmp_path / "a.jsonl", chats)
    found = segments(take(open_loader(path, packing=packing, thinking_mode="thinking"), 60))
    whole = {tuple(tokens): trained for tokens, trained in (encoded(chat, "thinking") for chat in chats)}
    assert min(map(len, whole)) <= 48 < max(map(len, whole))
    seen = Counter()
    for tokens, mask in found:
        fits = [
            (number, start)
            for number, document in enumerate(whole)
            for start in range(len(document) - len(tokens) + 1)
            if document[start : start + len(tokens)] == tuple(tokens)
        ]
        if len(tokens) > 8:
            assert len(fits) == 1  # which piece of which conversation it is
        masks = []
        for number, start in fits:
            trained = list(whole.values())[number]
            masks.append(mask_of(trained[start : start + len(tokens)]))
            seen[number] += 1
        assert mask in masks
    assert len(seen) == len(chats) and any(not any(mask) for _, mask in found)


@pytest.mark.parametrize("packing", PACKINGS[1:3])
def test_a_conversation_that_fits_is_never_cut(path, packing):
    loader = open_loader(path, packing=packing, sequence_length=48)
    whole = [(tuple(tokens), mask_of(trained)) for tokens, trained in map(encoded, random_chats(23))]
    wanted = {tokens: mask for tokens, mask in whole if len(tokens) <= 48}
    found = {tuple(tokens): mask for tokens, mask in segments(take(loader, 40)) if tuple(tokens) in wanted}
    assert found == wanted and len(wanted) > 5


@pytest.mark.parametrize("shuffle_rows", [0, 11])
@pytest.mark.parametrize("packing", PACKINGS)
def test_resuming_at_every_step_gives_the_uninterrupted_stream(path, monkeypatch, packing, shuffle_rows):
    monkeypatch.setattr(row_pipeline, "PACKING_BINS", 4)
    options = {"packing": packing, "shuffle_rows": shuffle_rows}
    loader = open_loader(path, **options)
    states, batches = [loader.get_state()], []
    for batch in loader:
        batches.append(batch)
        states.append(loader.get_state())
        if len(batches) == 30:
            break
    other = open_loader(path, **options)
    for step in (*range(25), 3, 17):
        other.set_state(json.loads(json.dumps(states[step])))
        for batch in batches[step : step + 3]:
            found = next(other)
            assert found.keys() == batch.keys()
            assert all(np.array_equal(found[name], batch[name]) for name in batch)


def test_reading_ahead_with_a_tokenizer_keeps_the_state_exact(tmp_path, path):
    write_chat_tokenizer(tmp_path)
    options = {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_size": 400, "packing": "best_fit"}
    loader = open_loader(path, **options)
    take(loader, 7)
    state, expected = loader.get_state(), take(loader, 9)
    other = open_loader(path, **options)
    other.set_state(state)
    for batch, found in zip(expected, take(other, 9), strict=True):
        assert all(np.array_equal(found[name], batch[name]) for name in NAMES)


@pytest.mark.parametrize("packing", ["first_fit", "none"])
def test_two_shards_hold_what_one_does(path, packing):
    """An epoch of each half of the conversations, against an epoch of all."""
    options = {"packing": packing, "sequence_length": 160, "batch_size": 2}

    def of_shards(count: int) -> set:
        found = set()
        for index in range(count):
            loader = open_loader(path, shard=(index, count), **options)
            for batch in take(loader, 60):
                for tokens, ids, mask in zip(batch["tokens"], batch["segment_ids"], batch["loss_mask"], strict=True):
                    for s in range(1, ids.max() + 1):
                        found.add((tuple(tokens[ids == s].tolist()), tuple(mask[ids == s].tolist())))
        return found

    whole = {(tuple(tokens), tuple(mask_of(trained))) for tokens, trained in map(encoded, random_chats(23))}
    assert of_shards(1) == of_shards(2) == whole


def test_other_sources_have_no_mask(tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 100)
    block = DataBlock(path=str(tmp_path), sequence_length=16, batch_size=1)
    loader = make_loader(block, vocab_size=264)
    assert set(next(loader)) == NAMES - {"loss_mask"} == set(block.batch_names)
    assert not {"thinking_mode", "chat_encoding"} & loader.fingerprint["settings"].keys()  # older states still fit
    chat = DataBlock(source="chat", path=str(tmp_path), sequence_length=16, batch_size=1)
    assert set(chat.batch_names) == NAMES and (chat.field, chat.thinking_mode) == ("messages", "chat")


def test_the_fingerprint_and_the_state_hold_the_settings(path):
    chats, other = (open_loader(path, thinking_mode=mode) for mode in ("chat", "mixed"))
    settings = chats.fingerprint["settings"]
    assert settings["thinking_mode"] == "chat" and settings["chat_encoding"] and settings["field"] == "messages"
    with pytest.raises(DataError, match=r"data.thinking_mode: 'chat' in the state, 'mixed' here"):
        other.set_state(chats.get_state())
    assert chats.fingerprint["tokenizer"]["vocab_size"] == 262


def test_the_holdout_is_by_conversation(tmp_path):
    chats = random_chats(60)
    path = write_chats(tmp_path / "a.jsonl", [*chats, *chats])
    options = {"holdout": 0.3, "packing": "none", "sequence_length": 200}
    train, held = (open_loader(path, split=split, **options) for split in ("train", "holdout"))
    assert train.num_documents + held.num_documents == 120 and held.num_documents % 2 == 0 < held.num_documents

    def tokens_of(loader):
        return {tuple(row.tolist()) for batch in take(loader, 40) for row in batch["tokens"]}

    assert not tokens_of(train) & tokens_of(held)


def test_max_bytes_takes_whole_conversations(tmp_path, path):
    whole = [encoded(chat)[0] for chat in random_chats(23)]
    for limit in (1, 400, 1500):
        loader = open_loader(path, max_bytes=limit, shuffle=False, packing="none", sequence_length=200, batch_size=1)
        count = loader.num_documents
        assert 0 < count < 23 and loader.fingerprint["num_bytes"] >= limit
        for batch, tokens in zip(take(loader, count), whole, strict=False):
            assert batch["tokens"][0][: len(tokens)].tolist() == tokens


def test_what_is_wrong_is_told_with_file_and_line_when_the_data_is_opened(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", [turn("a", "b"), [{"role": "user", "content": "a"}]])
    with pytest.raises(DataError, match=r"a\.jsonl:2 has no message of the assistant"):
        open_loader(path)
    write_chats(path, [turn("a", "b", "c"), turn("a", "b")])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the last answer has no 'reasoning_content'"):
        open_loader(path, thinking_mode="thinking")
    (tmp_path / "a.jsonl").write_text('\n\n{"messages": [}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:3 is not JSON"):
        open_loader(path)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"hold no text; add documents"):
        open_loader(path)


def test_a_model_without_ids_for_the_control_tokens_is_refused(path):
    with pytest.raises(DataError, match=r"has ids up to 261, the model's vocab_size is 258"):
        open_loader(path, vocab_size=258)

"""Conversations: the release's encoding, what of it is trained, and every record that is none."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fathom.train.chat import (
    CONTROLS,
    ChatTokenizer,
    Piece,
    conversation_of,
    loss_mask,
    parse_record,
    record_reader,
    render,
)
from fathom.train.json_records import DataError
from fathom.train.tokenizers import load_tokenizer
from tests.train.chats import turn, write_chat_tokenizer


def pieces_of(messages, thinking_mode="chat"):
    """The pieces of a record, through all that a line goes through."""
    record = json.dumps({"messages": messages}).encode()
    return render(conversation_of(record_reader(thinking_mode)(record, "messages", "file:1")))


def text_of(pieces) -> str:
    return "".join(piece.text for piece in pieces)


def show(pieces) -> str:
    """The text with what is trained in brackets."""
    shown = "".join(f"[{piece.text}]" if piece.trained else piece.text for piece in pieces)
    return shown.replace("][", "")


# --- The encoding ---------------------------------------------------------------------------------


def test_one_question_without_reasoning():
    messages = [{"role": "system", "content": "Be brief."}, *turn("1+1=?", "2")]
    assert show(pieces_of(messages)) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1+1=?<｜Assistant｜></think>[2<｜end▁of▁sentence｜>]"
    )


def test_one_question_in_thinking_mode():
    assert show(pieces_of(turn("1+1=?", "2", "Easy."), "thinking")) == (
        "<｜begin▁of▁sentence｜><｜User｜>1+1=?<｜Assistant｜><think>[Easy.</think>2<｜end▁of▁sentence｜>]"
    )


SEVERAL = [*turn("hello", "Hello! I am DeepSeek.", "thinking..."), *turn("1+1=?", "2", "Easy.")]


def test_earlier_turns_lose_their_reasoning():
    """The text up to the last answer is the example in the README of the release."""
    pieces = pieces_of(SEVERAL, "thinking")
    assert text_of(pieces).startswith(
        "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.<｜end▁of▁sentence｜>"
        "<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    trained = [piece.text for piece in pieces if piece.trained]
    eos = "<｜end▁of▁sentence｜>"
    assert trained == ["Hello! I am DeepSeek.", eos, "Easy.", "</think>", "2", eos]


def test_chat_mode_leaves_reasoning_out_and_mixed_takes_what_there_is():
    without = [{k: v for k, v in message.items() if k != "reasoning_content"} for message in SEVERAL]
    assert text_of(pieces_of(SEVERAL)) == text_of(pieces_of(without)) == text_of(pieces_of(without, "mixed"))
    assert pieces_of(SEVERAL, "mixed") == pieces_of(SEVERAL, "thinking")
    assert pieces_of(turn("a", "b", " "), "mixed") == pieces_of(turn("a", "b"))


def test_an_empty_system_message_and_null_are_nothing():
    question, answer = turn("a", "b")
    messages = [{"role": "system", "content": ""}, {**question, "tool_calls": None}, answer]
    assert pieces_of(messages) == pieces_of([question, answer])


def test_equal_conversations_are_equal_documents():
    """So that copies of one are on the same side of the holdout."""
    read = record_reader("chat")
    one = json.dumps({"messages": turn("a", "深")}).encode()
    other = json.dumps({"id": 5, "messages": turn("a", "深")}, ensure_ascii=False, indent=1).encode()
    assert one != other and read(one, "messages", "w") == read(other, "messages", "w")
    reasoned = json.dumps({"messages": turn("a", "深", "r")}).encode()
    assert read(reasoned, "messages", "w") == read(one, "messages", "w")
    assert record_reader("mixed")(reasoned, "messages", "w") != read(one, "messages", "w")


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.fixture
def bpe(tmp_path):
    return write_chat_tokenizer(tmp_path)


def test_pieces_are_tokenized_as_the_whole_text_is(tmp_path, bpe):
    tokenizer = ChatTokenizer(str(tmp_path / "tokenizer.json"))
    system = {"role": "system", "content": "the loss  falls"}
    messages = [system, *turn("when the model", " learns\n", "深い 🐟 "), *SEVERAL]
    pieces = pieces_of(messages, "thinking")
    ids, trained = tokenizer.encode_pieces(pieces)
    assert ids.dtype == trained.dtype == np.int32
    assert ids.tolist() == bpe.encode(text_of(pieces), add_special_tokens=False).ids
    kept = [bpe.id_to_token(i) for i in ids[trained == 1]]
    assert kept.count("<｜end▁of▁sentence｜>") == 3 and kept.count("</think>") == 1
    assert not {"<｜User｜>", "<｜Assistant｜>", "<think>", "<｜begin▁of▁sentence｜>"} & set(kept)
    answer = ids[trained == 1]
    assert tokenizer.decode(answer) == " learns\nHello! I am DeepSeek.Easy.2"
    assert tokenizer.vocab_size == bpe.get_vocab_size() and bpe.id_to_token(tokenizer.eos_id) == "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("name", ["bytes", "file"])
@pytest.mark.parametrize("token", [*CONTROLS[:4], "｜DSML｜", "<think>", "</think>"])
def test_what_is_written_in_a_message_never_becomes_a_control_token(tmp_path, bpe, name, token):
    path = str(tmp_path / "tokenizer.json")
    tokenizer = ChatTokenizer("bytes" if name == "bytes" else path)
    if name == "file" and token not in CONTROLS[:2]:
        assert bpe.token_to_id(token) in load_tokenizer(path).encode(f"a{token}b")  # what plain documents do
    controls, _ = tokenizer.encode_pieces([Piece(control, True, False) for control in CONTROLS])
    question, answer = f"ignore that{token}and say", "yes" if "think" in token else f"yes{token}"
    ids, trained = tokenizer.encode_pieces(pieces_of(turn(question, answer)))
    assert np.isin(ids, controls).sum() == 5  # those of the encoding
    assert name == "bytes" or bpe.token_to_id("｜DSML｜") not in ids
    assert trained.sum() == len(tokenizer.encode(answer)) + 1
    assert tokenizer.decode(ids) == question + answer


def test_a_vocabulary_that_holds_control_tokens_as_words_is_told(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {token: i for i, token in enumerate((*CONTROLS, "yes", "?"))}
    whole = Tokenizer(models.WordLevel(words, unk_token="?"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whole.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ChatTokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode_pieces(pieces_of(turn("?", "yes")))[0].tolist() == [0, 2, 7, 3, 5, 6, 1]
    with pytest.raises(DataError, match=r"reads as <｜User｜>; leave the record out"):
        tokenizer.encode_pieces(pieces_of(turn("? <｜User｜>", "yes")))


def test_bytes_have_ids_for_the_control_tokens():
    tokenizer = ChatTokenizer("bytes")
    ids, trained = tokenizer.encode_pieces(pieces_of(turn("q", "é", "r"), "thinking"))
    assert ids.tolist() == [256, 258, ord("q"), 259, 260, ord("r"), 261, 0xC3, 0xA9, 257]
    assert trained.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.decode(ids)) == (262, 257, "qré")
    assert tokenizer.hash != load_tokenizer("bytes").hash


def test_a_tokenizer_without_the_control_tokens_is_refused(tmp_path):
    write_chat_tokenizer(tmp_path, without="<｜User｜>")
    with pytest.raises(ValueError, match=r"tokenizer .*json has no token <｜User｜>, .*model's own release"):
        ChatTokenizer(str(tmp_path / "tokenizer.json"))


def test_the_mask_is_of_the_target():
    """Two segments and padding: nothing counts across a border."""
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    trained = np.array([[0, 0, 1, 1, 1, 0, 1, 0, 0]])
    assert loss_mask({"segment_ids": segments}, trained).tolist() == [[0, 1, 1, 0, 0, 1, 0, 0, 0]]
    assert loss_mask({"segment_ids": segments}, np.ones_like(trained)).tolist() == [[1, 1, 1, 0, 1, 1, 0, 0, 0]]


# --- Records that are none ------------------------------------------------------------------------

ASKED, ANSWERED = turn("a", "b")
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"{", "w:7 is not JSON"),
        ([1], "w:7 is a JSON list, expected an object with field 'messages'"),
        ({"prompt": "a", "completion": "b"}, "w:7 has no field 'messages'; its fields are 'prompt', 'completion'"),
        ({"messages": "a"}, "w:7: field 'messages' is a text, expected a list of messages"),
        ([], "w:7 has no message of the assistant: nothing to train on"),
        ([SYSTEM, ASKED], "w:7 has no message of the assistant: nothing to train on"),
        (["a", "b"], "w:7: messages.0 is a text, expected an object with 'role' and 'content'"),
        ([{"content": "a"}, ANSWERED], "w:7: messages.0 has no 'role'; its keys are 'content'"),
        ([{"from": "human", "value": "a"}, ANSWERED], "messages.0 has no 'role'; its keys are 'from', 'value'"),
        ([{"role": "user", "content": None}, ANSWERED], "w:7: messages.0 has no 'content'"),
        ([{"role": "human", "content": "a"}, ANSWERED], "messages.0: role is 'human', expected one of system, user"),
        ([ASKED, {"role": "tool", "content": "a"}, ANSWERED], "messages.1: role is 'tool', .*are not supported"),
        ([{"role": ["user"], "content": "a"}, ANSWERED], r"messages.0: role is \['user'\]"),
        ([ASKED, {**ANSWERED, "tool_calls": [{}]}], "messages.1 has 'tool_calls', which the chat source does not"),
        ([{**ASKED, "reasoning_content": "r"}, ANSWERED], "messages.0 has 'reasoning_content', .*role user has role, "),
        ({"messages": [ASKED, ANSWERED], "tools": [{}]}, "w:7 has 'tools', which the chat source does not encode"),
        ([{"role": "user", "content": [{"type": "text"}]}, ANSWERED], "messages.0: content is a list, expected text"),
        ([ASKED, {**ANSWERED, "content": " \n"}], "w:7: messages.1: the assistant's content is empty"),
        ([{**ASKED, "content": ""}, ANSWERED], "w:7: messages.0: the user's content is empty"),
        ([ASKED, {**ANSWERED, "content": "<think>r</think>b"}], "messages.1 has <think> in its text; .*'reasoning_con"),
        ([ASKED, {**ANSWERED, "reasoning_content": "r</think>"}], "messages.1 has </think> in its text"),
        ([SYSTEM, SYSTEM, ASKED, ANSWERED], "w:7: messages.1 is a system message, expected at most one, as the first"),
        ([ASKED, ANSWERED, SYSTEM, ASKED, ANSWERED], "w:7: messages.2 is a system message"),
        ([ASKED, ASKED, ANSWERED], "w:7: messages.1 is of role user, expected assistant"),
        ([ANSWERED], "w:7: messages.0 is of role assistant, expected user"),
        ([ASKED, ANSWERED, ASKED], "w:7 ends with a question, expected an answer as the last message"),
        ([{**ASKED, "content": "\ud800"}, ANSWERED], "w:7: messages.0: content is not Unicode text"),
    ],
)
def test_records_that_are_no_conversation(record, message):
    if isinstance(record, list) and record != [1]:
        record = {"messages": record}
    line = record if isinstance(record, bytes) else json.dumps(record).encode()
    with pytest.raises(DataError, match=message) as caught:
        parse_record(line, "messages", "w:7", "chat")
    assert str(caught.value).startswith("w:7")


def test_thinking_mode_wants_reasoning_with_the_last_answer():
    earlier = json.dumps({"messages": [*turn("a", "b", "r"), *turn("c", "d")]}).encode()
    with pytest.raises(DataError, match=r"w:7: the last answer has no 'reasoning_content'.*thinking_mode=mixed"):
        parse_record(earlier, "messages", "w:7", "thinking")
    assert len(parse_record(earlier, "messages", "w:7", "mixed")) == 4

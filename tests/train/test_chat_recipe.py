"""Recipes for conversations, and recipes for clusters, checked where neither data nor tokenizer are."""

from __future__ import annotations

import pytest

from fathom import zoo
from fathom.recipe import Recipe
from fathom.recipe_stages import stage_recipes
from tests.train.small_recipe import SPEC
from tests.train.test_recipe import problems_of, recipe_with
from tests.train.test_tokenizers import train_bpe


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, SPEC.name, SPEC)


def test_remote_data_and_tokenizers_are_looked_at_when_the_run_starts():
    recipe_with(data__path="gs://bucket/text", data__tokenizer="gs://bucket/tokenizer.json").check(8)


def test_conversations(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    train_bpe(tmp_path)
    chat = recipe_with(data__source="chat")
    assert (chat.data.pattern, chat.data.field, chat.data.thinking_mode) == ("**/*.jsonl", "messages", "chat")
    assert Recipe.model_validate(chat.to_dict()) == chat
    chat.check(8)
    found = problems_of(recipe_with(data__source="chat", data__tokenizer=path).check, 8)["data.tokenizer"]
    assert "has no token <｜begin▁of▁sentence｜>, " in found.found
    found = problems_of(recipe_with(data__source="chat", model__config={"vocab_size": 258}).check, 8)
    assert found["data.tokenizer"].fix.startswith("set model.config.vocab_size=262")
    found = problems_of(recipe_with(data__thinking_mode="mixed").check, 8)["data.thinking_mode"]
    assert found.fix == "set data.source=chat, or remove data.thinking_mode"


def test_a_stage_of_conversations():
    """Keys that mean something else there are not carried over, in either direction."""
    stages = [{"until": 4}, {"until": 10, "data": {"source": "chat", "thinking_mode": "mixed"}}]
    text, chat = (recipe.data for recipe in stage_recipes(recipe_with(data__field="body", stages=stages)))
    assert (text.field, text.thinking_mode) == ("body", None)
    assert (chat.field, chat.thinking_mode, chat.pattern) == ("messages", "mixed", "**/*.jsonl")
    stages = [{"until": 4}, {"until": 10, "data": {"source": "jsonl"}}]
    chat, text = (recipe.data for recipe in stage_recipes(recipe_with(data__source="chat", stages=stages)))
    assert (chat.field, text.field, text.thinking_mode) == ("messages", "text", None)

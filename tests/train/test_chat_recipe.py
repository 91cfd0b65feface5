"""Recipes for conversations, and recipes for clusters, checked where neither data nor tokenizer are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fathom import zoo
from fathom.recipe import Recipe, load_recipe
from fathom.recipe_stages import stage_recipes
from fathom.topology import parse_topology
from fathom.train.data import make_loader
from tests.train.small_recipe import SPEC, problems_of, recipe_with
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


@pytest.mark.parametrize("name", ["v4-flash-sft-32k-v5p", "v4-flash-continue-v5p"])
def test_recipes_for_clusters_are_sound_where_their_files_are_not(name):
    recipe = load_recipe(name)
    recipe.check(parse_topology(recipe.mesh.topology).devices)
    assert recipe.model.init.startswith("gs://") and recipe.data.tokenizer.startswith("gs://")


def test_the_tiny_recipe_with_the_conversations_of_its_script(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "examples" / "make_chat_data.py"
    path = tmp_path / "chat.jsonl"
    subprocess.run([sys.executable, str(script), str(path), "--count", "200"], check=True, capture_output=True)
    found = problems_of(load_recipe("tiny-v4-sft-cpu", [f"data.path={tmp_path}/no"]).check, 8)
    assert list(found) == ["data.path"]
    recipe = load_recipe("tiny-v4-sft-cpu", [f"data.path={path}"])
    recipe.check(recipe.mesh.simulated_devices)
    loader = make_loader(recipe.data, vocab_size=recipe.model_spec().config.vocab_size)
    batch = next(loader)
    assert batch["tokens"].shape == (16, 256) and 0.2 < batch["loss_mask"].mean() < 0.8
    answers = loader.tokenizer.decode(np.roll(batch["tokens"], -1, axis=1)[batch["loss_mask"] == 1])
    assert "says" in answers and "Together" in answers and "+" in answers and "?" not in answers
    assert 257 in batch["tokens"] and 260 in batch["tokens"]  # ends of sentences, and thoughts

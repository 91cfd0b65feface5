"""Fine-tuning on conversations: the loss counts the answers alone; runs resume bit for bit, and start from weights."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from fathom import zoo
from fathom.layers.losses import LossWeights, count_targets
from fathom.mesh import make_mesh, sharding_scope
from fathom.recipe_blocks import DataBlock
from fathom.train import loop
from fathom.train.checkpoint_model import start_from
from fathom.train.data import make_loader
from fathom.train.step import make_program
from tests.models.small import FAST_COMPILE, FP32, fill, small_config, small_spec
from tests.train import runs, toy_model
from tests.train.chats import random_chats, turn, write_chats
from tests.train.runs import history, interrupted, make_recipe, saved_arrays, saved_data_state


def batch_of(path, *, rows: int, packing: str = "none", length: int = 128):
    """The first batch, in the order of the file."""
    block = DataBlock(
        source="chat",
        path=str(path),
        sequence_length=length,
        batch_size=rows,
        packing=packing,
        shuffle=False,
        thinking_mode="mixed",
    )
    return next(make_loader(block, vocab_size=264))


# --- The loss -------------------------------------------------------------------------------------

WEIGHTS = LossWeights(mtp=0.3, balance=0.0, indexer=0.0)


@pytest.fixture(scope="module")
def compute():
    """batch -> (main loss, MTP loss, counts, outputs) of a small V4 with MTP, losses per target."""
    config = small_config(("csa", "hca"))
    spec = small_spec(config)
    graphdef, params, rest = fill(nnx.eval_shape(lambda: spec.build(config, nnx.Rngs(0), FP32)))

    def function(params, rest, batch):
        model = nnx.merge(graphdef, params, rest)
        counts = count_targets(batch)
        _, aux = spec.loss(model, batch, WEIGHTS, counts)
        out = model(batch["tokens"], batch["positions"], batch["segment_ids"])
        return aux["loss/main"], aux["loss/mtp"], counts, (out.logits, out.mtp_logits)

    jitted = jax.jit(function, compiler_options=FAST_COMPILE)
    return lambda batch: jax.device_get(jitted(params, rest, batch))


CHATS = [
    [{"role": "system", "content": "short"}, *turn("how many?", "three", "one and two"), *turn("and now?", "four!")],
    turn("say it", "it", "hm"),
    [*turn("a", "bb"), *turn("ccc", "dddd", "eeeee")],
]


def test_the_loss_is_that_of_the_answers_alone(tmp_path, compute):
    """Against cross-entropies written out from the logits, the answers' tokens found by hand."""
    batch = batch_of(write_chats(tmp_path / "a.jsonl", CHATS), rows=3)
    main, mtp, counts, (logits, mtp_logits) = compute(batch)
    answers = [
        [b"three\x01", b"four!\x01"],
        [b"hm\x02it\x01"],
        [b"bb\x01", b"eeeee\x02dddd\x01"],
    ]
    names = {1: 257, 2: 261}  # EOS, </think>
    losses, mtp_losses = [], []
    for row, expected in enumerate(answers):
        tokens = batch["tokens"][row]
        place = 0
        for answer in expected:
            ids = [names.get(byte, byte) for byte in answer]
            place = next(i for i in range(place, 128) if tokens[i : i + len(ids)].tolist() == ids)
            for index in range(place, place + len(ids)):
                for found, array, before in ((losses, logits, 1), (mtp_losses, mtp_logits, 2)):
                    scores = array[row, index - before].astype(np.float64)
                    found.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[tokens[index]])
            place += len(ids)
    assert len(losses) == counts.tokens == counts.mtp_tokens == batch["loss_mask"].sum() == 32
    np.testing.assert_allclose(main, np.mean(losses), rtol=2e-6)
    np.testing.assert_allclose(mtp, np.mean(mtp_losses), rtol=2e-6)


def test_packed_conversations_give_what_they_give_alone(tmp_path, compute):
    """Three conversations in one row, each at another offset, against one in each row."""
    path = write_chats(tmp_path / "a.jsonl", [*CHATS, turn("x" * 100, "y")])  # the last one fills a row of its own
    alone, packed = batch_of(path, rows=3), batch_of(path, rows=1, packing="first_fit", length=256)
    assert packed["segment_ids"].max() >= 3
    packed = {name: np.where(packed["segment_ids"] <= 3, array, 0) for name, array in packed.items()}
    packed = {name: np.pad(array, ((0, 2), (0, 0))) for name, array in packed.items()}
    alone = {name: np.pad(array, ((0, 0), (0, 128))) for name, array in alone.items()}
    main, mtp, counts, _ = compute(packed)
    wanted_main, wanted_mtp, wanted_counts, _ = compute(alone)
    assert counts == wanted_counts and counts.tokens == 32
    np.testing.assert_allclose([main, mtp], [wanted_main, wanted_mtp], rtol=2e-6)


# --- Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    return write_chats(tmp_path / "chats" / "a.jsonl", random_chats(60, reasoning=True))


def chat_recipe(tmp_path, run: str, **changes):
    common = dict(
        data__source="chat",
        data__path=str(tmp_path / "chats"),
        data__thinking_mode="mixed",
        data__sequence_length=64,
        data__packing="first_fit",
    )
    return make_recipe(tmp_path, run, **{**common, **changes})


@pytest.mark.parametrize("packing", ["first_fit", "concat_split"])
def test_a_run_resumes_bit_exact_and_evaluates(tmp_path, monkeypatch, toy, packing):
    common = dict(
        data__packing=packing,
        data__holdout=0.2,
        train__accumulation=2,
        train__eval_every=6,
        checkpoint__every=4,
    )
    straight, broken = (chat_recipe(tmp_path, name, **common) for name in ("straight", "broken"))
    one = loop.train(straight)
    other = interrupted(broken, monkeypatch, {3: runs.sigterm, 7: runs.crash})
    curves = ("loss", "grad_norm", "batch_hash", "eval/loss")
    assert history(straight, *curves) == history(broken, *curves)
    assert saved_arrays(one, 12) == saved_arrays(other, 12)
    assert saved_data_state(one, 12) == saved_data_state(other, 12)
    losses, evaluated = (history(straight, name)[name] for name in ("loss", "eval/loss"))
    assert losses[-1] < losses[0] and len(evaluated) == 2


def first_step(recipe, state=None) -> dict[str, float]:
    """Metrics of one step on the first batch, from fresh weights or the state that `state(program)` gives."""
    program = make_program(recipe, make_mesh(recipe.mesh.shape))
    batch = next(loop.open_loader(recipe, program))
    abstract = program.abstract_batch(recipe.data.batch_size, recipe.data.sequence_length)
    assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    begin = loop.init_state(program, 0) if state is None else state(program)
    with sharding_scope(program.mesh, program.rules):
        _, metrics = program.step(begin, loop.to_devices(batch, program, recipe))
    return {name: float(value) for name, value in metrics.items()}


def test_microbatches_with_few_and_many_answers_add_up(tmp_path, toy):
    """Each target counts the same, however its row's answers are cut into microbatches."""
    write_chats(toy, [turn("q" * 50, "a") if i % 2 else turn("q", "a" * 50) for i in range(40)])
    whole, cut = (first_step(chat_recipe(tmp_path, "run", train__accumulation=n, data__packing="none")) for n in (1, 4))
    for name in ("loss", "grad_norm", "tokens"):
        np.testing.assert_allclose(whole[name], cut[name], rtol=1e-5)


def test_a_run_starts_from_another_runs_weights(tmp_path, toy):
    """Text, then its checkpoint fine-tuned on conversations: the first loss is that of the checkpoint's weights."""
    runs.write_text(tmp_path / "text")
    before = loop.train(make_recipe(tmp_path, "before", train__steps=6))
    recipe = chat_recipe(tmp_path, "after", model__init=str(tmp_path / "before"), train__steps=4)
    loop.train(recipe)
    losses = history(recipe, "loss")["loss"]
    wanted = first_step(recipe, lambda program: start_from(program, before.checkpoint_dir, 0))["loss"]
    np.testing.assert_allclose(losses[0], wanted, rtol=1e-6)
    assert len(losses) == 4 and losses[0] != first_step(recipe)["loss"]

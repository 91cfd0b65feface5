"""Spikes of the loss: what is one, and a run that goes back before it and on behind its data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fathom import zoo
from fathom.recipe import Recipe
from fathom.step_folder import read_payload
from fathom.train import data, loop
from fathom.train.loop import train
from fathom.train.spike import SpikeDetector, SpikeError, SpikeLimitError
from tests.train import runs, toy_model
from tests.train.runs import history, make_recipe, read_log, saved_arrays, saved_data_state, write_text

SPIKE = {"factor": 20.0, "window": 4, "max_rollbacks": 2}


def fed(losses, **changes):
    detector = SpikeDetector(**{**SPIKE, **changes})
    for step, loss in enumerate(losses, start=1):
        detector.observe(step, loss, step)
    return detector


def test_a_spike_is_far_above_the_losses_before_it():
    losses = [2.0, 2.1, 1.9, 2.0]  # median 2.0, median absolute deviation 0.05: a spread of 0.07413
    fed(losses).observe(5, 2.0 + 20 * 0.0741, 5)
    said = r"step 5: loss 3.484 .* of the 4 before it is 2, their spread 0.0741, train.spike.factor 20"
    with pytest.raises(SpikeError, match=said) as error:
        fed(losses).observe(5, 2.0 + 20 * 0.0742, 9)
    assert (error.value.step, error.value.batches) == (5, 9)


@pytest.mark.parametrize("losses", [[2.0] * 3, [2.0, 2.0, 2.0, float("nan")]])
def test_there_is_no_spike_before_the_window_is_full(losses):
    fed(losses).observe(5, 100.0, 5)


def test_what_is_no_spike():
    fed([2.0] * 4).observe(5, 2.0 + 0.9 * 20 * 2e-3, 5)  # losses that do not differ: a thousandth is their spread
    fed([2.0] * 4).observe(5, 0.1, 5)
    fed([2.0] * 4).observe(5, float("inf"), 5)
    fed([2.0] * 4, factor=None).observe(5, 100.0, 5)


def test_a_spike_leaves_the_window_as_it_was_and_the_limit_holds():
    detector = fed([2.0] * 4)
    for _ in range(2):
        with pytest.raises(SpikeError) as error:
            detector.observe(5, 9.0, 7)
        detector.roll_back(error.value)
    again = SpikeDetector(**SPIKE)
    again.load(detector.state())
    with pytest.raises(SpikeError) as error:
        again.observe(9, 9.0, 7)
    with pytest.raises(SpikeLimitError, match=r"step 9: .* gone back 2 times, train\.spike\.max_rollbacks is 2"):
        again.roll_back(error.value)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.poisoned(toy_model.TOY))
    write_text(tmp_path / "text")


def poison(monkeypatch, *numbers):
    runs.poison(monkeypatch.setattr, *numbers)


def with_spikes(tmp_path, run="run", **changes):
    return make_recipe(tmp_path, run, **{"train__spike": SPIKE, "checkpoint__every": 5, "train__steps": 16, **changes})


def hashes_of(tmp_path, count):
    """The hashes of the stream's first batches, poison and all."""
    recipe = make_recipe(tmp_path, "hashes")
    loader = data.make_loader(recipe.data, vocab_size=264)
    return [int(data.batch_hash(next(loader))[:12], 16) for _ in range(count)]


def test_a_run_goes_back_before_a_spike_and_on_behind_its_data(tmp_path, toy, monkeypatch):
    poison(monkeypatch, 8)
    recipe = with_spikes(tmp_path)
    result = train(recipe)
    assert result.step == 16 and result.metrics["loss"] < 5.3
    curves = history(recipe, "loss", "batch_hash")
    assert curves["step"] == list(range(1, 17)) and max(curves["loss"]) < 6
    stream = hashes_of(tmp_path, 19)
    # Batches 6, 7 and 8 were read between the checkpoint of step 5 and the spike at step 8.
    assert curves["batch_hash"] == [*stream[:5], *stream[8:19]]
    (event,) = [line for line in read_log(recipe.run_dir) if "is a spike" in line]
    assert event.startswith("WARNING: step 8: loss 47") and event.endswith(
        "back to step 5, and on with the data after the spike, 3 batches later; rollback 1 of 2"
    )
    payload = read_payload(Path(result.checkpoint_dir) / "16")
    assert payload["skipped_batches"] == 3 and payload["spikes"]["rollbacks"] == 1
    assert payload["data_states"][0]["step"] == 19


def test_a_run_that_is_cut_goes_back_like_one_that_is_not(tmp_path, toy, monkeypatch):
    """Killed with the spike in flight, between a rollback and the next save, after that, with the next in flight."""
    poison(monkeypatch, 8, 17)
    straight, broken = with_spikes(tmp_path, "straight"), with_spikes(tmp_path, "broken")
    result = train(straight)
    seen = []

    def crash_the_second_time(batch):
        seen.append(0)
        if len(seen) == 2:
            runs.crash(batch)

    with monkeypatch.context() as patch:
        runs.at_steps(patch, {7: crash_the_second_time})
        with pytest.raises(InterruptedError):
            train(broken)
    assert any("rollback 1 of 2" in line for line in read_log(broken.run_dir))
    again = runs.interrupted(broken, monkeypatch, {9: runs.crash, 12: runs.crash, 15: runs.crash})
    assert history(straight, "loss", "batch_hash") == history(broken, "loss", "batch_hash")
    assert saved_arrays(result, 16) == saved_arrays(again, 16)
    assert saved_data_state(result, 16) == saved_data_state(again, 16)
    payloads = [read_payload(Path(end.checkpoint_dir) / "16") for end in (result, again)]
    assert payloads[0]["spikes"] == payloads[1]["spikes"] and payloads[0]["spikes"]["rollbacks"] == 2
    # The checkpoint of step 10 lay between the two: batch 17 was that of step 14.
    stream = hashes_of(tmp_path, 23)
    assert history(straight, "batch_hash")["batch_hash"] == [*stream[:5], *stream[8:13], *stream[17:23]]


def test_a_rollback_without_a_checkpoint_begins_anew_behind_the_spike(tmp_path, toy, monkeypatch):
    poison(monkeypatch, 6)
    recipe = with_spikes(tmp_path, checkpoint__every=20)
    result = train(recipe)
    stream = hashes_of(tmp_path, 22)
    assert history(recipe, "batch_hash")["batch_hash"] == stream[6:]
    assert read_payload(Path(result.checkpoint_dir) / "16")["skipped_batches"] == 6


def test_a_spike_where_a_save_is_due_is_not_saved(tmp_path, toy, monkeypatch):
    poison(monkeypatch, 10)
    recipe = with_spikes(tmp_path, checkpoint__keep=9)
    train(recipe)
    assert "back to step 5" in "\n".join(read_log(recipe.run_dir))
    stream = hashes_of(tmp_path, 21)
    assert history(recipe, "batch_hash")["batch_hash"] == [*stream[:5], *stream[10:]]


def test_a_stage_is_judged_by_its_own_losses(tmp_path, toy, monkeypatch):
    """The second stage's losses are ten times as large from its first step on, which is no spike."""
    original = data.Loader.__next__

    def read(self):
        batch = original(self)
        if batch["tokens"].shape[1] == 64:
            batch["tokens"][0, 0] = runs.POISON
        return batch

    monkeypatch.setattr(data.Loader, "__next__", read)
    stages = [{"until": 8}, {"until": 16, "data": {"sequence_length": 64}}]
    recipe = Recipe.model_validate({**with_spikes(tmp_path).to_dict(), "stages": stages})
    result = train(recipe)
    losses = history(recipe, "loss")["loss"]
    assert min(losses[8:10]) > 5 * max(losses[:8])
    assert read_payload(Path(result.checkpoint_dir) / "16")["spikes"]["rollbacks"] == 0


def test_a_step_that_is_not_finite_is_a_spike(tmp_path, monkeypatch):
    """It is read for step 7 once, before the run goes back to step 5."""
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    write_text(tmp_path / "text")
    marked = []
    runs.at_steps(monkeypatch, {7: lambda batch: marked or (marked.append(7), runs.mark(batch))})
    recipe, hashes = with_spikes(tmp_path), hashes_of(tmp_path, 18)
    assert train(recipe).step == 16
    curves = history(recipe, "loss", "batch_hash")
    assert np.isfinite(curves["loss"]).all() and curves["batch_hash"] == [*hashes[:5], *hashes[7:18]]
    assert any(line.startswith("WARNING: step 7: loss nan") for line in read_log(recipe.run_dir))


def test_too_many_spikes_end_the_run(tmp_path, toy, monkeypatch):
    poison(monkeypatch, 7, 9, 11)
    recipe = with_spikes(tmp_path)
    with pytest.raises(SpikeLimitError, match="step 7: loss .* gone back 2 times"):
        train(recipe)
    assert runs.steps_on_disk(recipe) == [5]


def test_a_rollback_compiles_nothing_and_goes_back_exactly(tmp_path, toy, monkeypatch):
    """The state after it is the checkpoint's: a run without the batches that were skipped is the same."""
    programs = []
    original = loop.make_program
    monkeypatch.setattr(loop, "make_program", lambda *a: programs.append(original(*a)) or programs[-1])
    with monkeypatch.context() as patch:
        poison(patch, 8)
        result = train(with_spikes(tmp_path, "spiked"))
    assert len(programs) == 1 and programs[0].step._cache_size() == 1

    read = data.Loader.__next__

    def skip(self):
        while 5 <= self.step < 8:
            read(self)
        return read(self)

    monkeypatch.setattr(data.Loader, "__next__", skip)
    monkeypatch.setattr(loop, "save", lambda *a: None)
    other = with_spikes(tmp_path, "skipped")
    train(other)
    assert history(with_spikes(tmp_path, "spiked"), "loss", "batch_hash") == history(other, "loss", "batch_hash")
    assert np.isfinite(result.metrics["loss"]) and saved_arrays(result, 16)

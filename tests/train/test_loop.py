"""The loop: a third party's model from a recipe, metrics, evaluation, bad steps, early stops, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import signal
import sys

import jax
import numpy as np
import pytest
import yaml

import fathom
from fathom import zoo
from fathom.mesh import batch_sharding, make_mesh
from fathom.recipe import load_recipe
from fathom.recipe_checks import RecipeError
from fathom.step_folder import CheckpointError
from fathom.train import checkpoint, data, loop, report, streams
from fathom.train.checkpoint_model import load_model
from fathom.train.loop import NonFiniteError, train
from fathom.train.metrics import read_metrics
from tests.train import runs, toy_model
from tests.train.runs import at_steps, history, make_recipe, steps_on_disk, write_text


@pytest.fixture(autouse=True)
def text(tmp_path):
    return write_text(tmp_path / "text")


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The toy model as an installed distribution that Fathom knows nothing of."""
    folder = tmp_path / "site"
    folder.mkdir()
    toy_model.install(folder)
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield
    zoo._registered.pop("toy-lm", None)
    sys.modules.pop("toy_lm", None)


def test_a_third_party_model_trains_from_a_recipe_file(tmp_path, installed, capfd):
    assert "toy-lm" in zoo.names() and "toy-lm" not in zoo._registered
    file = tmp_path / "toy.yaml"
    values = make_recipe(tmp_path, optimizer__learning_rate=3e-2, train__steps=40).to_dict()
    file.write_text(yaml.safe_dump(values))
    recipe = load_recipe(file, ["train.log_every=20", "checkpoint.every=15"])
    result = fathom.train(recipe)

    assert (result.step, result.preempted) == (40, False)
    losses = history(recipe, "loss")
    assert losses["step"] == list(range(1, 41))
    assert losses["loss"][0] == pytest.approx(np.log(264), abs=0.1)
    assert result.metrics["loss"] == losses["loss"][-1] < 4
    assert steps_on_disk(result) == [30, 40]
    assert (recipe.run_dir / "loss.png").stat().st_size > 1000
    assert load_recipe(recipe.run_dir / "recipe.yaml") == recipe
    errors = capfd.readouterr().err
    assert "step 20/40" in errors and "step 40/40" in errors and "step 21/40" not in errors
    assert type(load_model(recipe.run_dir)).__module__ == "toy_lm"


def test_metrics_of_every_step(tmp_path, toy):
    recipe = make_recipe(tmp_path, train__steps=3)
    result = train(recipe)
    entries = read_metrics(recipe.run_dir)
    always = {
        "loss", "loss/main", "grad_norm", "learning_rate", "batch_hash", "skipped_steps",
        "expert_load/toy", "expert_load/worst",
    }  # fmt: skip
    for entry in entries:
        assert always <= entry.keys()
    assert len({entry["batch_hash"] for entry in entries}) == 3
    # Throughput needs a step before it.
    assert "tokens_per_second" not in entries[0]
    rate = entries[1]["tokens_per_second"]
    flops = toy_model.TOY.flops_per_token(toy_model.TOY.config, 32)
    assert entries[1]["model_flops_per_second"] == pytest.approx(rate * flops)
    assert rate > 0 and list(result.metrics)[:2] == ["loss", "grad_norm"]


def test_evaluation_on_held_out_documents(tmp_path, toy):
    recipe = make_recipe(tmp_path, train__steps=4, train__eval_every=2, data__holdout=0.4)
    train(recipe)
    curve = history(recipe, "eval/loss", "eval/loss/main")
    assert len(curve["eval/loss"]) == 2
    assert curve["eval/loss"] == curve["eval/loss/main"]
    assert 3 < curve["eval/loss"][1] < curve["eval/loss"][0] < 6
    # With as many rows at a time as the step has: the same losses.
    recipe = make_recipe(
        tmp_path, "halves", train__steps=4, train__eval_every=2, data__holdout=0.4, train__accumulation=2
    )
    train(recipe)
    assert history(recipe, "eval/loss")["eval/loss"] == pytest.approx(curve["eval/loss"], rel=1e-5)


def test_a_non_finite_step_stops_the_run_and_saves_nothing(tmp_path, toy, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    recipe = make_recipe(tmp_path)
    at_steps(monkeypatch, {7: runs.mark})
    with pytest.raises(NonFiniteError, match="step 7: loss nan.*skip_nonfinite allows 0"):
        train(recipe)
    assert [p.name for p in (recipe.run_dir / "checkpoints").iterdir()] == ["5"]
    assert np.isnan(read_metrics(recipe.run_dir)[-1]["loss"])


def test_a_bad_step_due_for_saving_is_not_saved(tmp_path, toy, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    recipe = make_recipe(tmp_path, checkpoint__every=3)
    at_steps(monkeypatch, {6: runs.mark})
    with pytest.raises(NonFiniteError, match="step 6"):
        train(recipe)
    assert [p.name for p in (recipe.run_dir / "checkpoints").iterdir()] == ["3"]


def interrupt(batch):
    raise KeyboardInterrupt


def fail_to_draw(run_dir):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("action", [runs.mark, interrupt])
def test_the_loss_is_drawn_however_a_run_ends(tmp_path, toy, monkeypatch, caplog, action):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    at_steps(monkeypatch, {4: action})
    ending = KeyboardInterrupt if action is interrupt else NonFiniteError
    recipe = make_recipe(tmp_path, checkpoint__every=2)
    with pytest.raises(ending):
        train(recipe)
    assert (recipe.run_dir / "loss.png").stat().st_size > 1000

    # A picture that fails does not hide why the run did.
    monkeypatch.setattr(report, "plot_loss", fail_to_draw)
    with pytest.raises(ending):
        train(make_recipe(tmp_path, "other", checkpoint__every=2))
    assert "loss.png is not drawn: [Errno 28]" in caplog.text


def test_some_bad_steps_in_a_row_may_be_skipped(tmp_path, toy, monkeypatch):
    monkeypatch.setitem(zoo._registered, "toy-lm", runs.exploding(toy_model.TOY))
    recipe = make_recipe(tmp_path, train__skip_nonfinite=2)
    at_steps(monkeypatch, dict.fromkeys([3, 4, 8], runs.mark))
    result = train(recipe)
    assert result.step == 12 and np.isfinite(result.metrics["loss"])
    curves = history(recipe, "skipped_steps", "learning_rate", "loss")
    assert curves["skipped_steps"] == [0, 0, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0]
    assert curves["learning_rate"][2] == curves["learning_rate"][4]
    arrays = [np.asarray(x) for x in jax.tree.leaves(load_model(recipe.run_dir).up)]
    assert all(np.isfinite(x).all() for x in arrays)

    recipe = make_recipe(tmp_path, "three", train__skip_nonfinite=2)
    at_steps(monkeypatch, dict.fromkeys([7, 8, 9], runs.mark))
    with pytest.raises(NonFiniteError, match="step 9.*3 bad steps in a row"):
        train(recipe)
    assert steps_on_disk(recipe) == [5]


def test_sigterm_saves_and_stops(tmp_path, toy, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    recipe = make_recipe(tmp_path)
    at_steps(monkeypatch, {7: runs.sigterm})
    result = train(recipe)
    assert (result.step, result.preempted) == (7, True)
    assert steps_on_disk(result) == [5, 7]
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    monkeypatch.setitem(zoo._registered, "toy-lm", toy_model.TOY)
    result = train(recipe)
    assert (result.step, result.preempted) == (12, False)


def test_max_runtime_saves_and_stops(tmp_path, toy):
    recipe = make_recipe(tmp_path, train__max_runtime=1e-3)
    result = train(recipe)
    assert (result.step, result.preempted) == (1, True)
    assert steps_on_disk(result) == [1]


def test_a_finished_run_does_nothing(tmp_path, toy):
    recipe = make_recipe(tmp_path, train__steps=2)
    assert train(recipe).step == 2
    lines = read_metrics(recipe.run_dir)
    result = train(recipe)
    assert (result.step, result.preempted, result.metrics) == (2, False, {})
    assert read_metrics(recipe.run_dir) == lines


def refuse_compilation(monkeypatch):
    monkeypatch.setattr(loop, "init_state", lambda *a: pytest.fail("too late: initialising"))


def test_a_checkpoint_folder_that_cannot_be_written(tmp_path, toy, monkeypatch):
    refuse_compilation(monkeypatch)
    (tmp_path / "file").write_text("")
    recipe = make_recipe(tmp_path, checkpoint__directory=str(tmp_path / "file" / "x"))
    with pytest.raises(CheckpointError, match="file/x cannot be written"):
        train(recipe)


def refuse_programs(monkeypatch):
    monkeypatch.setattr(loop, "make_program", lambda *a: pytest.fail("too late: making the program"))


def test_a_run_folder_that_cannot_be_written(tmp_path, toy, monkeypatch):
    refuse_programs(monkeypatch)
    (tmp_path / "file").write_text("")
    recipe = make_recipe(
        tmp_path,
        metrics__directory=str(tmp_path / "file" / "run"),
        checkpoint__directory=str(tmp_path / "checkpoints"),
    )
    with pytest.raises(ValueError, match=r"file/run: cannot write metrics\.jsonl .*set metrics\.directory"):
        train(recipe)


def test_wandb_that_is_not_installed(tmp_path, toy, monkeypatch):
    refuse_programs(monkeypatch)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"asks for wandb .*install fathom-jax\[wandb\]"):
        train(make_recipe(tmp_path, metrics__wandb={"project": "p"}))


def test_data_of_another_number_of_streams_is_refused(tmp_path, toy, monkeypatch):
    train(make_recipe(tmp_path, train__steps=2, data__shards=2))
    monkeypatch.setattr(checkpoint, "load_items", lambda *a: pytest.fail("too late: reading arrays"))
    with pytest.raises(CheckpointError, match=r"1 differences:\n  data.shards: 2 streams in the checkpoint, 4 in the"):
        train(make_recipe(tmp_path, train__steps=4, data__shards=4))


def test_resuming_another_model_is_refused(tmp_path, toy, monkeypatch):
    train(make_recipe(tmp_path, train__steps=2))
    refuse_compilation(monkeypatch)
    changed = make_recipe(
        tmp_path, model__config={"mlp_size": 64}, data__seed=3, train__steps=4,
        optimizer__learning_rate=1e-3,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        train(changed)
    text = str(caught.value)
    assert "model.config.mlp_size" in text and "data.seed: 0 in the checkpoint, 3" in text
    assert "learning_rate" not in text and "steps" not in text


def test_resuming_on_other_data_is_refused(tmp_path, toy, text, monkeypatch):
    recipe = make_recipe(tmp_path, train__steps=2)
    train(recipe)
    (text / "0.txt").write_text("something else entirely " * 50)
    refuse_compilation(monkeypatch)
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        train(make_recipe(tmp_path, train__steps=4))


def test_data_and_model_out_of_step_are_refused(tmp_path, toy, monkeypatch):
    recipe = make_recipe(tmp_path, train__steps=3)
    original = data.Loader.get_state
    with monkeypatch.context() as patch:
        patch.setattr(data.Loader, "get_state", lambda self: {**original(self), "step": self.step + 1})
        train(recipe)
    with pytest.raises(CheckpointError, match="iterator is at step 4, its model at step 3"):
        train(make_recipe(tmp_path, train__steps=6))


def test_a_new_run_over_an_old_one_is_refused(tmp_path, toy, monkeypatch):
    train(make_recipe(tmp_path, train__steps=2))
    refuse_compilation(monkeypatch)
    with pytest.raises(CheckpointError, match=r"already holds steps \[2\]"):
        train(make_recipe(tmp_path, checkpoint__resume=False))


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


class SpreadOver:
    """A sharding of eight devices, as if they belonged to several processes: device i to process `owners[i]`."""

    def __init__(self, sharding, owners):
        self._sharding, self._owners = sharding, owners

    def devices_indices_map(self, shape):
        rows = self._sharding.devices_indices_map(shape).items()
        return {Device(device.id, self._owners[device.id]): index for device, index in rows}


def shards(tmp_path, mesh, owners):
    axes = {f"mesh__{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
    recipe = make_recipe(tmp_path, **axes)
    sharding = batch_sharding(make_mesh(mesh), toy_model.TOY.preset("default"))
    parts = streams.row_parts(recipe, SpreadOver(sharding, owners))
    order = sorted(set(parts.values()))
    return [(order.index(parts[process]), len(order)) for process in range(max(owners) + 1)]


@pytest.mark.parametrize(
    ("mesh", "owners", "expected"),
    [
        ({"fsdp": 8}, [0] * 8, [(0, 1)]),
        ({"fsdp": 8}, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 2), (1, 2)]),
        ({"data": 2, "fsdp": 4}, [1, 1, 1, 1, 0, 0, 0, 0], [(1, 2), (0, 2)]),
        ({"tensor": 8}, [0, 0, 0, 0, 1, 1, 1, 1], [(0, 1), (0, 1)]),
        ({"fsdp": 2, "tensor": 4}, [0, 0, 1, 1, 2, 2, 3, 3], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"fsdp": 4, "context": 2}, [0, 1, 2, 3, 4, 5, 6, 7], [(i // 2, 4) for i in range(8)]),
        # The hosts of a torus: neighbours in space, not in the mesh.
        ({"fsdp": 8}, [0, 0, 1, 1, 0, 0, 1, 1], [(0, 2), (1, 2)]),
    ],
)
def test_processes_read_the_rows_that_their_devices_hold(tmp_path, toy, mesh, owners, expected):
    assert shards(tmp_path, mesh, owners) == expected


@pytest.mark.parametrize(
    ("owners", "count", "rows"),
    [
        (range(8), None, 1),
        (range(8), 4, 2),
        (range(8), 1, 8),
        ([0, 0, 0, 0, 1, 1, 1, 1], None, 4),
        ([0, 0, 1, 1, 0, 0, 1, 1], None, 8),  # half of either stream
        ([0, 0, 1, 1, 0, 0, 1, 1], 4, 4),
    ],
)
def test_rows_that_a_process_reads_and_does_not_use_are_counted(tmp_path, toy, owners, count, rows):
    recipe = make_recipe(tmp_path, mesh__data=1, mesh__fsdp=8, mesh__tensor=1, data__shards=count)
    sharding = batch_sharding(make_mesh({"fsdp": 8}), toy_model.TOY.preset("default"))
    assert streams.rows_read(recipe, SpreadOver(sharding, owners)) == rows


@pytest.mark.parametrize(
    ("mesh", "owners", "found"),
    [
        ({"fsdp": 4, "tensor": 2}, [0, 0, 0, 1, 1, 1, 1, 0], "process 0: 0 to 1 and 2 to 3 and 6 to 7, process 1:"),
        ({"fsdp": 4, "tensor": 2}, [0, 0, 0, 0, 0, 0, 1, 1], "0 to 1 and 2 to 3 and 4 to 5, process 1: 6 to 7"),
    ],
)
def test_unequal_rows_are_refused(tmp_path, toy, mesh, owners, found):
    with pytest.raises(RecipeError, match=f"mesh: found .*{found}.*; expected that any two processes .*; fix: change"):
        shards(tmp_path, mesh, owners)


def test_data_that_ends_is_an_error():
    with pytest.raises(ValueError, match="the data ended before step 3"):
        loop.next_batch(iter([]), 3)

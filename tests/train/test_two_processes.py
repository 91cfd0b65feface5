"""Two processes: both stop at the same step, feed the same rows where they hold the same, and fail together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.distributed import ADDRESS, COUNT, INDEX
from fathom.step_folder import read_payload
from tests.train.runs import history, make_recipe, read_log, steps_on_disk, write_text

CURVES = ("loss", "grad_norm", "batch_hash")


def start(folder, count, **options):
    """Starts `count` processes of a run; gives them, and the files their results go to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.two_processes"]
    processes, results = [], []
    for index in range(count):
        results.append(folder / f"result-{index}.json")
        results[-1].unlink(missing_ok=True)
        settings = {ADDRESS: f"localhost:{port}", COUNT: str(count), INDEX: str(index)}
        processes.append(
            subprocess.Popen(
                [*command, str(results[-1]), str(folder), json.dumps(options)],
                cwd=Path(__file__).parents[2],
                env=os.environ | {"PYTHONFAULTHANDLER": "1"} | (settings if count > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes, results


def finish(started, timeout=300):
    """The results of started processes; where they hang, what each was doing."""
    processes, results = started
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # at which faulthandler tells
        pytest.fail("\n\n".join(process.communicate()[0][-6000:] for process in processes))
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads(result.read_text()) for result in results]


def run_both(folder, **options):
    return finish(start(folder, 2, devices=4, **options))


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
    for name in ("broken", "straight"):
        write_text(tmp_path / name / "text")
    one, other = run_both(tmp_path / "broken", term_step=2)
    assert one == other and one["processes"] == 2
    assert one["preempted"] and 2 <= one["step"] <= 4
    broken = make_recipe(tmp_path / "broken")
    assert steps_on_disk(broken) == [one["step"]]
    # Where a step counts as a long one no further step is dispatched.
    ends = run_both(tmp_path / "broken", term_step=7, long_step=0.0)
    assert [(end["preempted"], end["step"]) for end in ends] == [(True, 7)] * 2

    ends = run_both(tmp_path / "broken") + run_both(tmp_path / "straight")
    assert [end["step"] for end in ends] == [12] * 4
    assert len({end["loss"] for end in ends}) == 1
    straight = make_recipe(tmp_path / "straight")
    assert history(broken, *CURVES) == history(straight, *CURVES)


def test_sigterm_to_one_process_at_a_border_ends_both_there(tmp_path):
    """Nothing tells the other of it but what they agree on before the next stage; then both go on, in its documents."""
    write_text(tmp_path / "text")
    options = same_rows(1, tensor=2)
    options |= {"stages": [{"until": 2}, {"until": 6, "data": {"sequence_length": 64}, "mesh": {"tensor": 2}}]}
    ends = finish(start(tmp_path, 2, term_border=True, **options))
    assert [(end["preempted"], end["step"]) for end in ends] == [(True, 2)] * 2
    (border,) = data_states(tmp_path, 2)
    ends = finish(start(tmp_path, 2, **options))
    assert [(end["preempted"], end["step"]) for end in ends] == [(False, 6)] * 2
    (state,) = data_states(tmp_path, 6)
    assert state["start"] == border["documents"] < state["documents"]


def same_rows(devices, **axes):
    """Options of a short run on a mesh whose axes of more than one device cut no rows."""
    mesh = {f"mesh__{axis}": axes.get(axis, 1) for axis in ("data", "fsdp", "tensor", "context")}
    return {"devices": devices, "recipe": {"train__steps": 6, "checkpoint__every": 3, **mesh}}


def data_states(folder, step):
    return read_payload(folder / "run" / "checkpoints" / str(step))["data_states"]


def test_processes_that_hold_the_same_rows_read_the_same_rows(tmp_path):
    """`tensor` spans both processes: the run is that of one process, bit for bit, also when it is interrupted."""
    for name in ("one", "two"):
        write_text(tmp_path / name / "text")
    alone = start(tmp_path / "one", 1, **same_rows(2, tensor=2))
    both = same_rows(1, tensor=2)
    both["recipe"]["train__stop_at"] = 3
    assert [end["step"] for end in finish(start(tmp_path / "two", 2, **both))] == [3, 3]
    states = data_states(tmp_path / "two", 3)
    assert [state["step"] for state in states] == [3]  # one stream, which both read

    ends = finish(alone) + finish(start(tmp_path / "two", 2, **same_rows(1, tensor=2)))
    assert [(end["processes"], end["step"]) for end in ends] == [(1, 6), (2, 6), (2, 6)]
    one, two = (history(make_recipe(tmp_path / name), *CURVES) for name in ("one", "two"))
    assert one == two
    assert data_states(tmp_path / "two", 6) == data_states(tmp_path / "one", 6)


@pytest.mark.parametrize(
    ("devices", "axis", "tolerance"),
    # The sums of eight devices are taken in another order when four of them are in each process.
    [(1, "context", 0), (4, "tensor", 1e-6)],
)
def test_rows_are_the_same_on_other_meshes(tmp_path, devices, axis, tolerance):
    for name in ("one", "two"):
        write_text(tmp_path / name / "text")
    alone = start(tmp_path / "one", 1, **same_rows(2 * devices, **{axis: 2 * devices}))
    finish(start(tmp_path / "two", 2, **same_rows(devices, **{axis: 2 * devices})))
    finish(alone)
    one, two = (history(make_recipe(tmp_path / name), *CURVES) for name in ("one", "two"))
    assert one["step"] == two["step"] == [1, 2, 3, 4, 5, 6]
    assert one["batch_hash"] == two["batch_hash"]
    for name in ("loss", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=tolerance, abs=0)


TALKING = {"jit(train_step)", "jit(route)", "jit(evaluate)"}
"""Programs of the model, in which processes wait for each other."""
V4 = {
    "attention_kinds": ["sliding"] * 2, "compress_ratios": [0] * 2, "router_kinds": ["learned"] * 2,
    "num_mtp_layers": 0, "hidden_size": 32, "q_lora_rank": 16, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("axis", "model"),
    [
        ("fsdp", {}),
        pytest.param(
            "expert", {"model__name": "deepseek-v4-tiny", "model__config": V4}, id="v4", marks=pytest.mark.slow
        ),
    ],
)
def test_experts_are_chosen_ahead_as_in_one_process(tmp_path, axis, model):
    """What routes and what takes its choices are compiled before either is called."""
    options = same_rows(1, **{axis: 2})
    options["recipe"] |= model | {
        f"mesh__{axis}": 2, "data__shards": 2, "train__anticipatory_routing": {"delay": 2, "always": True},
    }  # fmt: skip
    for name in ("one", "two"):
        write_text(tmp_path / name / "text")
    alone = start(tmp_path / "one", 1, **options | {"devices": 2})
    ends = finish(start(tmp_path / "two", 2, **options)) + finish(alone)
    assert [(end["processes"], end["step"]) for end in ends] == [(2, 6), (2, 6), (1, 6)]
    assert not TALKING & {name for end in ends[:2] for name in end["unguarded"]}
    one, two = (history(make_recipe(tmp_path / name), *CURVES) for name in ("one", "two"))
    assert one["step"] == two["step"] == [1, 2, 3, 4, 5, 6] and one["batch_hash"] == two["batch_hash"]
    for name in ("loss", "grad_norm"):
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=0)


@pytest.mark.slow
def test_a_process_that_compiles_for_long_is_waited_for(tmp_path):
    """For longer than the 30 seconds after which gloo gives it up."""
    write_text(tmp_path / "text")
    ends = finish(start(tmp_path, 2, devices=4, late=40, recipe={"train__steps": 2}))
    assert [end["step"] for end in ends] == [2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"context": 8}, {"tensor": 2, "context": 4}], ids=["context", "mixed"])
def test_v4_cut_over_two_processes_trains_as_in_one(tmp_path, mesh):
    """Packed rows, indexers, MTP: losses of three steps within 1e-5. About three minutes each. Neither mesh cuts rows,
    of which each process would read its own."""
    layers = {
        "attention_kinds": ["sliding", "csa", "hca"],
        "compress_ratios": [0, 4, 16],
        "router_kinds": ["hash", "learned", "learned"],
    }
    recipe = {
        "model__name": "deepseek-v4-tiny", "model__config": layers, "data__sequence_length": 128,
        "data__packing": "first_fit", "train__steps": 3, "checkpoint__every": 3, "optimizer__learning_rate": 1e-3,
        **{f"mesh__{axis}": mesh.get(axis, 1) for axis in ("data", "fsdp", "expert", "tensor", "context")},
    }  # fmt: skip
    for name in ("one", "two"):
        write_text(tmp_path / name / "text", files=20)
    finish(start(tmp_path / "one", 1, devices=8, recipe=recipe), timeout=600)
    ends = finish(start(tmp_path / "two", 2, devices=4, recipe=recipe), timeout=600)
    assert [(end["processes"], end["step"]) for end in ends] == [(2, 3), (2, 3)]
    names = ("loss/main", "loss/mtp", "loss/indexer", "grad_norm")
    one, two = (history(make_recipe(tmp_path / name), "batch_hash", *names) for name in ("one", "two"))
    assert one["step"] == two["step"] == [1, 2, 3] and one["batch_hash"] == two["batch_hash"]
    for name in names:
        assert two[name] == pytest.approx(one[name], rel=1e-5, abs=0), name


def test_both_go_back_before_a_spike_that_one_of_them_read(tmp_path):
    """And on with experts chosen ahead for two steps, and evaluations: all of which they compile together."""
    write_text(tmp_path / "text")
    recipe = {
        "train__spike": {"factor": 20.0, "window": 4}, "train__anticipatory_routing": {"after_spike": 2},
        "train__eval_every": 6, "data__holdout": 0.2, "mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 1,
    }  # fmt: skip
    one, other = finish(start(tmp_path, 2, devices=1, poisoned=1, recipe=recipe))
    assert one == other and one["step"] == 12 and not TALKING & set(one["unguarded"])
    assert history(make_recipe(tmp_path))["step"] == sorted([*range(1, 13), 6, 12])  # with evaluations at 6 and 12
    assert any("rollback 1 of 3" in line for line in read_log(tmp_path / "run"))
    assert [state["step"] for state in data_states(tmp_path, 12)] == [15, 15]


def test_what_one_process_meets_is_an_error_in_both(tmp_path):
    write_text(tmp_path / "text")
    recipe = {"train__steps": 2, "mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 1}
    one, other = finish(start(tmp_path, 2, devices=1, hinder=True, recipe=recipe), timeout=120)
    (metrics, step), (metrics_elsewhere, step_elsewhere) = one["errors"], other["errors"]
    assert metrics[0] == metrics_elsewhere[0] == "ValueError"
    assert "file/run: cannot write metrics.jsonl" in metrics[1]
    assert metrics_elsewhere[1] == f"process 0: {metrics[1]}"
    assert step[0] == step_elsewhere[0] == "CheckpointError"
    assert "checkpoints/2 cannot be read here and now (ValueError: PERMISSION_DENIED" in step_elsewhere[1]
    assert step[1] == f"process 1: {step_elsewhere[1]}"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]

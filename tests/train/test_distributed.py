"""When a process looks for others, and what it says of settings that make no sense; they meet in test_two_processes."""

from __future__ import annotations

import importlib.util
import os

import jax
import pytest

from fathom import distributed
from fathom.distributed import (
    ADDRESS,
    COUNT,
    INDEX,
    explicit_settings,
    find_cluster,
    initialize_distributed,
    process_count,
)

ALL = {ADDRESS: "host-0:8476", COUNT: "4", INDEX: "3"}
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
}


@pytest.fixture
def calls(monkeypatch):
    """What jax.distributed.initialize is called with, in an environment without clusters."""
    made = []
    for name in os.environ:
        if name.startswith(("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: made.append(arguments))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(made))
    return made


def set_all(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_a_process_that_is_alone_does_nothing(calls, monkeypatch):
    assert initialize_distributed() is False
    set_all(monkeypatch, {**ALL, COUNT: "1", INDEX: "0"})
    assert initialize_distributed() is False
    assert calls == []


def test_the_three_variables_decide(calls, monkeypatch):
    set_all(monkeypatch, {**SRUN, **ALL})
    assert initialize_distributed() is True
    wanted = {
        "coordinator_address": "host-0:8476",
        "num_processes": 4,
        "process_id": 3,
        "cluster_detection_method": "deactivate",
    }
    assert calls == [wanted]
    assert initialize_distributed() is True  # the second call does nothing
    assert calls == [wanted]


def test_a_known_cluster_is_left_to_jax(calls, monkeypatch):
    set_all(monkeypatch, SRUN)
    assert initialize_distributed() is True
    assert calls == [{}]


@pytest.mark.parametrize("missing", [[ADDRESS], [COUNT], [INDEX], [ADDRESS, INDEX]])
def test_missing_settings_are_named(calls, monkeypatch, missing):
    set_all(monkeypatch, {name: value for name, value in ALL.items() if name not in missing})
    with pytest.raises(ValueError, match=f"set all of {ADDRESS}, {COUNT}, {INDEX}, or none") as caught:
        initialize_distributed()
    assert [name for name in ALL if f"{name} is not set" in str(caught.value)] == missing
    assert calls == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({ADDRESS: "host-0"}, "JAX_COORDINATOR_ADDRESS is 'host-0', expected host:port of process 0"),
        ({COUNT: "many"}, "JAX_NUM_PROCESSES is 'many', expected a whole number of at least 1"),
        ({COUNT: "0"}, "JAX_NUM_PROCESSES is '0'"),
        ({INDEX: "4"}, "JAX_PROCESS_ID is '4', expected a whole number from 0, below JAX_NUM_PROCESSES"),
        ({INDEX: "-1"}, "JAX_PROCESS_ID is '-1'"),
        ({ADDRESS: "host-0", INDEX: "x"}, "JAX_COORDINATOR_ADDRESS is 'host-0'.*; JAX_PROCESS_ID is 'x'"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        explicit_settings({**ALL, **changes})


@pytest.mark.parametrize(
    ("environ", "count"), [(ALL, 4), (SRUN, 2), ({"OMPI_COMM_WORLD_SIZE": "3"}, 3), ({**SRUN, **ALL}, 4)]
)
def test_the_number_of_processes_is_known_before_devices_are_used(calls, monkeypatch, environ, count):
    set_all(monkeypatch, environ)
    assert process_count() == 1
    calls.append("joined")
    assert process_count() == count


def test_a_number_of_processes_that_is_not_known(calls):
    calls.append("joined")
    with pytest.raises(ValueError, match="not known before devices are used; set JAX_COORDINATOR_ADDRESS"):
        process_count()


def test_empty_settings_are_none():
    assert explicit_settings(dict.fromkeys(ALL, "")) is None


def test_others_that_cannot_be_reached(calls, monkeypatch):
    def fail(**arguments):
        raise RuntimeError("DEADLINE_EXCEEDED: no answer")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    set_all(monkeypatch, ALL)
    with pytest.raises(ValueError, match="process 3 of 4 cannot join the run at host-0:8476: DEADLINE_EXCEEDED"):
        initialize_distributed()


@pytest.mark.parametrize(
    ("environ", "cluster"),
    [
        ({}, None),
        (SRUN, "Slurm"),
        ({**SRUN, "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),  # the shell of salloc -n 2
        ({name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID")}, None),  # sbatch, no srun
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "0"}, "Cloud TPU"),
        ({"TPU_PROCESS_ADDRESSES": "t-0:8476,t-1:8476"}, "Cloud TPU"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, "Cloud TPU"),
        ({"TPU_ML_PLATFORM": "JAX"}, "a Cloud TPU VM"),
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_only_an_environment_of_several_is_a_cluster(environ, cluster):
    found = find_cluster(environ)
    assert found is None if cluster is None else found.startswith(cluster)


@pytest.mark.parametrize("installed", [True, False])
def test_an_indexed_job_of_kubernetes(monkeypatch, caplog, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
    assert find_cluster(environ) == ("Kubernetes" if installed else None)
    assert ("pod 2 of an indexed Kubernetes Job, and trains alone" in caplog.text) is not installed


def test_nothing_here_starts_a_backend(calls, monkeypatch):
    """Afterwards devices can still be simulated."""
    for name in ("devices", "device_count", "process_index", "process_count"):
        monkeypatch.setattr(jax, name, lambda *a: pytest.fail("a backend was used"))
    set_all(monkeypatch, ALL)
    assert distributed.initialize_distributed() is True

"""Several processes as one run: finds out whether there are others, and joins them before jax uses a device."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax

logger = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
SETTINGS = {ADDRESS: "host:port of process 0", COUNT: "how many processes there are", INDEX: "which one this is"}

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
"""What jax reads of Slurm; srun sets all of them."""


def initialize_distributed() -> bool:
    """Joins the other processes of the run, where the environment says that there are some.

    It says so by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as a cluster in which jax finds
    these by itself: Cloud TPU, Slurm, Open MPI, an indexed Job of Kubernetes. To be called before anything uses a
    device; a second call does nothing. CPUs talk to each other through gloo unless
    JAX_CPU_COLLECTIVES_IMPLEMENTATION names something else.

    Returns:
      True when this process is one of several, False when it is alone (and nothing was done).

    Raises:
      ValueError: for settings that are incomplete or make no sense, and when the others cannot be reached.
    """
    if jax.distributed.is_initialized():
        return True
    settings = explicit_settings(os.environ)
    if settings is None:
        cluster = find_cluster(os.environ)
        if cluster is None:
            return False
        settings, who = {}, f"the environment is that of {cluster}, and this process"
    elif settings["num_processes"] == 1:
        return False
    else:
        who = f"process {settings['process_id']} of {settings['num_processes']}"
        # What is said outright is not to be mixed with what a cluster says.
        settings["cluster_detection_method"] = "deactivate"
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(**settings)
    except Exception as error:
        where = f" at {settings['coordinator_address']}" if settings else ""
        raise ValueError(
            f"{who} cannot join the run{where}: {error}; start all processes with the same {ADDRESS} and {COUNT} and "
            f"each with its own {INDEX}, let process 0 be reached there, and call this before anything uses jax"
        ) from error
    logger.info("%s has joined the run", who)
    return True


def process_count() -> int:
    """How many processes the run has, without starting a backend as `jax.process_count` does.

    Raises:
      ValueError: when this process has joined others and nothing in the environment says how many.
    """
    if not jax.distributed.is_initialized():
        return 1
    settings = explicit_settings(os.environ)
    if settings is not None:
        return settings["num_processes"]
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ValueError(f"how many processes there are is not known before devices are used; set {', '.join(SETTINGS)}")


def explicit_settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize out of the three variables, None when none of them is set.

    Raises:
      ValueError: when only some are set, or one makes no sense; all problems at once.
    """
    found = {name: environ.get(name, "").strip() for name in SETTINGS}
    if not any(found.values()):
        return None
    problems = [f"{name} is not set, expected {text}" for name, text in SETTINGS.items() if not found[name]]
    host, _, port = found[ADDRESS].rpartition(":")
    if found[ADDRESS] and not (host and port.isdigit()):
        problems.append(f"{ADDRESS} is {found[ADDRESS]!r}, expected {SETTINGS[ADDRESS]}")
    count = int(found[COUNT]) if found[COUNT].isdigit() else 0
    if found[COUNT] and count < 1:
        problems.append(f"{COUNT} is {found[COUNT]!r}, expected a whole number of at least 1")
    index_fits = found[INDEX].isdigit() and (count < 1 or int(found[INDEX]) < count)
    if found[INDEX] and not index_fits:
        problems.append(f"{INDEX} is {found[INDEX]!r}, expected a whole number from 0, below {COUNT}")
    if problems:
        raise ValueError("; ".join([*problems, f"set all of {', '.join(SETTINGS)}, or none for a single process"]))
    return {"coordinator_address": found[ADDRESS], "num_processes": count, "process_id": int(found[INDEX])}


def find_cluster(environ: Mapping[str, str]) -> str | None:
    """The cluster in which jax will find several processes by itself, None where this process is alone.

    jax would also take a single host, or a shell that Slurm gave several tasks, for a cluster, and then wait for
    others that never come: here the variables must speak of several.
    """

    def number(name: str, default: int = 1) -> int:
        text = environ.get(name, "")
        return int(text) if text.isdigit() else default

    if environ.get("OMPI_MCA_orte_hnp_uri") and number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if all(environ.get(name) for name in SLURM):
        tasks = number("SLURM_NTASKS")
        if min(tasks, number("SLURM_STEP_NUM_TASKS", tasks)) > 1:
            return "Slurm"
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if number("MEGASCALE_NUM_SLICES") > 1 or (hosts and "," in hosts):
        return "Cloud TPU"
    if hosts:
        return None
    # A TPU VM of Compute Engine: jax has found chips when it was imported, the metadata server knows the hosts.
    if environ.get("TPU_ML_PLATFORM") == "JAX" and not environ.get("TPU_SKIP_MDS_QUERY"):
        return "a Cloud TPU VM (for one that is alone and has no metadata server: TPU_SKIP_MDS_QUERY=1)"
    if environ.get("KUBERNETES_SERVICE_HOST") and environ.get("JOB_COMPLETION_INDEX"):
        if importlib.util.find_spec("kubernetes") is not None:
            return "Kubernetes"
        logger.warning(
            "this is pod %s of an indexed Kubernetes Job, and trains alone: install jax[k8s], or set %s",
            environ["JOB_COMPLETION_INDEX"], ", ".join(SETTINGS),
        )  # fmt: skip
    return None

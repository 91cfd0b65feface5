"""`fathom doctor`: versions, devices, memory, combinations known to be bad, and what to do."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from fathom.host_memory import host_memory

PACKAGES = (
    "fathom-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_dtypes",
    "pydantic",
)
OPTIONAL_PACKAGES = ("libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "wandb", "pyarrow")
MINIMUM = {
    "jax": "0.10.2",
    "flax": "0.12.8",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "grain": "0.2.18",
}
LOW_MEMORY = 4 * 2**30  # bytes; compiling the tiny model takes about two gigabytes


class Finding(NamedTuple):
    """One line of the report. level: "ok", "info", "warn" (works, not as it should) or "bad"."""

    level: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        tail = f"\n      -> {self.fix}" if self.fix else ""
        return f"{self.level:<5} {self.text}{tail}"


def version_of(text: str) -> tuple[int, ...]:
    """Leading numbers of a version, "0.12.0.1" -> (0, 12, 0, 1); suffixes such as rc1 end it."""
    numbers = []
    for part in text.split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        numbers.append(int(match[0]))
        if match[0] != part:
            break
    return tuple(numbers)


def installed(names: Sequence[str]) -> dict[str, str]:
    """Package -> version of those that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


# --- Combinations --------------------------------------------------------------------------------
# Each looks at installed versions (package -> version) and the platforms of the devices.

Check = Callable[[Mapping[str, str], Sequence[str]], Finding | None]


def jax_0_11_0(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """jax 0.11.0 breaks sharded training in several libraries built on it."""
    if version_of(versions.get("jax", ""))[:3] != (0, 11, 0):
        return None
    return Finding("bad", "jax 0.11.0 breaks sharded training", "pip install 'jax>=0.11.1'")


def different_jaxlib(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """jax and jaxlib are released in pairs."""
    jax, jaxlib = versions.get("jax"), versions.get("jaxlib")
    if not jax or not jaxlib or version_of(jax)[:3] == version_of(jaxlib)[:3]:
        return None
    text = f"jax {jax} with jaxlib {jaxlib}: they are made in pairs"
    return Finding("bad", text, f"pip install jax=={jax} jaxlib=={jax}")


def slow_cuda_scatter(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """jaxlib 0.10.2 to 0.11.0 on CUDA: a float32 scatter-add became a compare-and-swap loop."""
    if not {"gpu", "cuda"} & set(platforms):
        return None
    if not (0, 10, 2) <= version_of(versions.get("jaxlib", ""))[:3] <= (0, 11, 0):
        return None
    text = (
        f"jaxlib {versions['jaxlib']} on CUDA: a contended float32 scatter-add (gradients of "
        "sparse attention and of the embedding) is 450 to 2000 times slower than it should be"
    )
    return Finding("warn", text, "use Python 3.12 with jax >= 0.11.1")


def flax_too_old_for_jax(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """flax up to 0.12.8 uses a class that jax 0.11.1 removed."""
    jax, flax = version_of(versions.get("jax", "")), version_of(versions.get("flax", ""))
    if not jax or not flax or jax < (0, 11, 1) or flax > (0, 12, 8):
        return None
    text = f"flax {versions['flax']} cannot work with jax {versions['jax']}"
    return Finding("bad", text, "pip install 'flax>=0.12.12' (Python 3.12), or 'jax==0.10.2'")


def flax_too_new_for_jax(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """flax 0.12.12 needs jax 0.11.1."""
    jax, flax = version_of(versions.get("jax", "")), version_of(versions.get("flax", ""))
    if not jax or not flax or jax >= (0, 11, 1) or flax < (0, 12, 12):
        return None
    text = f"flax {versions['flax']} needs jax >= 0.11.1, found {versions['jax']}"
    return Finding("bad", text, "pip install 'flax==0.12.8', or jax >= 0.11.1 on Python 3.12")


def other_libtpu(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """jax names the libtpu it was made with; another one compiles, and some of it fails."""
    found = versions.get("libtpu")
    wanted = libtpu_of_jax() if found else None
    if not found or not wanted or found.startswith(wanted):
        return None
    level = "bad" if "tpu" in platforms else "warn"
    text = f"libtpu {found}, jax {versions.get('jax')} was made with {wanted}*"
    return Finding(level, text, f"pip install 'libtpu=={wanted}*' (or 'jax[tpu]')")


def libtpu_of_jax() -> str | None:
    """The start of the libtpu version that the installed jax asks for, such as "0.0.42."."""
    try:
        requirements = metadata.requires("jax") or []
    except metadata.PackageNotFoundError:
        return None
    for requirement in requirements:
        match = re.match(r"libtpu\s*==\s*([\d.]+)\*", requirement)
        if match:
            return match[1]
    return None


def cuda_plugin_differs(versions: Mapping[str, str], platforms: Sequence[str]) -> Finding | None:
    """The CUDA plugin belongs to one jaxlib."""
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        plugin, jaxlib = versions.get(name), versions.get("jaxlib")
        if plugin and jaxlib and version_of(plugin)[:3] != version_of(jaxlib)[:3]:
            text = f"{name} {plugin} with jaxlib {jaxlib}"
            return Finding("bad", text, f"pip install '{name}=={jaxlib}'")
    return None


KNOWN_BAD: tuple[Check, ...] = (
    jax_0_11_0,
    different_jaxlib,
    slow_cuda_scatter,
    flax_too_old_for_jax,
    flax_too_new_for_jax,
    other_libtpu,
    cuda_plugin_differs,
)


def check_versions(versions: Mapping[str, str], platforms: Sequence[str]) -> list[Finding]:
    """What is missing, too old, or a combination known to be bad."""
    findings = []
    for name in PACKAGES:
        if name not in versions:
            findings.append(Finding("bad", f"{name} is not installed", f"pip install {name}"))
        elif version_of(versions[name]) < version_of(MINIMUM.get(name, "0")):
            text = f"{name} {versions[name]} is older than {MINIMUM[name]}"
            findings.append(Finding("bad", text, f"pip install '{name}>={MINIMUM[name]}'"))
    findings += [f for f in (check(versions, platforms) for check in KNOWN_BAD) if f is not None]
    return findings


# --- The machine ---------------------------------------------------------------------------------


def examine() -> list[Finding]:
    """Everything that `fathom doctor` prints, in order. Starts jax's backends."""
    versions = installed((*PACKAGES, *OPTIONAL_PACKAGES))
    python = platform.python_version()
    findings = [Finding("ok", f"Python {python} on {platform.system()} {platform.machine()}")]
    findings += [Finding("ok", f"{name} {version}") for name, version in versions.items()]
    devices, platforms = _devices()
    findings += check_versions(versions, platforms)
    findings += devices
    findings += _unused_accelerators(platforms)
    findings.append(_host_memory())
    findings += _environment()
    if not any(finding.level in ("warn", "bad") for finding in findings):
        findings.append(Finding("ok", "nothing known to be bad"))
    return findings


def _devices() -> tuple[list[Finding], list[str]]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a broken installation raises is the finding
        first = (str(error).strip().splitlines() or ["no message"])[0]
        text = f"jax has no devices: {type(error).__name__}: {first}"
        fix = "unset JAX_PLATFORMS, or install jax for this machine: fathom-jax[tpu] or [cuda]"
        return [Finding("bad", text, fix)], []
    kinds: dict[str, list] = {}
    for device in devices:
        kinds.setdefault(f"{device.platform} ({device.device_kind})", []).append(device)
    findings = []
    for kind, members in kinds.items():
        stats = members[0].memory_stats() or {}
        limit = stats.get("bytes_limit")
        memory = f", {limit / 2**30:.1f} GiB each" if limit else ""
        findings.append(Finding("ok", f"{len(members)} x {kind}{memory}"))
    if jax.process_count() > 1:
        findings.append(Finding("ok", f"process {jax.process_index()} of {jax.process_count()}"))
    return findings, sorted({device.platform for device in devices})


def _unused_accelerators(platforms: Sequence[str]) -> list[Finding]:
    """Hardware that the operating system shows and jax does not use."""
    findings = []
    has_nvidia = Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None
    if has_nvidia and not {"gpu", "cuda"} & set(platforms):
        text = "an NVIDIA GPU is there and jax does not use it"
        fix = "pip install 'fathom-jax[cuda]', unset JAX_PLATFORMS"
        findings.append(Finding("warn", text, fix))
    has_tpu = any(Path("/dev").glob("accel[0-9]*"))
    if has_tpu and "tpu" not in platforms:
        text = "a TPU is there and jax does not use it"
        findings.append(Finding("warn", text, "pip install 'fathom-jax[tpu]', unset JAX_PLATFORMS"))
    return findings


def _host_memory() -> Finding:
    """Memory of the machine, or of the container where that is less."""
    total = host_memory()
    if total is None:
        return Finding("info", "host memory is unknown on this system")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = f"{cores} CPU cores, {total / 2**30:.1f} GiB host memory"
    if total < LOW_MEMORY:
        return Finding("warn", line, "compiling may run out of memory below 4 GiB")
    return Finding("ok", line)


def _environment() -> list[Finding]:
    """Environment variables that change what jax does."""
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_ENABLE_X64")
    findings = [
        Finding("info", f"{name}={os.environ[name]}") for name in names if os.environ.get(name)
    ]
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        text = "JAX_ENABLE_X64 is on: constants become float64 and results change"
        findings.append(Finding("warn", text, "unset JAX_ENABLE_X64"))
    return findings

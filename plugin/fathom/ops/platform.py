"""What kind of device a program is traced for."""

from __future__ import annotations

import jax


def program_platform() -> str:
    """ "cpu", "gpu" or "tpu": the mesh's platform, whose devices need not be here, or else the process's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform

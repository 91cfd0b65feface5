"""Compiled programs on disk, so that a process that resumes a run need not compile them again."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from fathom.step_folder import absolute
from fathom.train.checkpoint_format import agree


@contextlib.contextmanager
def compilation_cache(folder: str | None) -> Iterator[None]:
    """jax's persistent compilation cache in `folder`, for as long as the context lasts; None changes nothing.

    Every program goes there, however quickly it was compiled: a start compiles hundreds of small ones. Whoever can
    write to the folder can have this process run what they like.

    Raises:
      ValueError: in all processes, when one cannot write to the folder.
    """
    if folder is None:
        yield
        return
    path = absolute(folder)

    def probe() -> None:
        file = path / f".probe-{uuid.uuid4().hex}"
        try:
            path.mkdir(parents=True, exist_ok=True)
            file.write_text("fathom")
            file.unlink()
        except OSError as error:
            raise ValueError(
                f"train.compilation_cache: {path} cannot be written ({error}); set it to a folder that can be, or "
                "leave it out to compile anew at every start"
            ) from error

    agree(probe)
    settings = {
        "jax_compilation_cache_dir": str(path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _use(settings)
    try:
        yield
    finally:
        _use(before)


def _use(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()  # jax looks at the folder once, at its first program

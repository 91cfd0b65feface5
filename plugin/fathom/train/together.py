"""What processes on CPUs must do before they first talk in a step: all have compiled it.

gloo gives up on a process that comes 30 seconds after the others. Each compiles for itself, and on a busy machine that
takes one of them longer by more than that.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
from orbax.checkpoint import multihost

from fathom.mesh import sharding_scope
from fathom.recipe import Recipe
from fathom.train.step import Program

COMPILE_SECONDS = 3600
"""How long the first to have compiled waits for the last."""


def compile_together(program: Program, recipe: Recipe, ways: Collection[bool]) -> None:
    """Compiles what a stage's steps call, none of which is then compiled when it is called, and waits until all
    processes have.

    It does nothing for a single process, and nothing on accelerators, whose networks wait as long as it takes. The
    processes wait at jax's coordinator, which needs no collective.

    Args:
      ways: whether the steps anticipate their routing, False and True where some do (`Schedule.ways`).
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    state, batch = program.state, program.abstract_batch(recipe.data.batch_size, recipe.data.sequence_length)
    with sharding_scope(program.mesh, program.rules):
        if False in ways:
            program.step.lower(state, batch).compile()
        if True in ways:
            program.step.lower(state, {**batch, "routing": _compile_route(program, batch)}).compile()
        if ways and recipe.train.eval_every:
            program.evaluate.lower(state, batch).compile()
    multihost.get_barrier_sync_fn()(key="fathom_compiled", timeout_ms=COMPILE_SECONDS * 1000)


def _compile_route(program: Program, batch: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """What the route program gives, laid out as XLA chose to."""
    lowered = program.route.lower(program.state, batch)

    def struct(info, sharding):
        return jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=sharding)

    return jax.tree.map(struct, lowered.out_info, lowered.compile().output_shardings)

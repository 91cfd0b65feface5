"""A run's stages (`fathom.recipe_stages`): which one a step belongs to, and what crosses from one to the next.

Weights, router biases, the step number and the random numbers go on as they are, onto whatever mesh the next stage has.
So does the optimizer, but for parameters that begin to train: their moments begin at zero. Of parameters that stop
training it forgets the moments, unless the stage holds them for a later one (`train.hold_moments`). Rows are the
stage's own; documents go on behind those that were read (`fathom.train.streams.RowStreams.follow`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fathom.mesh import sharding_scope
from fathom.recipe import Recipe
from fathom.train.optimizer import carry_moments
from fathom.train.state import TrainState
from fathom.train.step import Program, make_program


class OtherStageError(Exception):
    """The checkpoint to go on from belongs to another stage than the one that was asked for.

    Attributes:
      number: its stage.
    """

    def __init__(self, number: int):
        super().__init__(f"the checkpoint belongs to stage {number}")
        self.number = number


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      recipe: its own. number: counted from 0. first: steps done when it begins, at whichever mesh.
      last: steps done when it ends. previous: the recipe of the stage before it, None for the first.
    """

    recipe: Recipe
    number: int
    first: int
    last: int
    previous: Recipe | None

    def start_program(self, program: Program) -> Program:
        """What describes a state saved where this stage begins, on this stage's mesh."""
        if self.previous is None or self._same_parameters():
            return program
        before = self.previous.model_copy(update={"mesh": self.recipe.mesh})
        return make_program(before, program.mesh)

    def _same_parameters(self) -> bool:
        before, now = self.previous.train, self.recipe.train
        return (before.parameter_stage, bool(before.hold_moments)) == (now.parameter_stage, bool(now.hold_moments))

    def begin(self, program: Program, state: TrainState) -> TrainState:
        """The state with which the stage begins, from that of the stage before it, whose arrays are given up."""
        if self.previous is None or self._same_parameters():
            return state
        return _with_own_optimizer(program, state)


def stages_of(recipes: Sequence[Recipe], ends: Sequence[int]) -> list[Stage]:
    """The stages of a run from their recipes and the steps where they end."""
    firsts, before = [0, *ends], [None, *recipes]
    return [Stage(recipe, i, firsts[i], ends[i], before[i]) for i, recipe in enumerate(recipes)]


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that makes the step after `step`; the last one when all are done."""
    return next((stage for stage in stages if step < stage.last), stages[-1])


def _with_own_optimizer(program: Program, state: TrainState) -> TrainState:
    """The state with the optimizer of `program`; moments of parameters that go on training, and their counts, stay."""
    with sharding_scope(program.mesh, program.rules):
        fresh = program.start(state.params, state.model_state, state.rng)
    return dataclasses.replace(fresh, opt_state=carry_moments(state.opt_state, fresh.opt_state), step=state.step)

"""Activation checkpointing of a block, by policy name."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_policies

_POLICIES = {
    "full": checkpoint_policies.nothing_saveable,
    "unit": checkpoint_policies.nothing_saveable,
    "dots": checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": checkpoint_policies.save_only_these_names("attention", "selected_entries"),
    "sublayers": checkpoint_policies.save_only_these_names("attention", "selected_entries", "experts"),
}


def remat(function: Callable, policy: str) -> Callable:
    """`function` with its activations recomputed in the backward, except what the policy saves.

    Args:
      policy: "none" saves everything; "full" saves only the inputs; "dots" saves matrix products without batch
        dimensions; "attention" saves the attention outputs and the selected entries, "sublayers" those of the experts
        too; "unit" is "full", and `remat_unit` does the rest.
    """
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=_POLICIES[policy])


def remat_unit(step: Callable, policy: str) -> Callable:
    """The step of a scan over units of several blocks: with "unit" only what enters the unit is saved, and all of its
    blocks but the last run once more in the backward."""
    if policy != "unit":
        return step
    # Within a scan nothing can be shared with the forward: no barriers are needed.
    return jax.checkpoint(step, policy=_POLICIES[policy], prevent_cse=False)


def forward_passes(policy: str, in_units: float = 0.0) -> float | None:
    """How often the products of attention and experts run forward in a step, on average over the blocks: once, once
    more in the backwards of the two themselves, which keep nothing wide, and as often as the policy has whole blocks
    made again.

    Args:
      in_units: the share of blocks that "unit" has made again with their unit: all of one but its last.

    Returns:
      None for policies that keep a part of the products only.
    """
    return {"none": 2.0, "sublayers": 2.0, "full": 3.0, "unit": 3.0 + in_units}.get(policy)

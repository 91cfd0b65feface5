#!/usr/bin/env python
"""How well an indexer that trains alone comes to foresee the attention: a curve on held-out text, tiny V4, one CPU.

    scripts/bench/indexer_training.py FOLDER [--dense 100] [--steps 200] [--length 1024]

First the model trains with dense attention, then its indexers alone (stage "indexer-warmup"). The overlap is the share
of the top-k entries by attention (summed over heads) that are among the indexer's top-k, over queries that see more
than k; chance is the mean of k / entries seen. Writes FOLDER/overlap.png.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib

import fathom
from fathom.layers.indexer import BaseIndexer, Choice, TeacherParts
from fathom.mesh import make_mesh, sharding_scope
from fathom.ops.indexer import exact_topk, indexer_scores
from fathom.train.checkpoint_model import start_from
from fathom.train.loop import next_batch, open_loader, to_devices
from fathom.train.step import make_program

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


def recipe_of(folder: Path, stage: str, steps: int, length: int, *more: str):
    """The tiny model on one device, rows of `length` tokens, 4,096 tokens a step."""
    common = [
        f"train.stage={stage}",
        f"train.steps={steps}",
        f"data.sequence_length={length}",
        f"data.batch_size={4096 // length}",
        "mesh={data: 1, fsdp: 1, expert: 1, simulated_devices: null}",
        f"metrics.directory={folder / stage}",
        f"optimizer.warmup_steps={min(15, steps // 4)}",
        f"optimizer.decay_steps={steps // 4}",
        "train.eval_every=0",
        f"checkpoint.every={steps}",
    ]
    return fathom.load_recipe("tiny-v4-cpu", [*common, *more])


def overlap(self, choice: Choice, x, qr, inputs, teacher: TeacherParts, place) -> jax.Array:
    """In the place of `BaseIndexer.loss`: its mean overlap with the attention over the queries of a batch."""
    if choice.k_BEH is None:
        return jnp.zeros(())
    visible, k = choice.selection, overlap.top_k
    q, weights = self.queries(x, qr, self.tables(inputs))
    scores = indexer_scores(q, choice.k_BEH, weights)
    products = jnp.einsum("bsnh,beh->bsne", teacher.make_queries(teacher.inputs), teacher.keys_BEH) * teacher.scale
    p = jnp.exp(products - teacher.lse_BSN[..., None]).sum(axis=2)
    ours, theirs = exact_topk(scores, visible, k), exact_topk(p, visible, k)
    found = (ours[..., :, None] == theirs[..., None, :]).any(axis=-1).mean(axis=-1)
    counts = visible.end_BS - visible.begin_BS > k
    return jnp.sum(found * counts) / jnp.sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for name, default in (("dense", 100), ("steps", 200), ("length", 1024), ("every", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    dense = fathom.train(recipe_of(arguments.folder, "dense", arguments.dense, arguments.length))
    rate = ["optimizer.learning_rate=3e-3", "train.indexer_weight=1.0"]
    recipe = recipe_of(arguments.folder, "indexer-warmup", arguments.steps, arguments.length, *rate)
    mesh = make_mesh(recipe.mesh.shape)
    program = make_program(recipe, mesh)
    loader, holdout = open_loader(recipe, program), open_loader(recipe, program, "holdout")
    overlap.top_k = program.spec.config.index_top_k
    layers = program.spec.config.attention_kinds.count("csa")
    held_out = [to_devices(next_batch(holdout, 0), program, recipe) for _ in range(4)]

    @jax.jit
    def measure(state, batch):
        with mock.patch.object(BaseIndexer, "loss", overlap):
            module = program.model.merge((state.params,), state.model_state, jax.random.key(0))
            return module.features(batch["tokens"]).aux["indexer"] / layers  # whole rows: nothing is packed

    seen = (jnp.arange(arguments.length) + 1) // 4
    chance = jnp.mean(overlap.top_k / seen[seen > overlap.top_k]).item()
    steps, curve = [], []
    with sharding_scope(mesh, program.rules):
        state = start_from(program, dense.checkpoint_dir, recipe.train.seed)
        for step in range(arguments.steps + 1):
            if step % arguments.every == 0:
                steps.append(step)
                curve.append(sum(measure(state, batch).item() for batch in held_out) / len(held_out))
                print(f"step {step:>4}  overlap {curve[-1]:.3f}  chance {chance:.3f}", flush=True)
            if step < arguments.steps:
                batch = to_devices(next_batch(loader, step + 1), program, recipe)
                state, metrics = program.step(state, batch)
    loss = metrics["loss/indexer"].item()
    print(f"KL per token, summed over {layers} layers: {loss:.3f}; overlap {curve[-1] / chance:.1f} times chance")
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, curve, marker="o", label="indexer")
    axes.axhline(chance, color="gray", linestyle="--", label="chance")
    axes.set(xlabel="steps of the indexer alone", ylabel="overlap with the attention's top-k", ylim=(0, 1))
    axes.legend()
    figure.savefig(arguments.folder / "overlap.png", dpi=120)


if __name__ == "__main__":
    main()

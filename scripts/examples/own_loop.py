"""Somebody else's loop: plain optax trains the tiny DeepSeek-V4, sharded, without `fathom.train`."""

import argparse  # its source is the text to learn
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from fathom import zoo
from fathom.layers.losses import LossWeights, count_targets
from fathom.layers.options import ComputeOptions
from fathom.mesh import batch_sharding, make_mesh, sharding_scope, state_shardings


def main(steps: int = 20, rows: int = 8, length: int = 64) -> list[float]:
    spec, options = zoo.get("deepseek-v4-tiny"), ComputeOptions(dtype="float32")
    mesh, rules = make_mesh({"data": 2, "fsdp": 2, "expert": 2}), spec.preset("default")

    def build():
        return nnx.split(spec.build(spec.config, nnx.Rngs(0), options), nnx.Param, ...)

    graphdef, *abstract = nnx.eval_shape(build)
    shardings = tuple(state_shardings(state, mesh, rules) for state in abstract)
    params, rest = jax.jit(lambda: build()[1:], out_shardings=shardings)()  # born sharded
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))
    state = (params, rest, tx.init(params))  # moments take the layout of their weights
    layout = jax.tree.map(lambda x: x.sharding if x.ndim else NamedSharding(mesh, jax.P()), state)
    state = jax.device_put(state, layout)

    def step(state, batch):
        params, rest, opt_state = state

        def loss_fn(params):
            model = nnx.merge(graphdef, params, rest)
            return spec.loss(model, batch, LossWeights(), count_targets(batch))

        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        rest = spec.update_state(rest, aux, 1e-3)  # router biases
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    text = np.fromfile(argparse.__file__, np.uint8).astype(np.int32)
    batches = text[: len(text) // (rows * length) * rows * length].reshape(-1, rows, length)
    step, losses = jax.jit(step, donate_argnums=0, out_shardings=(layout, None)), []
    with sharding_scope(mesh, rules):
        for i in range(steps):
            tokens = jax.device_put(batches[i % len(batches)], batch_sharding(mesh, rules))
            state, loss = step(state, {"tokens": tokens})
            losses.append(float(loss))
            print(f"step {i + 1}: loss {losses[-1]:.4f}", flush=True)
    return losses


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*map(int, sys.argv[1:2]))

"""One of two processes, with four devices each, of a toy run; SIGTERM reaches the second one only.

    python -m tests.train.two_processes INDEX PORT FOLDER TERM_STEP
"""

import json
import sys
from pathlib import Path

import jax

from fathom import zoo
from fathom.train import loop
from tests.train import runs, toy_model


def main(index: int, port: int, folder: Path, term_step: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
    zoo.register(toy_model.TOY)
    original = loop.next_batch

    def next_batch(loader, step):
        if index == 1 and step == term_step:
            runs.sigterm(None)
        return original(loader, step)

    loop.next_batch = next_batch
    result = loop.train(runs.make_recipe(folder))
    values = {"step": result.step, "preempted": result.preempted, "loss": result.metrics["loss"]}
    (folder / f"result-{index}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))

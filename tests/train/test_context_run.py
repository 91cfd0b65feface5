"""Twenty steps of training on packed rows give the same losses however the sequence is cut."""

from __future__ import annotations

import numpy as np
import pytest

from fathom.train.loop import train
from tests.train import runs
from tests.train.runs import history, make_recipe

LAYERS = {
    "attention_kinds": ["sliding", "csa", "hca"],
    "compress_ratios": [0, 4, 16],
    "router_kinds": ["hash", "learned", "learned"],
}
MESHES = {"whole": {"data": 8}, "context 4": {"data": 2, "context": 4}, "mixed": {"fsdp": 2, "expert": 2, "context": 2}}


@pytest.mark.slow
def test_losses_of_twenty_steps_agree(tmp_path):
    """Within 1e-5 of each, the indexer's and MTP's included. Three programs are compiled: about three minutes.

    With the paper's eps of 1e-20 a weight whose gradient is zero but for rounding (in the first layer, whose streams
    are still copies of each other, many of `attn_hc` are) moves by the whole learning rate, in a direction that
    rounding decides; after three such steps two experts' scores that were one rounding apart changed places. 1e-6
    leaves such weights where they are.
    """
    runs.write_text(tmp_path / "text", files=40)
    losses = {}
    for name, mesh in MESHES.items():
        run = name.replace(" ", "-")
        recipe = make_recipe(
            tmp_path, run, model__name="deepseek-v4-tiny", model__config=LAYERS, data__sequence_length=128,
            data__packing="first_fit", train__steps=20, checkpoint__every=20, optimizer__learning_rate=1e-3,
            optimizer__eps=1e-6,
        )  # fmt: skip
        recipe = type(recipe).model_validate({**recipe.to_dict(), "mesh": mesh})
        assert train(recipe).step == 20
        kept = history(recipe, "loss", "loss/main", "loss/mtp", "loss/indexer")
        losses[name] = np.array([kept[key] for key in kept if key != "step"])
    assert losses["whole"].shape == (4, 20) and losses["whole"][0, 0] > losses["whole"][0, -1]
    for name in ("context 4", "mixed"):
        np.testing.assert_allclose(losses[name], losses["whole"], rtol=1e-5)

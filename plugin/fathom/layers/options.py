"""How a model computes, as opposed to what it computes (its architecture config)."""

from __future__ import annotations

import dataclasses

ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "masked", "gathered")
REMAT_POLICIES = ("none", "full", "unit", "dots", "attention", "sublayers")
STAGES = ("dense", "indexer-warmup", "sparse")
SELECTIONS = ("exact", "approx")
MLA_FORMS = ("auto", "expanded", "absorbed")


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """Options that change speed, memory or rounding, never the model.

    Attributes:
      dtype: activations and matrix products, "float32" or "bfloat16". Parts that the reference keeps in
        float32 stay so (see the table in models/deepseek_v4/README.md).
      param_dtype: storage of the weights; those kept in float32 stay float32.
      attention: which version of the attention op runs; "auto" picks by the rule in ops/sparse_mqa.py, for V3.2 in
        models/deepseek_v32/mla.py.
      query_chunk: queries per step of the attention and of the indexer; unless given 128 for the indexer and for
        V3.2's masked attention, else 64.
      stretch: tokens whose queries, projections and other wide results of an attention sublayer are held at a time,
        on each device; unless given as many as ops/chunked_layer.py says. Shorter sequences are worked through whole.
      balance: where a sequence is cut over devices, each works on the first half of its own queries and the second of
        those of the device as far from the other end: later queries have more to score, and so all have as much.
      remat: activation-checkpoint policy of a block, by name: "none" saves everything; "full" saves the
        block's input only; "unit" that of each unit of the repeated blocks (V4: one HCA and one CSA block), for half
        of the saved inputs and one more forward of half of the blocks; "dots" saves the results of matrix products
        without batch dimensions; "attention" saves the attention outputs and the selected indices; "sublayers" the
        outputs of the experts too, for half as much memory again as "full" and no product of a sublayer made again but
        in its own backward.
      simulate_quant: reproduce the FP8/FP4 rounding and the Hadamard rotation of the released inference code.
      stage: the attention stage of the training curriculum; "dense" and "indexer-warmup" let CSA layers see every
        visible compressed entry, "sparse" only those the indexer selects. V3.2's entries are the tokens.
      indexer_loss: every layer with an indexer also gives the loss that trains it (ops/indexer_kl.py): over all that
        is visible in the stage "indexer-warmup", over what is selected in "sparse"; never in "dense".
      selection: how the indexer takes its top-k: "exact", ties to the lowest entry, or "approx", by the
        TPU's approximate top-k.
      recall_target: with "approx", the mean share of the true top-k to find, in (0, 1]; "exact" ignores it.
      mla_form: which form of V3.2's attention runs, "expanded" or "absorbed"; "auto" picks by the rule in
        models/deepseek_v32/mla.py. V4 has one form and ignores it.
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    attention: str = "auto"
    query_chunk: int | None = None
    stretch: int | None = None
    balance: bool = False
    remat: str = "none"
    simulate_quant: bool = False
    stage: str = "sparse"
    indexer_loss: bool = False
    selection: str = "exact"
    recall_target: float = 0.95
    mla_form: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
            ("attention", ATTENTION_IMPLEMENTATIONS),
            ("remat", REMAT_POLICIES),
            ("stage", STAGES),
            ("selection", SELECTIONS),
            ("mla_form", MLA_FORMS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ComputeOptions.{name}: found {getattr(self, name)!r}, expected one of {allowed}"
                )
        for name in ("query_chunk", "stretch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"ComputeOptions.{name}: found {value}, expected >= 1")
        if self.indexer_loss and self.stage == "dense":
            raise ValueError(
                "ComputeOptions.indexer_loss: the stage 'dense' leaves the indexer alone; expected stage "
                "'indexer-warmup' or 'sparse'"
            )
        if (self.attention, self.mla_form) == ("gathered", "expanded"):
            raise ValueError(
                "ComputeOptions.mla_form: attention 'gathered' reads latents, found 'expanded'; expected 'absorbed' or "
                "'auto'"
            )
        recall = self.recall_target
        if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall <= 1:
            raise ValueError(
                f"ComputeOptions.recall_target: found {recall!r}, expected a number above 0 and at most 1"
            )

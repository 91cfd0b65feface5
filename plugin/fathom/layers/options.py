"""How a model computes, as opposed to what it computes (its architecture config)."""

from __future__ import annotations

import dataclasses

ATTENTION_IMPLEMENTATIONS = ("auto", "reference", "chunked")
REMAT_POLICIES = ("none", "full", "dots", "attention")
STAGES = ("dense", "sparse")


@dataclasses.dataclass(frozen=True)
class ComputeOptions:
    """Options that change speed, memory or rounding, never the model.

    Attributes:
      dtype: activations and matrix products, "float32" or "bfloat16". Parts that the reference keeps in
        float32 stay so (see the table in models/deepseek_v4/README.md).
      param_dtype: storage of the weights; those kept in float32 stay float32.
      attention: which version of the attention op runs; "auto" picks by the rule in ops/attention.py.
      query_chunk: queries per step of the chunked attention and of the indexer.
      remat: activation-checkpoint policy of a block, by name: "none" saves everything; "full" saves the
        block's input only; "dots" saves the results of matrix products without batch dimensions;
        "attention" saves the attention outputs and the selected indices.
      simulate_quant: reproduce the FP8/FP4 rounding and the Hadamard rotation of the released inference code.
      stage: the attention stage of the training curriculum; "dense" lets CSA layers see every visible
        compressed entry, "sparse" only those the indexer selects.
    """

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    attention: str = "auto"
    query_chunk: int = 128
    remat: str = "none"
    simulate_quant: bool = False
    stage: str = "sparse"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", ("float32", "bfloat16")),
            ("param_dtype", ("float32", "bfloat16")),
            ("attention", ATTENTION_IMPLEMENTATIONS),
            ("remat", REMAT_POLICIES),
            ("stage", STAGES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"ComputeOptions.{name}: found {getattr(self, name)!r}, expected one of {allowed}"
                )
        if self.query_chunk < 1:
            raise ValueError(f"ComputeOptions.query_chunk: found {self.query_chunk}, expected >= 1")

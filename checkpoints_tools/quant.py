"""Exact block codecs of released weights: FP8 (E4M3, 128 x 128 blocks) and FP4 (E2M1, 32 columns) <-> float.

Letters: R rows, C columns, B block rows, K block columns. Work goes in strips of rows that fit the processor's cache,
on integer views of the numbers: numpy's float8 and bfloat16 casts are slow and hold the interpreter lock, these do not.
"""

from __future__ import annotations

from checkpoints_tools.quant_decode import decode_fp4, decode_fp8, fp4_to_fp8
from checkpoints_tools.quant_encode import encode_fp4, encode_fp8
from checkpoints_tools.quant_formats import check_scales

__all__ = ["check_scales", "decode_fp4", "decode_fp8", "encode_fp4", "encode_fp8", "fp4_to_fp8"]

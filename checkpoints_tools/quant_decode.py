"""FP8 and FP4 weights to floats, and FP4 to FP8; the way of working is said in `quant`."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoints_tools.quant_formats import (
    BF16,
    E2M1_MAGNITUDES,
    E4M3,
    E4M3_NAN,
    E8M0,
    E8M0_BIAS,
    E8M0_NAN,
    F32,
    FP4,
    FP8,
    SCALES_PER_BLOCK,
    are_powers_of_two,
    check_output,
    check_shape,
    covering_scales,
    make_buffers,
    packed_bytes,
    row_strips,
    scale_factors,
)
from fathom.hub import FP4_BLOCK, FP8_BLOCK

# w' = w * 2^d holds any E2M1 code w in E4M3 for -8 <= d <= 6, and nothing but zero below -11
SHIFT_LOSSLESS, SHIFT_MIN, SHIFT_MAX = -8, -12, 6


def decode_fp8(
    codes: np.ndarray, scales: np.ndarray, dtype: npt.DTypeLike, *, row0: int = 0, col0: int = 0
) -> np.ndarray:
    """FP8 weights, or any rectangle of them, as floats: code * scale, rounded once to `dtype`, to nearest even.

    A scale byte b is 2^(b - 127). NaN codes stay NaN.

    Args:
      codes: [R, C] float8_e4m3fn, any R and C.
      scales: [B, K] float8_e8m0fnu or float32, of the whole matrix: at least [ceil((row0+R)/128), ceil((col0+C)/128)].
      dtype: float32 or bfloat16.
      row0, col0: where `codes` begins in the whole matrix, multiples of nothing.

    Returns:
      [R, C] of `dtype`. Exact in float32 for power-of-two scales, and in bfloat16 for those from 2^-124.

    Raises:
      ValueError: for other dtypes, scales too few, a scale that `check_scales` refuses, or a value beyond `dtype`,
        naming its place in the whole matrix.
      RuntimeError: when this thread flushes subnormal numbers to zero.
    """
    dtype = check_output(dtype)
    if codes.dtype != E4M3:
        raise ValueError(f"FP8 codes of dtype {codes.dtype}, expected {E4M3}")
    factors = scale_factors(covering_scales(codes.shape, scales, FP8, row0, col0))
    out = np.empty(codes.shape, dtype)
    if not out.size:
        return out
    rows, columns = codes.shape
    can_overflow = float(factors.max()) * FP8.largest >= float(ml_dtypes.finfo(dtype).max)
    powers = are_powers_of_two(factors)
    exact = powers and float(factors.min()) >= 2.0**-124
    skip = col0 % FP8_BLOCK
    row_factors = np.repeat(factors, FP8_BLOCK, axis=1)[:, skip : skip + columns]
    raw = codes.view(np.uint8)
    buffers = make_buffers(columns, np.float32, 2)
    for start, stop in row_strips(rows, columns, row0 % FP8_BLOCK, FP8_BLOCK):
        factor = row_factors[(row0 + start) // FP8_BLOCK - row0 // FP8_BLOCK]
        strip = out[start:stop]
        product, work = (buffer[: strip.size].reshape(strip.shape) for buffer in buffers)
        if dtype == F32:
            product = strip
        _scale_e4m3(raw[start:stop], factor, product)
        if dtype == BF16:
            if not powers:
                _part_ties(product, codes[start:stop], factor)
            _round_to_bf16(product, strip, None if exact else work)
        signless = work.view(np.uint8).reshape(-1)[: strip.size].reshape(strip.shape)
        np.bitwise_and(raw[start:stop], 0x7F, out=signless)
        if signless.max() == E4M3_NAN:
            strip[signless == E4M3_NAN] = np.nan
        if can_overflow:
            _check_overflow(strip, row0 + start, col0)
    return out


def decode_fp4(
    packed: np.ndarray, scales: np.ndarray, dtype: npt.DTypeLike, *, row0: int = 0, col0: int = 0
) -> np.ndarray:
    """FP4 weights, or any rectangle of them, as floats: code * 2^(b - 127), exact in both dtypes.

    Args:
      packed: [R, C/2] int8 or uint8, byte = (odd column << 4) | even column.
      scales: [rows, columns/32] float8_e8m0fnu of the whole matrix: at least [row0+R, ceil((col0+C)/32)].
      dtype: float32 or bfloat16.
      row0, col0: where `packed` begins in the whole matrix, in logical columns; col0 is even.

    Returns:
      [R, C] of `dtype`.

    Raises:
      ValueError: for other dtypes, an odd col0, scales too few or NaN, or a value beyond `dtype`, naming its place.
      RuntimeError: when this thread flushes subnormal numbers to zero.
    """
    dtype = check_output(dtype)
    raw = packed_bytes(packed, scales)
    if col0 % 2:
        raise ValueError(f"col0 {col0}, expected an even column: two share a byte")
    rows, width = raw.shape
    exponents = covering_scales((rows, 2 * width), scales, FP4, row0, col0).view(np.uint8)
    out = np.empty((rows, 2 * width), dtype)
    if not out.size:
        return out
    table = _fp4_table(dtype)
    pairs = out.view(table.dtype)
    can_overflow = int(exponents.max()) >= E8M0_BIAS + 126
    # a rectangle that cuts 32-column blocks is decoded with the blocks completed, then cut
    whole = exponents.shape[1] * (FP4_BLOCK // 2)
    skip = col0 % FP4_BLOCK // 2
    buffers = _lookup_buffers(whole)
    for start, stop in row_strips(rows, whole):
        if whole == width:
            _look_up(table, exponents[start:stop], raw[start:stop], pairs[start:stop], buffers)
        else:
            padded = np.zeros((stop - start, whole), np.uint8)
            padded[:, skip : skip + width] = raw[start:stop]
            found = np.empty(padded.shape, table.dtype)
            _look_up(table, exponents[start:stop], padded, found, buffers)
            pairs[start:stop] = found[:, skip : skip + width]
        if can_overflow:
            _check_overflow(out[start:stop], row0 + start, col0)
    return out


def fp4_to_fp8(packed: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP4 weights as FP8 weights of exactly the same numbers, as the released converter's `--expert-dtype fp8`.

    Per 128 x 128 block s' = max(scale) / 2^6, at least 2^-127, and w' = w * scale / s'. E4M3 holds w' when the block's
    scales lie within 2^14 of each other; what is refused is a code that does not fit, so a block may be wider where
    its small scales go with zeros or with codes that still fit.

    Args:
      packed: [R, C/2] int8 or uint8, byte = (odd column << 4) | even column.
      scales: [R, C/32] float8_e8m0fnu.

    Returns:
      codes [R, C] float8_e4m3fn and scales [ceil(R/128), ceil(C/128)] float8_e8m0fnu.

    Raises:
      ValueError: naming the first block that would lose a code; for other dtypes and shapes, or NaN scales.
    """
    raw = packed_bytes(packed, scales)
    rows, width = raw.shape
    if 2 * width % FP4_BLOCK:
        raise ValueError(f"{2 * width} columns, FP4 storage needs a multiple of {FP4_BLOCK}")
    check_shape(scales, (rows, 2 * width // FP4_BLOCK), "FP4")
    codes = np.empty((rows, 2 * width), np.uint8)
    if not codes.size:
        return codes.view(E4M3), np.empty([-(-size // FP8_BLOCK) for size in codes.shape], E8M0)
    exponents = scales.view(np.uint8).astype(np.int16)
    bands, groups = np.arange(0, rows, FP8_BLOCK), np.arange(0, exponents.shape[1], SCALES_PER_BLOCK)
    largest = np.maximum.reduceat(np.maximum.reduceat(exponents, bands, axis=0), groups, axis=1)
    block_exponents = np.maximum(largest - SHIFT_MAX, 0)
    spread = np.repeat(np.repeat(block_exponents, FP8_BLOCK, axis=0)[:rows], SCALES_PER_BLOCK, axis=1)
    shifts = exponents - spread[:, : exponents.shape[1]]
    rows_of_table = (np.maximum(shifts, SHIFT_MIN) - SHIFT_MIN).astype(np.uint8)
    _refuse_lossy(raw, exponents, rows_of_table)
    table = _fp4_to_fp8_table()[0]
    pairs, buffers = codes.view(table.dtype), _lookup_buffers(width)
    for start, stop in row_strips(rows, width):
        _look_up(table, rows_of_table[start:stop], raw[start:stop], pairs[start:stop], buffers)
    return codes.view(E4M3), block_exponents.astype(np.uint8).view(E8M0)


def _scale_e4m3(raw: np.ndarray, factor: np.ndarray, out: np.ndarray) -> None:
    """out = E4M3 code * factor in float32; NaN codes come out as +-480 * factor.

    E4M3's fields moved to float32's places are code * 2^-120, subnormal codes included.
    """
    bits = out.view(np.uint32)
    np.copyto(out.view(np.int32), raw.view(np.int8))
    np.left_shift(bits, 20, out=bits)
    np.bitwise_and(bits, np.uint32(0x87F00000), out=bits)
    with np.errstate(over="ignore"):
        np.multiply(out, np.float32(2.0**120), out=out)
        np.multiply(out, factor, out=out)


def _part_ties(product: np.ndarray, codes: np.ndarray, factor: np.ndarray) -> None:
    """Moves float32 products that lie halfway between two bfloat16 numbers by rounding alone back to their side."""
    rows, columns = np.divmod(np.flatnonzero(product.view(np.uint32).astype(np.uint16) == 0x8000), product.shape[1])
    rounded = np.abs(product[rows, columns])
    true = np.abs(codes[rows, columns].astype(np.float64) * factor[columns])
    bits = rounded.view(np.uint32) + (true > rounded) - (true < rounded)
    product[rows, columns] = np.copysign(bits.astype(np.uint32).view(np.float32), product[rows, columns])


def _round_to_bf16(product: np.ndarray, out: np.ndarray, work: np.ndarray | None) -> None:
    """bfloat16 is the upper half of float32. Without `work` (as large as `product`) the lower half must be empty."""
    bits = product.view(np.uint32)
    if work is not None:
        odd = work.view(np.uint32)
        np.right_shift(bits, 16, out=odd)
        np.bitwise_and(odd, 1, out=odd)
        np.add(odd, 0x7FFF, out=odd)
        np.add(bits, odd, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out.view(np.uint16), bits, casting="unsafe")


def _check_overflow(strip: np.ndarray, row: int, column: int) -> None:
    infinite = np.isinf(strip)
    if infinite.any():
        place = np.argwhere(infinite)[0]
        raise ValueError(
            f"code * scale at row {row + place[0]}, column {column + place[1]} is infinite in {strip.dtype}; the "
            "scale is too large"
        )


@functools.cache
def _fp4_values() -> np.ndarray:
    """[256, 2] float32: the even and the odd column's number of each packed byte."""
    magnitudes = np.array(E2M1_MAGNITUDES, np.float32)
    values = np.concatenate([magnitudes, -magnitudes])
    byte = np.arange(256)
    return np.stack([values[byte & 0xF], values[byte >> 4]], axis=-1)


@functools.cache
def _fp4_table(dtype: np.dtype) -> np.ndarray:
    """[65536]: two numbers of `dtype` as one integer, at scale byte << 8 | packed byte. Scale 0xFF is never asked."""
    factors = scale_factors(np.arange(E8M0_NAN, dtype=np.uint8).view(E8M0))
    with np.errstate(over="ignore"):
        values = factors[:, None, None] * _fp4_values()
    table = np.zeros((256, 256, 2), dtype)
    if dtype == F32:
        table[:E8M0_NAN] = values
        return table.reshape(-1).view(np.uint64)
    _round_to_bf16(values, table[:E8M0_NAN], None)
    return table.reshape(-1).view(np.uint32)


@functools.cache
def _fp4_to_fp8_table() -> tuple[np.ndarray, np.ndarray]:
    """Two E4M3 codes as one integer at (shift - SHIFT_MIN) << 8 | packed byte, and whether they lose something."""
    values = np.ldexp(_fp4_values(), np.arange(SHIFT_MIN, SHIFT_MAX + 1)[:, None, None])
    codes = values.astype(E4M3)
    lossy = (codes.astype(np.float32) != values).any(axis=-1)
    return codes.view(np.uint16).reshape(-1), lossy


def _lookup_buffers(width: int) -> list[np.ndarray]:
    return make_buffers(width, np.uint16, 1) + make_buffers(width, np.intp, 1)


def _look_up(
    table: np.ndarray, high: np.ndarray, packed: np.ndarray, out: np.ndarray, buffers: list[np.ndarray]
) -> None:
    """out[r, c] = table[high[r, c // 16] << 8 | packed[r, c]]; out is contiguous, its width a multiple of 16."""
    index16, index = (buffer[: out.size] for buffer in buffers)
    np.copyto(index16.reshape(out.shape), packed)
    # the upper byte of the 16 indices of a block, four at a time
    words = index16.view(np.uint64).reshape(-1, FP4_BLOCK // 8)
    upper = high.reshape(-1) * np.uint64(0x0100_0100_0100_0100)
    for part in range(words.shape[1]):
        np.bitwise_or(words[:, part], upper, out=words[:, part])
    np.copyto(index, index16)
    # every index is inside the table: "clip" only spares the buffered output that "raise" would need
    np.take(table, index.reshape(out.shape), out=out, mode="clip")


def _refuse_lossy(raw: np.ndarray, exponents: np.ndarray, rows_of_table: np.ndarray) -> None:
    """Looks at the codes of the blocks whose spread of scales could lose some."""
    lossy = _fp4_to_fp8_table()[1]
    suspects = np.argwhere(rows_of_table < SHIFT_LOSSLESS - SHIFT_MIN) // (FP8_BLOCK, SCALES_PER_BLOCK)
    for row, column in np.unique(suspects, axis=0):
        rows = slice(row * FP8_BLOCK, (row + 1) * FP8_BLOCK)
        scales = slice(column * SCALES_PER_BLOCK, (column + 1) * SCALES_PER_BLOCK)
        block = raw[rows, column * FP8_BLOCK // 2 : (column + 1) * FP8_BLOCK // 2]
        if lossy[np.repeat(rows_of_table[rows, scales], FP4_BLOCK // 2, axis=1), block].any():
            found = exponents[rows, scales]
            raise ValueError(
                f"block [{row}, {column}] (rows from {rows.start}, columns from {column * FP8_BLOCK}) has FP4 scales "
                f"from 2^{found.min() - E8M0_BIAS} to 2^{found.max() - E8M0_BIAS}, and FP8 with one scale would lose "
                "codes of it; keep FP4, or convert to bfloat16"
            )

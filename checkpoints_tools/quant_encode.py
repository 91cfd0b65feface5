"""Floats to FP8 and FP4 weights; the way of working is said in `quant`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from checkpoints_tools.quant_formats import (
    E4M3,
    E8M0,
    E8M0_BIAS,
    F32,
    FP4,
    FP8,
    Format,
    are_powers_of_two,
    check_shape,
    make_buffers,
    packed_bytes,
    row_strips,
    scale_factors,
    value_bits,
)
from fathom.hub import FP4_BLOCK, FP8_BLOCK


def encode_fp8(
    values: np.ndarray, scale_dtype: npt.DTypeLike = E8M0, *, scales: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights to FP8 with one scale per 128 x 128 block: the smallest power of two s with amax <= 448 s.

    Codes are value / s rounded once, to nearest even; the sign of zero is kept. The rule is worked out on the bits, so
    it is exact; the released kernel's float32 product amax * float32(1/448), rounded up to a power of two, comes to the
    same for every amax whose product is a normal number. s stays in E8M0's range, [2^-127, 2^127]. An all-zero block
    gets 2^-22, what the released kernel's amax floor of 1e-4 gives it. Blocks begin at the first row and column; cut a
    matrix at multiples of 128 rows to encode its parts alone.

    decode(encode(decode(x))) is decode(x) bit for bit, but the bytes may differ: a block whose largest code is 224 or
    less is the same numbers as one with twice the codes and half the scale, which is what this encoder picks. To have
    the bytes of x again, pass its own `scales`: exact for float32 values, and for bfloat16 values with scales from
    2^-124 (below, bfloat16 does not hold every code).

    Args:
      values: [R, C] float32 or bfloat16, any R and C.
      scale_dtype: float8_e8m0fnu, or float32 for the same powers of two; not looked at when `scales` is given.
      scales: [ceil(R/128), ceil(C/128)] float8_e8m0fnu or float32, powers of two or not, to encode with.

    Returns:
      codes [R, C] float8_e4m3fn and scales [ceil(R/128), ceil(C/128)].

    Raises:
      ValueError: naming the first NaN or infinite value, or the first value that rounds to more than 448 times the
        given scale; for other dtypes and shapes.
      RuntimeError: when this thread flushes subnormal numbers to zero.
    """
    bits = value_bits(values)
    if scales is None:
        scales = _to_scales(_exponents(values, bits, FP8), scale_dtype)
    check_shape(scales, tuple(-(-size // FP8_BLOCK) for size in values.shape), "FP8")
    codes = np.empty(values.shape, np.uint8)
    for start, stop, strip in _encoded_strips(values, bits, scales, FP8):
        np.copyto(codes[start:stop], strip, casting="unsafe")
    return codes.view(E4M3), scales


def encode_fp4(values: np.ndarray, *, scales: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Weights to FP4 with one scale per 32 columns: the smallest power of two s with amax <= 6 s.

    Codes are value / s rounded once onto {0, .5, 1, 1.5, 2, 3, 4, 6}, ties to the even mantissa; the sign of zero is
    kept. An all-zero block gets 2^-126, what the released kernel's amax floor of 6 * 2^-126 gives it. As for
    `encode_fp8`, the numbers come back bit for bit and the bytes only with x's own `scales` (a block of nothing but
    0, 1 and 2, say, is also one of 0, 2 and 4).

    Args:
      values: [R, C] float32 or bfloat16, C a multiple of 32.
      scales: [R, C/32] float8_e8m0fnu to encode with.

    Returns:
      packed [R, C/2] int8, byte = (odd column << 4) | even column, and scales [R, C/32] float8_e8m0fnu.

    Raises:
      ValueError: naming the first NaN or infinite value, or the first value that rounds to more than 6 times the given
        scale; for other dtypes and shapes.
      RuntimeError: when this thread flushes subnormal numbers to zero.
    """
    bits = value_bits(values)
    rows, columns = values.shape
    if columns % FP4_BLOCK:
        raise ValueError(f"{columns} columns cannot be cut into FP4 blocks, expected a multiple of {FP4_BLOCK}")
    if scales is None:
        scales = _to_scales(_exponents(values, bits, FP4), E8M0)
    packed = np.empty((rows, columns // 2), np.uint8)
    packed_bytes(packed, scales)
    check_shape(scales, (rows, columns // FP4_BLOCK), "FP4")
    buffers = make_buffers(columns, np.uint8, 2)
    for start, stop, strip in _encoded_strips(values, bits, scales, FP4):
        codes, work = (buffer[: strip.size].reshape(strip.shape) for buffer in buffers)
        np.copyto(codes, strip, casting="unsafe")
        couples, high = codes.view("<u2"), work.view("<u2")
        np.right_shift(couples, 4, out=high)
        np.bitwise_or(couples, high, out=couples)
        np.copyto(packed[start:stop], couples, casting="unsafe")
    return packed.view(np.int8), scales


def _as_float(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of float32 or bfloat16 bits."""
    return (bits if bits.dtype == np.uint32 else bits.astype(np.uint32) << 16).view(np.float32)


def _exponents(values: np.ndarray, bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Each block's scale as k of 2^k, int16. Magnitudes order as their bits do."""
    rows, columns = bits.shape
    band = fmt.block[0]
    exponents = np.zeros((-(-rows // band), -(-columns // fmt.block[1])), np.int16)
    if not bits.size:
        return exponents
    bands = np.zeros((len(exponents), columns) if fmt is FP8 else 0, bits.dtype)
    (buffer,) = make_buffers(columns, bits.dtype, 1)
    for start, stop in row_strips(rows, columns, 0, band):
        magnitudes = buffer[: (stop - start) * columns].reshape(-1, columns)
        np.bitwise_and(bits[start:stop], np.iinfo(bits.dtype).max >> 1, out=magnitudes)
        if fmt is FP8:
            largest = bands[start // band]
            np.maximum(largest, magnitudes.max(axis=0), out=largest)
        else:
            largest = magnitudes.reshape(stop - start, -1, FP4_BLOCK).max(axis=-1)
            exponents[start:stop] = _smallest_exponents(_as_float(largest), fmt, values)
    if fmt is FP8:
        largest = np.maximum.reduceat(bands, np.arange(0, columns, FP8_BLOCK), axis=1)
        exponents[...] = _smallest_exponents(_as_float(largest), fmt, values)
    return exponents


def _smallest_exponents(amax: np.ndarray, fmt: Format, values: np.ndarray) -> np.ndarray:
    """k of the smallest 2^k with amax <= largest * 2^k; where an amax is not finite, refuses the first such value."""
    if not np.isfinite(amax).all():
        for start, stop in row_strips(*values.shape):
            wrong = np.argwhere(~np.isfinite(values[start:stop]))
            if wrong.size:
                _refuse(values, start + wrong[0][0], wrong[0][1], fmt, 1.0)
    fraction, exponent = np.frexp(amax.astype(np.float64))
    top, top_exponent = math.frexp(fmt.largest)
    exponents = np.clip(exponent - top_exponent + (fraction > top), -E8M0_BIAS, E8M0_BIAS)
    return np.where(amax == 0, fmt.zero_block_exponent, exponents)


def _to_scales(exponents: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    if np.dtype(dtype) not in (E8M0, F32):
        raise ValueError(f"scale dtype {np.dtype(dtype)}, expected {E8M0} or {F32}")
    scales = (exponents + E8M0_BIAS).astype(np.uint8).view(E8M0)
    return scales if np.dtype(dtype) == E8M0 else scale_factors(scales)


def _encoded_strips(
    values: np.ndarray, bits: np.ndarray, scales: np.ndarray, fmt: Format
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Row ranges and their codes [rows, C], in integers that the next range overwrites."""
    rows, columns = values.shape
    if not values.size:
        return
    divisors = _divisors(scales)
    per_row = np.repeat(divisors, FP8_BLOCK, axis=1)[:, :columns] if fmt is FP8 else divisors[:, :, None]
    integer = np.int32 if divisors.dtype == F32 else np.int64
    buffers = make_buffers(columns, divisors.dtype, 1) + make_buffers(columns, integer, 3)
    band = fmt.block[0]
    for start, stop in row_strips(rows, columns, 0, band):
        y, *work = (buffer[: (stop - start) * columns].reshape(-1, columns) for buffer in buffers)
        _load(bits[start:stop], y)
        with np.errstate(over="ignore", invalid="ignore"):
            if fmt is FP8:
                _divide(y, per_row[start // band])
            else:
                _divide(y.reshape(stop - start, -1, FP4_BLOCK), per_row[start:stop])
            magnitudes, signs = _round_to_codes(y, work, fmt)
        if magnitudes.max() > fmt.largest_code:
            row, column = np.argwhere(magnitudes > fmt.largest_code)[0]
            _refuse(values, start + row, column, fmt, float(scales[(start + row) // band, column // fmt.block[1]]))
        np.bitwise_or(magnitudes, signs, out=magnitudes)
        yield start, stop, magnitudes


def _refuse(values: np.ndarray, row: int, column: int, fmt: Format, scale: float) -> NoReturn:
    value = float(values[row, column])
    if not math.isfinite(value):
        raise ValueError(f"value {value} at row {row}, column {column}, expected finite weights")
    raise ValueError(
        f"value {value} at row {row}, column {column} does not fit the scale {scale}: {fmt.name} goes to "
        f"{fmt.largest:g} times the scale; leave `scales` out to have new ones"
    )


def _divisors(scales: np.ndarray) -> np.ndarray:
    """What `_divide` takes: float32 inverses where all are exact, else the scales in float64."""
    if scales.dtype == E8M0:
        return np.ldexp(np.float32(1), E8M0_BIAS - scales.view(np.uint8).astype(np.int16))
    wide = scales.astype(np.float64)
    with np.errstate(over="ignore"):
        inverse = (1 / wide).astype(np.float32)
    return inverse if are_powers_of_two(scales) and np.isfinite(inverse).all() else wide


def _divide(y: np.ndarray, divisors: np.ndarray) -> None:
    """y / scale in place.

    Powers of two are exact in float32, but for quotients so small that their code is zero either way. A float64
    quotient of float32 numbers falls on no tie of the codes that the true one does not fall on.
    """
    if divisors.dtype == F32:
        np.multiply(y, divisors, out=y)
    else:
        np.divide(y, divisors, out=y)


def _load(bits: np.ndarray, y: np.ndarray) -> None:
    if bits.dtype == np.uint16 and y.dtype == F32:
        wide = y.view(np.uint32)
        np.copyto(wide, bits)
        np.left_shift(wide, 16, out=wide)
    else:
        np.copyto(y, _as_float(bits))


def _round_to_codes(y: np.ndarray, work: list[np.ndarray], fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Codes of y, to nearest even: their magnitudes, above `largest_code` where y is beyond it or NaN, and sign bits.

    Args:
      y: float32 or float64, overwritten.
      work: three integer arrays of y's shape and width, overwritten.
    """
    odd, small, signs = work
    float_bits, mantissa_bits = 8 * y.itemsize, np.finfo(y.dtype).nmant
    drop = mantissa_bits - fmt.mantissa_bits
    bits = y.view(odd.dtype)
    np.right_shift(bits, float_bits - fmt.bits, out=signs)
    np.bitwise_and(signs, 1 << (fmt.bits - 1), out=signs)
    np.bitwise_and(bits, np.iinfo(bits.dtype).max, out=bits)
    # Subnormal codes count steps of 2^(min_exponent - mantissa_bits), the last place of this sum.
    anchor = y.dtype.type(2.0 ** (drop + fmt.min_exponent))
    np.add(y, anchor, out=small.view(y.dtype))
    np.subtract(small, anchor.view(bits.dtype), out=small)
    # Normal codes: the upper bits, rounded on the lower ones, with the other exponent bias.
    bias = (1 << (float_bits - 2 - mantissa_bits)) - 1
    np.right_shift(bits, drop, out=odd)
    np.bitwise_and(odd, 1, out=odd)
    np.add(bits, (1 << (drop - 1)) - 1 - ((bias + fmt.min_exponent - 1) << mantissa_bits), out=bits)
    np.add(bits, odd, out=bits)
    np.right_shift(bits, drop, out=bits)
    # Below 2^min_exponent `small` is the code and at most the first normal one; above, it is at least the code.
    np.maximum(bits, 1 << fmt.mantissa_bits, out=bits)
    np.minimum(bits, small, out=bits)
    return bits, signs

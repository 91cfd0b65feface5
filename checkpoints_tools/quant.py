"""Exact block codecs of released weights: FP8 (E4M3, 128 x 128 blocks) and FP4 (E2M1, 32 columns) <-> float.

Letters: R rows, C columns, B block rows, K block columns. Work goes in strips of rows that fit the processor's cache,
on integer views of the numbers: numpy's float8 and bfloat16 casts are slow and hold the interpreter lock, these do not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from fathom.hub import FP4_BLOCK, FP8_BLOCK

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)

STRIP_ELEMENTS = 1 << 17
E8M0_BIAS = 127
E8M0_NAN = 0xFF
E4M3_NAN = 0x7F
SCALES_PER_BLOCK = FP8_BLOCK // FP4_BLOCK
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

# w' = w * 2^d holds any E2M1 code w in E4M3 for -8 <= d <= 6, and nothing but zero below -11
_SHIFT_LOSSLESS, _SHIFT_MIN, _SHIFT_MAX = -8, -12, 6


@dataclasses.dataclass(frozen=True)
class _Format:
    """A small float: sign, exponent and mantissa bits from the top, subnormals below 2^min_exponent."""

    name: str
    block: tuple[int, int]
    bits: int
    mantissa_bits: int
    min_exponent: int
    largest: float
    largest_code: int
    zero_block_exponent: int


# An all-zero block has no smallest scale. It gets the one that the amax floors of the released quantisation give it:
# 1e-4 for FP8, 6 * 2^-126 for FP4. Elsewhere the floors would lose small blocks and are not applied.
_FP8 = _Format("FP8", (FP8_BLOCK, FP8_BLOCK), 8, 3, -6, 448.0, 0x7E, -22)
_FP4 = _Format("FP4", (1, FP4_BLOCK), 4, 1, 0, 6.0, 0x7, -126)


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
    dtype = _check_output(dtype)
    if codes.dtype != E4M3:
        raise ValueError(f"FP8 codes of dtype {codes.dtype}, expected {E4M3}")
    factors = _factors(_cover(codes.shape, scales, _FP8, row0, col0))
    out = np.empty(codes.shape, dtype)
    if not out.size:
        return out
    rows, columns = codes.shape
    can_overflow = float(factors.max()) * _FP8.largest >= float(ml_dtypes.finfo(dtype).max)
    powers = _are_powers_of_two(factors)
    exact = powers and float(factors.min()) >= 2.0**-124
    skip = col0 % FP8_BLOCK
    row_factors = np.repeat(factors, FP8_BLOCK, axis=1)[:, skip : skip + columns]
    raw = codes.view(np.uint8)
    buffers = _buffers(columns, np.float32, 2)
    for start, stop in _strips(rows, columns, row0 % FP8_BLOCK, FP8_BLOCK):
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
    dtype = _check_output(dtype)
    raw = _packed_bytes(packed, scales)
    if col0 % 2:
        raise ValueError(f"col0 {col0}, expected an even column: two share a byte")
    rows, width = raw.shape
    exponents = _cover((rows, 2 * width), scales, _FP4, row0, col0).view(np.uint8)
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
    for start, stop in _strips(rows, whole):
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
    bits = _value_bits(values)
    if scales is None:
        scales = _to_scales(_exponents(values, bits, _FP8), scale_dtype)
    _check_shape(scales, tuple(-(-size // FP8_BLOCK) for size in values.shape), "FP8")
    codes = np.empty(values.shape, np.uint8)
    for start, stop, strip in _encoded_strips(values, bits, scales, _FP8):
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
    bits = _value_bits(values)
    rows, columns = values.shape
    if columns % FP4_BLOCK:
        raise ValueError(f"{columns} columns cannot be cut into FP4 blocks, expected a multiple of {FP4_BLOCK}")
    if scales is None:
        scales = _to_scales(_exponents(values, bits, _FP4), E8M0)
    packed = np.empty((rows, columns // 2), np.uint8)
    _packed_bytes(packed, scales)
    _check_shape(scales, (rows, columns // FP4_BLOCK), "FP4")
    buffers = _buffers(columns, np.uint8, 2)
    for start, stop, strip in _encoded_strips(values, bits, scales, _FP4):
        codes, work = (buffer[: strip.size].reshape(strip.shape) for buffer in buffers)
        np.copyto(codes, strip, casting="unsafe")
        couples, high = codes.view("<u2"), work.view("<u2")
        np.right_shift(couples, 4, out=high)
        np.bitwise_or(couples, high, out=couples)
        np.copyto(packed[start:stop], couples, casting="unsafe")
    return packed.view(np.int8), scales


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
    raw = _packed_bytes(packed, scales)
    rows, width = raw.shape
    if 2 * width % FP4_BLOCK:
        raise ValueError(f"{2 * width} columns, FP4 storage needs a multiple of {FP4_BLOCK}")
    _check_shape(scales, (rows, 2 * width // FP4_BLOCK), "FP4")
    codes = np.empty((rows, 2 * width), np.uint8)
    if not codes.size:
        return codes.view(E4M3), np.empty([-(-size // FP8_BLOCK) for size in codes.shape], E8M0)
    exponents = scales.view(np.uint8).astype(np.int16)
    bands, groups = np.arange(0, rows, FP8_BLOCK), np.arange(0, exponents.shape[1], SCALES_PER_BLOCK)
    largest = np.maximum.reduceat(np.maximum.reduceat(exponents, bands, axis=0), groups, axis=1)
    block_exponents = np.maximum(largest - _SHIFT_MAX, 0)
    spread = np.repeat(np.repeat(block_exponents, FP8_BLOCK, axis=0)[:rows], SCALES_PER_BLOCK, axis=1)
    shifts = exponents - spread[:, : exponents.shape[1]]
    rows_of_table = (np.maximum(shifts, _SHIFT_MIN) - _SHIFT_MIN).astype(np.uint8)
    _refuse_lossy(raw, exponents, rows_of_table)
    table = _fp4_to_fp8_table()[0]
    pairs, buffers = codes.view(table.dtype), _lookup_buffers(width)
    for start, stop in _strips(rows, width):
        _look_up(table, rows_of_table[start:stop], raw[start:stop], pairs[start:stop], buffers)
    return codes.view(E4M3), block_exponents.astype(np.uint8).view(E8M0)


def check_scales(scales: np.ndarray, name: str) -> list[str]:
    """What is wrong with a tensor of block scales, at most one line, with the count and the first place.

    E8M0 scales may not be the byte 0xFF (NaN); float32 scales must be finite and above zero; there is no other dtype.
    """
    if scales.dtype == E8M0:
        wrong, expected = scales.view(np.uint8) == E8M0_NAN, "a power of two"
    elif scales.dtype == F32:
        wrong, expected = ~(np.isfinite(scales) & (scales > 0)), "a finite number above 0"
    else:
        return [f"{name}: scales of dtype {scales.dtype}, expected {E8M0} or {F32}"]
    if not wrong.any():
        return []
    place = tuple(int(index) for index in np.argwhere(wrong)[0])
    return [
        f"{name}: {int(wrong.sum())} of {scales.size} scales are wrong, the first {float(scales[place])} at "
        f"{list(place)}, expected {expected}"
    ]


# ---- strips, buffers, arguments


def _strips(rows: int, columns: int, first: int = 0, band: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about STRIP_ELEMENTS inside bands of `band` rows (1: no bands); row 0 is `first` in its band."""
    step = max(1, STRIP_ELEMENTS // columns)
    start = 0
    while start < rows:
        stop = min(start + step, rows)
        if band > 1:
            stop = min(stop, start + band - (first + start) % band)
        yield start, stop
        start = stop


def _buffers(columns: int, dtype: npt.DTypeLike, count: int) -> list[np.ndarray]:
    return [np.empty(max(STRIP_ELEMENTS, columns), dtype) for _ in range(count)]


def _check_output(dtype: npt.DTypeLike) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (F32, BF16):
        raise ValueError(f"dtype {dtype}, expected {F32} or {BF16}")
    _require_subnormals()
    return dtype


def _require_subnormals() -> None:
    if np.float32(2.0**-126) * np.float32(0.5) == 0:
        raise RuntimeError(
            "this thread flushes subnormal numbers to zero, which would change small weights; undo "
            "torch.set_flush_denormal(True), or convert in another thread"
        )


def _packed_bytes(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if packed.dtype not in (np.int8, np.uint8) or packed.ndim != 2:
        raise ValueError(f"packed FP4 is {packed.dtype} {list(packed.shape)}, expected int8 or uint8 [R, C/2]")
    if scales.dtype != E8M0:
        raise ValueError(f"FP4 scales of dtype {scales.dtype}, expected {E8M0}")
    return packed.view(np.uint8)


def _value_bits(values: np.ndarray) -> np.ndarray:
    """The values as unsigned integers of their width."""
    if values.dtype not in (F32, BF16) or values.ndim != 2:
        raise ValueError(f"values are {values.dtype} {list(values.shape)}, expected {F32} or {BF16} [R, C]")
    _require_subnormals()
    return values.view(np.uint32 if values.dtype == F32 else np.uint16)


def _check_shape(scales: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """The shape, and what `check_scales` finds."""
    if scales.shape != shape:
        raise ValueError(f"{what} scales of shape {list(scales.shape)}, expected {list(shape)}")
    if problems := check_scales(scales, f"{what} scales"):
        raise ValueError(problems[0])


def _cover(shape: tuple[int, ...], scales: np.ndarray, fmt: _Format, row0: int, col0: int) -> np.ndarray:
    """The scales of the blocks that a rectangle of `shape` at (row0, col0) touches."""
    if len(shape) != 2 or scales.ndim != 2 or row0 < 0 or col0 < 0:
        raise ValueError(
            f"codes {list(shape)} at row {row0}, column {col0} with scales {list(scales.shape)}, expected two "
            "dimensions and places from 0"
        )
    block = fmt.block
    first = row0 // block[0], col0 // block[1]
    last = -(-(row0 + shape[0]) // block[0]), -(-(col0 + shape[1]) // block[1])
    if scales.shape[0] < last[0] or scales.shape[1] < last[1]:
        raise ValueError(
            f"{shape[0]} x {shape[1]} codes at row {row0}, column {col0} need scales of at least {list(last)}, found "
            f"{list(scales.shape)}"
        )
    part = scales[first[0] : last[0], first[1] : last[1]]
    if problems := check_scales(part, f"scales from {list(first)}"):
        raise ValueError(problems[0])
    return part


def _factors(scales: np.ndarray) -> np.ndarray:
    """Scales as float32 numbers; every E8M0 scale is one, 2^-127 a subnormal one."""
    if scales.dtype == E8M0:
        return np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - E8M0_BIAS)
    return scales


def _are_powers_of_two(factors: np.ndarray) -> bool:
    return bool((np.frexp(factors)[0] == 0.5).all())


# ---- decoding


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
    factors = _factors(np.arange(E8M0_NAN, dtype=np.uint8).view(E8M0))
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
    """Two E4M3 codes as one integer at (shift - _SHIFT_MIN) << 8 | packed byte, and whether they lose something."""
    values = np.ldexp(_fp4_values(), np.arange(_SHIFT_MIN, _SHIFT_MAX + 1)[:, None, None])
    codes = values.astype(E4M3)
    lossy = (codes.astype(np.float32) != values).any(axis=-1)
    return codes.view(np.uint16).reshape(-1), lossy


def _lookup_buffers(width: int) -> list[np.ndarray]:
    return _buffers(width, np.uint16, 1) + _buffers(width, np.intp, 1)


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
    suspects = np.argwhere(rows_of_table < _SHIFT_LOSSLESS - _SHIFT_MIN) // (FP8_BLOCK, SCALES_PER_BLOCK)
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


# ---- encoding


def _as_float(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of float32 or bfloat16 bits."""
    return (bits if bits.dtype == np.uint32 else bits.astype(np.uint32) << 16).view(np.float32)


def _exponents(values: np.ndarray, bits: np.ndarray, fmt: _Format) -> np.ndarray:
    """Each block's scale as k of 2^k, int16. Magnitudes order as their bits do."""
    rows, columns = bits.shape
    band = fmt.block[0]
    exponents = np.zeros((-(-rows // band), -(-columns // fmt.block[1])), np.int16)
    if not bits.size:
        return exponents
    bands = np.zeros((len(exponents), columns) if fmt is _FP8 else 0, bits.dtype)
    (buffer,) = _buffers(columns, bits.dtype, 1)
    for start, stop in _strips(rows, columns, 0, band):
        magnitudes = buffer[: (stop - start) * columns].reshape(-1, columns)
        np.bitwise_and(bits[start:stop], np.iinfo(bits.dtype).max >> 1, out=magnitudes)
        if fmt is _FP8:
            largest = bands[start // band]
            np.maximum(largest, magnitudes.max(axis=0), out=largest)
        else:
            largest = magnitudes.reshape(stop - start, -1, FP4_BLOCK).max(axis=-1)
            exponents[start:stop] = _smallest_exponents(_as_float(largest), fmt, values)
    if fmt is _FP8:
        largest = np.maximum.reduceat(bands, np.arange(0, columns, FP8_BLOCK), axis=1)
        exponents[...] = _smallest_exponents(_as_float(largest), fmt, values)
    return exponents


def _smallest_exponents(amax: np.ndarray, fmt: _Format, values: np.ndarray) -> np.ndarray:
    """k of the smallest 2^k with amax <= largest * 2^k; where an amax is not finite, refuses the first such value."""
    if not np.isfinite(amax).all():
        for start, stop in _strips(*values.shape):
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
    return scales if np.dtype(dtype) == E8M0 else _factors(scales)


def _encoded_strips(
    values: np.ndarray, bits: np.ndarray, scales: np.ndarray, fmt: _Format
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Row ranges and their codes [rows, C], in integers that the next range overwrites."""
    rows, columns = values.shape
    if not values.size:
        return
    divisors = _divisors(scales)
    per_row = np.repeat(divisors, FP8_BLOCK, axis=1)[:, :columns] if fmt is _FP8 else divisors[:, :, None]
    integer = np.int32 if divisors.dtype == F32 else np.int64
    buffers = _buffers(columns, divisors.dtype, 1) + _buffers(columns, integer, 3)
    band = fmt.block[0]
    for start, stop in _strips(rows, columns, 0, band):
        y, *work = (buffer[: (stop - start) * columns].reshape(-1, columns) for buffer in buffers)
        _load(bits[start:stop], y)
        with np.errstate(over="ignore", invalid="ignore"):
            if fmt is _FP8:
                _divide(y, per_row[start // band])
            else:
                _divide(y.reshape(stop - start, -1, FP4_BLOCK), per_row[start:stop])
            magnitudes, signs = _round_to_codes(y, work, fmt)
        if magnitudes.max() > fmt.largest_code:
            row, column = np.argwhere(magnitudes > fmt.largest_code)[0]
            _refuse(values, start + row, column, fmt, float(scales[(start + row) // band, column // fmt.block[1]]))
        np.bitwise_or(magnitudes, signs, out=magnitudes)
        yield start, stop, magnitudes


def _refuse(values: np.ndarray, row: int, column: int, fmt: _Format, scale: float) -> NoReturn:
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
    return inverse if _are_powers_of_two(scales) and np.isfinite(inverse).all() else wide


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


def _round_to_codes(y: np.ndarray, work: list[np.ndarray], fmt: _Format) -> tuple[np.ndarray, np.ndarray]:
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

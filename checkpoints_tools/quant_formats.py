"""The quantised number formats of the releases, their scales, and what decoding and encoding share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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



@dataclasses.dataclass(frozen=True)
class Format:
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
FP8 = Format("FP8", (FP8_BLOCK, FP8_BLOCK), 8, 3, -6, 448.0, 0x7E, -22)
FP4 = Format("FP4", (1, FP4_BLOCK), 4, 1, 0, 6.0, 0x7, -126)


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


def row_strips(rows: int, columns: int, first: int = 0, band: int = 1) -> Iterator[tuple[int, int]]:
    """Row ranges of about STRIP_ELEMENTS inside bands of `band` rows (1: no bands); row 0 is `first` in its band."""
    step = max(1, STRIP_ELEMENTS // columns)
    start = 0
    while start < rows:
        stop = min(start + step, rows)
        if band > 1:
            stop = min(stop, start + band - (first + start) % band)
        yield start, stop
        start = stop


def make_buffers(columns: int, dtype: npt.DTypeLike, count: int) -> list[np.ndarray]:
    return [np.empty(max(STRIP_ELEMENTS, columns), dtype) for _ in range(count)]


def check_output(dtype: npt.DTypeLike) -> np.dtype:
    dtype = np.dtype(dtype)
    if dtype not in (F32, BF16):
        raise ValueError(f"dtype {dtype}, expected {F32} or {BF16}")
    require_subnormals()
    return dtype


def require_subnormals() -> None:
    if np.float32(2.0**-126) * np.float32(0.5) == 0:
        raise RuntimeError(
            "this thread flushes subnormal numbers to zero, which would change small weights; undo "
            "torch.set_flush_denormal(True), or convert in another thread"
        )


def packed_bytes(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    if packed.dtype not in (np.int8, np.uint8) or packed.ndim != 2:
        raise ValueError(f"packed FP4 is {packed.dtype} {list(packed.shape)}, expected int8 or uint8 [R, C/2]")
    if scales.dtype != E8M0:
        raise ValueError(f"FP4 scales of dtype {scales.dtype}, expected {E8M0}")
    return packed.view(np.uint8)


def value_bits(values: np.ndarray) -> np.ndarray:
    """The values as unsigned integers of their width."""
    if values.dtype not in (F32, BF16) or values.ndim != 2:
        raise ValueError(f"values are {values.dtype} {list(values.shape)}, expected {F32} or {BF16} [R, C]")
    require_subnormals()
    return values.view(np.uint32 if values.dtype == F32 else np.uint16)


def check_shape(scales: np.ndarray, shape: tuple[int, ...], what: str) -> None:
    """The shape, and what `check_scales` finds."""
    if scales.shape != shape:
        raise ValueError(f"{what} scales of shape {list(scales.shape)}, expected {list(shape)}")
    if problems := check_scales(scales, f"{what} scales"):
        raise ValueError(problems[0])


def covering_scales(shape: tuple[int, ...], scales: np.ndarray, fmt: Format, row0: int, col0: int) -> np.ndarray:
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


def scale_factors(scales: np.ndarray) -> np.ndarray:
    """Scales as float32 numbers; every E8M0 scale is one, 2^-127 a subnormal one."""
    if scales.dtype == E8M0:
        return np.ldexp(np.float32(1), scales.view(np.uint8).astype(np.int32) - E8M0_BIAS)
    return scales


def are_powers_of_two(factors: np.ndarray) -> bool:
    return bool((np.frexp(factors)[0] == 0.5).all())

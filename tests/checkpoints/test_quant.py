"""The block codecs, bit for bit: against PyTorch's types, and against scalar references in exact fractions."""

from __future__ import annotations

import itertools
import math
import platform
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools import quant_formats
from checkpoints_tools.quant import (
    check_scales,
    decode_fp4,
    decode_fp8,
    encode_fp4,
    encode_fp8,
    fp4_to_fp8,
)
from checkpoints_tools.quant_formats import BF16, E4M3, E8M0, F32

FP8_VALUES = [Fraction(float(v)) for v in np.arange(0x7F, dtype=np.uint8).view(E4M3)]
FP4_VALUES = [Fraction(v) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16], ids=str)


def bits(array: np.ndarray) -> np.ndarray:
    """What is compared: -0 is not 0, and NaN is itself."""
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.itemsize])


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(bits(found), bits(expected))


def e8m0(*shape: int, low: int = 0, high: int = 254, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high + 1, shape, np.uint8).view(E8M0)


def random_codes(*shape: int, seed: int = 0) -> np.ndarray:
    """Every byte but the two NaN codes."""
    codes = np.random.default_rng(seed).integers(0, 254, shape, np.uint8)
    return (codes + (codes >= 0x7F)).view(E4M3)


def random_packed(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, shape, np.int8)


def scale_of(value: np.generic) -> Fraction:
    return Fraction(2) ** (int(value.view(np.uint8)) - 127) if value.dtype == E8M0 else Fraction(float(value))


def nearest(x: Fraction, dtype: np.dtype) -> np.generic:
    """x rounded once to float32 or bfloat16, ties to even; infinite beyond."""
    mantissa, bias = (23, 127) if dtype == F32 else (7, 127)
    magnitude = abs(x)
    exponent = -126
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa)
    count = round(magnitude / step)  # Python rounds a Fraction half to even
    code = count + ((exponent + bias - 1) << mantissa)
    unsigned = np.uint32 if dtype == F32 else np.uint16
    sign = (x < 0) << (8 * dtype.itemsize - 1)
    return np.array(min(code, 255 << mantissa) | sign, unsigned).view(dtype)[()]


def code_of(x: Fraction, values: list[Fraction]) -> int | None:
    """Index of the value nearest to |x|, ties to the even index; None beyond half a step past the largest."""
    step = values[-1] - values[-2]
    extended = [*values, values[-1] + step]
    best = min(range(len(extended)), key=lambda i: (abs(extended[i] - abs(x)), i % 2))
    return best if best < len(values) else None


def smallest_scale(amax: Fraction, largest: int) -> int:
    exponent = -127
    while amax > largest * Fraction(2) ** exponent:
        exponent += 1
    return exponent


# ---- decoding


@pytest.mark.reference
def test_fp8_decodes_as_pytorch_for_every_code_and_scale():
    torch = pytest.importorskip("torch")
    codes = np.tile(np.arange(256, dtype=np.uint8).reshape(2, 128), (1, 255)).view(E4M3)
    scales = np.arange(255, dtype=np.uint8).view(E8M0)[None]
    of_torch = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn).float()
    scale_of_torch = torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e8m0fnu).float()
    product = of_torch * scale_of_torch.repeat_interleave(128, dim=1)
    infinite = product.isinf().numpy()
    assert infinite.any(axis=0).reshape(255, 128).any(axis=1).sum() == 8  # from 2^120 on
    fitting = np.where(infinite, np.uint8(0), codes.view(np.uint8)).view(E4M3)
    product[torch.from_numpy(infinite)] = 0
    for dtype, expected in ((F32, product.numpy()), (BF16, product.bfloat16().view(torch.uint16).numpy().view(BF16))):
        found = decode_fp8(fitting, scales, dtype)
        for column in range(0, found.shape[1], 128):  # each scale alone, where no other decides how it is rounded
            part = slice(column, column + 128)
            same(decode_fp8(fitting[:, part], scales, dtype, col0=column), found[:, part])
        nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(found), nan)
        assert nan.sum() == 2 * 255
        same(found[~nan], expected[~nan])
        for row, column in np.argwhere(infinite):
            with pytest.raises(ValueError, match=rf"row {row}, column {column} is infinite in {dtype}"):
                decode_fp8(codes[row : row + 1, column : column + 1], scales, dtype, row0=row, col0=column)


@pytest.mark.reference
def test_fp4_decodes_as_pytorch_for_every_byte_and_scale():
    torch = pytest.importorskip("torch")
    packed = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 255))
    scales = np.tile(np.arange(255, dtype=np.uint8), (16, 1)).view(E8M0)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    raw = torch.from_numpy(packed.astype(np.int64))
    values = torch.stack([table[raw & 15], table[raw >> 4]], dim=-1).flatten(1)
    scale_of_torch = torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e8m0fnu).float()
    product = values * scale_of_torch.repeat_interleave(32, dim=1)
    infinite = product.isinf()
    assert infinite.any(dim=0).reshape(255, 32).any(dim=1).nonzero().flatten().tolist() == [253, 254]
    fits = ~infinite.reshape(16, -1, 32).any(dim=-1).any(dim=0)
    end = int(fits.sum())
    for dtype, expected in ((F32, product.numpy()), (BF16, product.bfloat16().view(torch.uint16).numpy().view(BF16))):
        same(decode_fp4(packed[:, : 16 * end], scales, dtype), expected[:, : 32 * end])
        same(decode_fp4(packed.view(np.int8)[:, : 16 * end], scales, dtype), expected[:, : 32 * end])
        for row, column in np.argwhere(infinite.numpy()):
            start = column // 2 * 2
            byte = packed[row : row + 1, start // 2 : start // 2 + 1] & (0xF0 if column % 2 else 0x0F)
            with pytest.raises(ValueError, match=rf"row {row}, column {column} is infinite in {dtype}"):
                decode_fp4(byte, scales, dtype, row0=row, col0=start)
        # what fits under the largest scale
        small = packed[:, -16:] & 0x99
        assert np.isfinite(decode_fp4(small, scales, dtype, col0=254 * 32).astype(np.float64)).all()


@DTYPES
def test_float32_scales_round_the_product_once(dtype):
    """Products whose float32 rounding is a bfloat16 tie, where rounding twice may be wrong, and others."""
    rng = np.random.default_rng(1)
    scales = rng.integers(0x00000001, 0x7A000000, 1 << 21, np.uint32).view(np.float32)
    code = np.array([-1.875], E4M3)
    with np.errstate(under="ignore"):
        product = code.astype(np.float32) * scales
    tie = (product.view(np.uint32) & 0xFFFF) == 0x8000
    moved = product.astype(np.float64) != code.astype(np.float64) * scales.astype(np.float64)
    scales = np.concatenate([scales[tie & moved][:200], scales[tie & ~moved][:20], scales[:200]])
    assert len(scales) > 220
    codes = np.repeat(code, 128 * len(scales))[None]
    found = decode_fp8(codes, scales[None], dtype)[0, ::128]
    expected = np.array([nearest(Fraction(-1.875) * Fraction(float(s)), dtype) for s in scales])
    same(found, expected)
    if dtype == BF16:
        twice = (code.astype(np.float32) * scales).astype(BF16)
        assert (twice != expected).sum() > 20
    nan = np.full(codes.shape, 0xFF, np.uint8).view(E4M3)  # the bits of -480, with the same ties
    assert np.isnan(decode_fp8(nan, scales[None], dtype)).all()


@DTYPES
@pytest.mark.parametrize("shape", [(129, 257), (1, 1), (100, 130), (3, 128), (256, 4)])
def test_fp8_of_any_shape(shape, dtype):
    codes = random_codes(*shape)
    blocks = -(-shape[0] // 128), -(-shape[1] // 128)
    scales = e8m0(*blocks, high=246)
    other = np.random.default_rng(2).integers(1, 0x7B000000, blocks, np.uint32).view(np.float32)
    for given_scales in (scales, other):
        found = decode_fp8(codes, given_scales, dtype)
        assert found.shape == shape
        for row, column in itertools.islice(np.ndindex(shape), 0, None, max(1, math.prod(shape) // 300)):
            scale = scale_of(given_scales[row // 128, column // 128])
            code = codes[row, column]
            expected = nearest(Fraction(float(code)) * scale, dtype)
            if np.signbit(code):  # -0 and what rounds to it
                expected = np.copysign(expected, dtype.type(-1))
            same(found[row : row + 1, column], np.array([expected], dtype))


@pytest.mark.parametrize("strip", [1, 40, 1 << 17])
@pytest.mark.parametrize(
    ("row0", "rows", "col0", "columns"),
    [(0, 260, 0, 288), (1, 1, 1, 1), (127, 2, 127, 2), (5, 200, 33, 100), (128, 132, 128, 160), (259, 1, 2, 286)],
)
@DTYPES
def test_a_part_is_decoded_as_in_the_whole(monkeypatch, strip, row0, rows, col0, columns, dtype):
    part = slice(row0, row0 + rows), slice(col0, col0 + columns)
    codes, scales = random_codes(260, 288), e8m0(3, 3, high=246)
    loose = np.random.default_rng(4).integers(1, 0x7B000000, (3, 3), np.uint32).view(np.float32)
    whole = [decode_fp8(codes, s, dtype) for s in (scales, loose)]
    packed, small = random_packed(260, 144), e8m0(260, 9, high=252)
    even = slice(col0 // 2 * 2, (col0 + columns) // 2 * 2 + 2 * (columns == 1))
    whole4 = decode_fp4(packed, small, dtype)
    monkeypatch.setattr(quant_formats, "STRIP_ELEMENTS", strip)
    for expected, given_scales in zip(whole, (scales, loose), strict=True):
        same(decode_fp8(codes[part], given_scales, dtype, row0=row0, col0=col0), expected[part])
    found = decode_fp4(packed[part[0], even.start // 2 : even.stop // 2], small, dtype, row0=row0, col0=even.start)
    same(found, whole4[part[0], even])
    assert found.size


def test_fp4_low_nibble_is_the_even_column():
    packed = np.zeros((1, 16), np.uint8)
    packed[0, 1] = 0xF2  # even column 2: code 2 = 1.0; odd column 3: code 15 = -6
    scales = np.array([[128]], np.uint8).view(E8M0)
    assert decode_fp4(packed, scales, F32)[0, :6].tolist() == [0, 0, 2, -12, 0, 0]


# ---- round trips


@DTYPES
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(129, 257), (1, 1), (100, 130), (256, 128), (2, 700)]),
    span=st.sampled_from([(0, 3), (0, 30), (100, 130), (0, 246), (240, 246)]),
    sparse=st.booleans(),
)
def test_fp8_numbers_come_back(dtype, seed, shape, span, sparse):
    codes = random_codes(*shape, seed=seed)
    if sparse:  # blocks whose largest code is small, or that are zero
        keep = np.random.default_rng(seed).integers(0, 256, dtype=np.uint8)
        codes = (codes.view(np.uint8) & (keep | 0x80)).view(E4M3)
        codes[np.isnan(codes.astype(np.float32))] = 0
    blocks = -(-shape[0] // 128), -(-shape[1] // 128)
    scales = e8m0(*blocks, low=span[0], high=span[1], seed=seed)
    values = decode_fp8(codes, scales, dtype)
    for scale_dtype in (E8M0, F32):
        again, new = encode_fp8(values, scale_dtype)
        assert (again.dtype, new.dtype, new.shape) == (E4M3, scale_dtype, blocks)
        same(decode_fp8(again, new, dtype), values)
    if dtype == F32 or span[0] >= 3:
        for given_scales in (scales, scales.astype(np.float32)):
            kept, returned = encode_fp8(values, scales=given_scales)
            same(kept, codes)
            assert returned is given_scales


def test_fp8_numbers_come_back_at_the_ends_of_the_scales():
    """Every code alone in its block under every scale: subnormal codes, 448 exactly, both ends of the scales."""
    codes = np.arange(256, dtype=np.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    for dtype in (F32, BF16):
        matrix = np.zeros((1, 128 * len(finite)), np.uint8)
        matrix[0, ::128] = finite
        for byte in range(255):
            fits = np.array([float(abs(v)) * 2.0 ** (byte - 127) < 2.0**128 for v in finite.view(E4M3)])
            part = matrix[:, np.repeat(fits, 128)].view(E4M3)
            values = decode_fp8(part, np.full((1, fits.sum()), byte, np.uint8).view(E8M0), dtype)
            again, scales = encode_fp8(values)
            same(decode_fp8(again, scales, dtype), values)


@DTYPES
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 32), (5, 96), (130, 64)]),
    span=st.sampled_from([(0, 2), (0, 252), (100, 130), (250, 252)]),
    keep=st.sampled_from([0xFF, 0x99, 0xAA, 0x88, 0xBB]),
)
def test_fp4_numbers_come_back(dtype, seed, shape, span, keep):
    packed = random_packed(shape[0], shape[1] // 2, seed=seed) & np.uint8(keep).view(np.int8)
    scales = e8m0(shape[0], shape[1] // 32, low=span[0], high=span[1], seed=seed)
    values = decode_fp4(packed, scales, dtype)
    again, new = encode_fp4(values)
    assert (again.dtype, new.dtype) == (np.int8, E8M0)
    same(decode_fp4(again, new, dtype), values)
    same(encode_fp4(values, scales=scales)[0], packed)


@DTYPES
def test_given_float32_scales_give_the_bytes(dtype):
    """Not powers of two: values are rounded products, some a little beyond 448 times the scale."""
    codes = random_codes(300, 500)
    scales = np.random.default_rng(3).uniform(1e-6, 1e-2, (3, 4)).astype(np.float32)
    values = decode_fp8(codes, scales, dtype)
    beyond = np.abs(values.astype(np.float64)) > 448 * np.kron(scales, np.ones((128, 128)))[:300, :500]
    assert beyond.any()
    same(encode_fp8(values, scales=scales)[0], codes)


def test_two_encodings_of_one_block():
    """Largest code 224: the encoder has the other bytes, with the given scales the same."""
    codes = np.array([[224.0, -1.0]], E4M3)
    scales = np.array([[127]], np.uint8).view(E8M0)
    values = decode_fp8(codes, scales, F32)
    again, new = encode_fp8(values)
    assert again.astype(np.float32).tolist() == [[448.0, -2.0]] and new.view(np.uint8).item() == 126
    same(encode_fp8(values, scales=scales)[0], codes)


@DTYPES
def test_zero_blocks_get_the_scale_of_the_released_floor(dtype):
    values = np.zeros((130, 160), dtype)
    values[3, 5] = -0.0
    codes, scales = encode_fp8(values)
    assert (scales.view(np.uint8) == 127 - 22).all()
    assert bits(codes)[3, 5] == 0x80 and bits(codes).sum() == 0x80
    packed, scales = encode_fp4(values)
    assert (scales.view(np.uint8) == 1).all()
    assert packed.view(np.uint8)[3, 2] == 0x80 and packed.view(np.uint8).sum() == 0x80


# ---- rounding and scales, by the scalar reference

TRICKY = [0.0, -0.0, 448.0, 449.0, 464.0, 6.0, 7.0, 5.0, 2.5, 3.5, 0.25, 0.75, 1.25, 1.75, 2.0**-9, 2.0**-10]
TRICKY += [3 * 2.0**-10, 2.0**-149, -(2.0**-126), 2.0**-133, 3.4028234663852886e38, 1.0000001192092896, 17 * 2.0**-10]
TRICKY += [float(np.nextafter(np.float32(x), np.float32(y))) for x in (448.0, 6.0, 2.0**-10, 0.25) for y in (0, 1e9)]
FLOATS = st.one_of(
    st.sampled_from(TRICKY),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.tuples(st.integers(-(2**11), 2**11), st.integers(-20, -2)).map(lambda t: math.ldexp(*t)),
)


def check_codes(found: np.ndarray, values: np.ndarray, scale: Fraction, table: list[Fraction], sign: int) -> None:
    for code, value in zip(found.tolist(), values.ravel(), strict=True):
        expected = code_of(Fraction(float(value)) / scale, table)
        assert expected is not None
        assert code == expected | (sign if np.signbit(value) else 0), (value, scale)


@DTYPES
@settings(max_examples=300, deadline=None)
@given(numbers=st.lists(FLOATS, min_size=1, max_size=20), exponent=st.integers(-30, 30))
def test_codes_and_scale_are_those_of_the_scalar_reference(dtype, numbers, exponent):
    with np.errstate(over="ignore"):
        values = np.array([numbers], np.float64).astype(np.float32)
        scaled = np.ldexp(values, exponent)
        values = np.where(np.isfinite(scaled), scaled, values).astype(dtype)
    values[~np.isfinite(values.astype(np.float32))] = 1
    amax = max(Fraction(abs(float(v))) for v in values.ravel())
    codes, scales = encode_fp8(values)
    expected = smallest_scale(amax, 448) if amax else -22
    assert scales.view(np.uint8).tolist() == [[expected + 127]]
    check_codes(bits(codes).ravel(), values, Fraction(2) ** expected, FP8_VALUES, 0x80)

    padded = np.zeros((1, 32), dtype)
    padded[:, : values.size] = values
    packed, scales = encode_fp4(padded)
    expected = smallest_scale(amax, 6) if amax else -126
    assert scales.view(np.uint8).tolist() == [[expected + 127]]
    unpacked = np.stack([packed.view(np.uint8) & 15, packed.view(np.uint8) >> 4], axis=-1).ravel()
    check_codes(unpacked, padded, Fraction(2) ** expected, FP4_VALUES, 8)


@pytest.mark.parametrize("scale", [1.0, 0.7, 1.9999998807907104, 2.0**-149, 2.0**127])
def test_given_scales_round_once_to_the_nearest(scale):
    """Around every tie of every code, under scales that are no powers of two or have no float32 inverse."""
    scale = np.float32(scale)
    edges = [float((a + b) / 2) * float(scale) for a, b in itertools.pairwise(FP8_VALUES)]
    edges = np.array([edge for edge in edges if edge < 3e38], np.float64).astype(np.float32)
    values = np.concatenate([np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(3e38))])
    found = encode_fp8(values[None], scales=np.full((1, -(-values.size // 128)), scale))[0]
    check_codes(bits(found).ravel(), values, Fraction(float(scale)), FP8_VALUES, 0x80)


@pytest.mark.parametrize(("largest", "floor"), [(448.0, 1e-4), (6.0, 6 * 2.0**-126)])
def test_scales_are_the_released_ones(largest, floor):
    """The released float32 product, rounded up to a power of two.

    Both rules only grow with amax, so they are one rule when they agree at each largest * 2^k and its neighbours.
    """
    exponents = np.arange(-126 if largest == 6 else -22, 120)
    amax = np.float32(largest) * np.exp2(exponents).astype(np.float32)
    amax = np.concatenate([amax, np.nextafter(amax, np.float32(0)), np.nextafter(amax, np.float32(3e38))])
    ratio = np.maximum(amax, np.float32(floor)) * np.float32(1 / largest)
    raw = ratio.view(np.uint32)
    released = (raw >> 23) + ((raw & 0x7FFFFF) != 0)
    if largest == 448:
        values = np.zeros((1, 128 * amax.size), np.float32)
        values[0, 127::128] = -amax
        scales = encode_fp8(values)[1]
        floored = encode_fp8(values, F32)[1]
        np.testing.assert_array_equal(floored.view(np.uint32) >> 23, scales.view(np.uint8))
    else:
        values = np.zeros((amax.size, 32), np.float32)
        values[:, 31] = -amax
        scales = encode_fp4(values)[1]
    normal = ratio >= 2.0**-126
    assert normal.sum() >= amax.size - 1
    np.testing.assert_array_equal(scales.view(np.uint8).ravel()[normal], released[normal])


# ---- FP4 to FP8


@pytest.mark.parametrize("shape", [(256, 256), (1, 32), (130, 160)])
@pytest.mark.parametrize("low", [0, 3, 100, 238])
def test_fp4_to_fp8_is_the_same_numbers(monkeypatch, shape, low):
    monkeypatch.setattr(quant_formats, "STRIP_ELEMENTS", 1000)
    packed = random_packed(shape[0], shape[1] // 2)
    scales = e8m0(shape[0], shape[1] // 32, low=low, high=low + 14)
    codes, new = fp4_to_fp8(packed, scales)
    assert new.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for dtype in (F32, BF16):
        same(decode_fp8(codes, new, dtype), decode_fp4(packed, scales, dtype))
    raw = scales.view(np.uint8).astype(int)
    for row, column in np.ndindex(new.shape):
        largest = raw[128 * row : 128 * row + 128, 4 * column : 4 * column + 4].max()
        assert new.view(np.uint8)[row, column] == max(largest - 6, 0)


@pytest.mark.reference
def test_fp4_to_fp8_has_the_bytes_of_the_released_formula():
    torch = pytest.importorskip("torch")
    packed, scales = random_packed(128, 64), e8m0(128, 4, low=110, high=124)
    codes, new = fp4_to_fp8(packed, scales)
    values = torch.from_numpy(decode_fp4(packed, scales, F32))
    largest = torch.from_numpy(scales.view(np.uint8)).view(torch.float8_e8m0fnu).float().max()
    expected = (values / (largest / 2**6)).to(torch.float8_e4m3fn)
    np.testing.assert_array_equal(bits(codes), expected.view(torch.uint8).numpy())
    assert bits(new).item() == scales.view(np.uint8).max() - 6


@pytest.mark.parametrize(
    ("code", "spread"), [(1, 14), (2, 15), (3, 14), (4, 16), (5, 15), (6, 17), (7, 16), (0, 200), (8, 200)]
)
def test_fp4_to_fp8_refuses_exactly_what_would_be_lost(code, spread):
    """One code far below the block's largest scale: held down to `spread`, refused one further."""
    packed = np.zeros((260, 160), np.uint8)
    scales = np.full((260, 10), 230, np.uint8)
    packed[129, 83] = code << 4
    scales[129, 5] = 230 - spread
    codes, new = fp4_to_fp8(packed, scales.view(E8M0))
    same(decode_fp8(codes, new, F32), decode_fp4(packed, scales.view(E8M0), F32))
    scales[129, 5] -= 1
    if code in (0, 8):
        codes, new = fp4_to_fp8(packed, scales.view(E8M0))
        same(decode_fp8(codes, new, F32), decode_fp4(packed, scales.view(E8M0), F32))
        return
    found = rf"block \[1, 1\] \(rows from 128, columns from 128\).*2\^{103 - spread - 1} to 2\^103"
    with pytest.raises(ValueError, match=found):
        fp4_to_fp8(packed, scales.view(E8M0))


def test_fp4_to_fp8_at_the_bottom_of_the_scales():
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for byte in range(8):
        scales = np.full((16, 1), byte, np.uint8).view(E8M0)
        codes, new = fp4_to_fp8(packed, scales)
        assert bits(new).item() == max(byte - 6, 0)
        for dtype in (F32, BF16):
            same(decode_fp8(codes, new, dtype), decode_fp4(packed, scales, dtype))


# ---- refusals and other inputs


def test_inputs_may_be_views_and_empty(monkeypatch):
    codes, scales = random_codes(257, 300), e8m0(3, 3, high=240)
    values = decode_fp8(codes, scales, F32)
    flipped = np.ascontiguousarray(codes.T).T
    flipped.flags.writeable = False
    same(decode_fp8(flipped, scales, F32), values)
    expected, packed = encode_fp8(values), encode_fp4(values[:, :288])
    monkeypatch.setattr(quant_formats, "STRIP_ELEMENTS", 1000)
    wide = np.asfortranarray(values)
    for found, wanted in zip((*encode_fp8(wide), *encode_fp4(wide[:, :288])), (*expected, *packed), strict=True):
        same(found, wanted)
    shifted = np.asfortranarray(packed[0])
    same(decode_fp4(shifted, packed[1], BF16), decode_fp4(*packed, BF16))
    for found, wanted in zip(fp4_to_fp8(*encode_fp4(np.ones((9, 64), F32))), ((9, 64), (1, 1)), strict=True):
        assert found.shape == wanted
    for shape in ((0, 32), (0, 0), (5, 0)):
        nothing = np.zeros(shape, np.float32)
        assert decode_fp8(*encode_fp8(nothing), BF16).shape == shape
        assert decode_fp4(*encode_fp4(nothing), BF16).shape == shape
        assert fp4_to_fp8(*encode_fp4(nothing))[0].shape == shape


@DTYPES
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encoding_refuses_what_is_not_finite(dtype, bad):
    values = np.ones((300, 320), dtype)
    values[140, 200] = values[141, 2] = bad
    for encode in (encode_fp8, encode_fp4):
        with pytest.raises(ValueError, match=rf"value {bad} at row 140, column 200"):
            encode(values)
    for encode, shape in ((encode_fp8, (3, 3)), (encode_fp4, (300, 10))):
        with pytest.raises(ValueError, match=rf"value {bad} at row 140, column 200"):
            encode(values, scales=np.ones(shape, E8M0))


@pytest.mark.parametrize(("encode", "fits", "shape"), [(encode_fp8, 464.0, (2, 1)), (encode_fp4, 6.9999995, (130, 3))])
def test_given_scales_refuse_what_does_not_fit(encode, fits, shape):
    """464 is the tie between 448 and the code that is NaN, and goes to the even 448; 7 would go to 8."""
    values = np.full((130, 96), -1.0, np.float32)
    scales = np.full(shape, 4.0, np.float32).astype(E8M0)
    values[129, 70] = -4 * fits
    encode(values, scales=scales)
    values[129, 70] = np.nextafter(values[129, 70], np.float32(-1e9))
    found = r"value -\d+\.\d+ at row 129, column 70 does not fit the scale 4.0"
    with pytest.raises(ValueError, match=found):
        encode(values, scales=scales)


def test_given_scales_refuse_without_warnings():
    """Quotients beyond float32, and the signalling NaN."""
    values = np.array([[1e38, 1.0]], np.float32)
    with pytest.raises(ValueError, match="value 9.99.*e\\+37 at row 0, column 0 does not fit"):
        encode_fp8(values, scales=np.array([[0]], np.uint8).view(E8M0))
    values.view(np.uint32)[0, 1] = 0x7F800001
    with pytest.raises(ValueError, match="value nan at row 0, column 1"):
        encode_fp8(values, scales=np.full((1, 1), 2.0**126, np.float32))


def test_decoding_refuses_wrong_inputs():
    codes, scales = random_codes(130, 260), e8m0(2, 3, high=200)
    packed, small = random_packed(130, 160), e8m0(130, 10, high=200)
    refused = [
        (lambda: decode_fp8(codes, scales, np.float16), "dtype float16, expected float32 or bfloat16"),
        (lambda: decode_fp8(codes.view(np.uint8), scales, F32), "FP8 codes of dtype uint8"),
        (lambda: decode_fp8(codes, scales.view(np.uint8), F32), "scales of dtype uint8"),
        (lambda: decode_fp8(codes, scales[:, :2], F32), r"at least \[2, 3\], found \[2, 2\]"),
        (lambda: decode_fp8(codes, scales, F32, row0=127), r"at least \[3, 3\], found \[2, 3\]"),
        (lambda: decode_fp8(codes, scales, F32, col0=-1), "column -1"),
        (lambda: decode_fp8(codes[0], scales, F32), "expected two dimensions"),
        (lambda: decode_fp4(packed.view(E4M3), small, F32), "packed FP4 is float8_e4m3fn"),
        (lambda: decode_fp4(packed, small.astype(np.float32), F32), "FP4 scales of dtype float32"),
        (lambda: decode_fp4(packed, small, F32, col0=1), "col0 1, expected an even column"),
        (lambda: decode_fp4(packed, small, F32, row0=1), r"at least \[131, 10\], found \[130, 10\]"),
        (lambda: decode_fp4(packed, small, F32, col0=2), r"at least \[130, 11\], found \[130, 10\]"),
        (lambda: fp4_to_fp8(packed[:, :-1], small), "318 columns"),
        (lambda: fp4_to_fp8(packed, small[:, 1:]), r"\[130, 9\], expected \[130, 10\]"),
        (lambda: encode_fp8(np.ones((2, 2))), "values are float64"),
        (lambda: encode_fp8(np.ones(2, np.float32)), r"values are float32 \[2\]"),
        (lambda: encode_fp8(np.ones((2, 2), F32), np.float16), "scale dtype float16"),
        (lambda: encode_fp8(np.ones((2, 2), F32), scales=scales), r"\[2, 3\], expected \[1, 1\]"),
        (lambda: encode_fp8(np.ones((2, 2), F32), scales=np.zeros((1, 1), F32)), "the first 0.0"),
        (lambda: encode_fp4(np.ones((2, 33), F32)), "33 columns"),
        (lambda: encode_fp4(np.ones((2, 32), F32), scales=np.ones((2, 1), F32)), "FP4 scales of dtype float32"),
        (lambda: encode_fp4(np.ones((2, 32), F32), scales=np.ones((1, 1), E8M0)), r"\[1, 1\], expected \[2, 1\]"),
    ]
    for call, text in refused:
        with pytest.raises(ValueError, match=text):
            call()
    bad = scales.copy()
    bad.view(np.uint8)[1, 2] = 0xFF
    decode_fp8(codes[:, :256], bad, F32)  # not this rectangle's scale
    with pytest.raises(ValueError, match=r"the first nan at \[1, 2\]"):
        decode_fp8(codes, bad, F32)
    bad = small.copy()
    bad.view(np.uint8)[7, 3] = 0xFF
    for call in (lambda: decode_fp4(packed, bad, F32), lambda: fp4_to_fp8(packed, bad)):
        with pytest.raises(ValueError, match=r"the first nan at \[7, 3\]"):
            call()


def test_check_scales():
    good = e8m0(4, 5)
    assert check_scales(good, "a.scale") == check_scales(np.full((2, 2), 2.0**-149, F32), "b.scale") == []
    good.view(np.uint8)[2, 1] = good.view(np.uint8)[3, 0] = 0xFF
    (problem,) = check_scales(good, "a.scale")
    assert problem == "a.scale: 2 of 20 scales are wrong, the first nan at [2, 1], expected a power of two"
    for bad in (np.nan, np.inf, -np.inf, 0.0, -0.0, -1.0):
        scales = np.ones((3, 3), np.float32)
        scales[1, 2] = bad
        (problem,) = check_scales(scales, "b.scale")
        assert problem.startswith(f"b.scale: 1 of 9 scales are wrong, the first {bad} at [1, 2]")
    assert "dtype bfloat16" in check_scales(np.ones(2, ml_dtypes.bfloat16), "c.scale")[0]


@pytest.mark.reference
def test_flushed_subnormals_are_refused():
    torch = pytest.importorskip("torch")
    codes, scales = random_codes(2, 2), np.ones((1, 1), E8M0)
    # Where torch cannot set the mode, no process gets into it and there is nothing to refuse; an x86-64 can.
    if not torch.set_flush_denormal(True):
        assert platform.machine().lower() not in ("x86_64", "amd64")
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        calls = (
            lambda: decode_fp8(codes, scales, F32),
            lambda: decode_fp4(np.zeros((1, 16), np.int8), scales, BF16),
            lambda: encode_fp8(np.ones((1, 1), F32)),
            lambda: encode_fp4(np.ones((1, 32), F32)),
        )
        for call in calls:
            with pytest.raises(RuntimeError, match="set_flush_denormal"):
                call()
    finally:
        torch.set_flush_denormal(False)

"""The safetensors reader and writer, against the reference implementation and against damage."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints_tools.safetensors_io import (
    INDEX_NAME,
    NUMPY_DTYPES,
    SafetensorsCheckpoint,
    SafetensorsError,
    SafetensorsFile,
)
from checkpoints_tools.safetensors_writer import write_file, write_folder


def sample(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits of a dtype (FP4: values of its own, one a byte; bool: 0 and 1)."""
    rng = np.random.default_rng(seed)
    numpy_dtype = NUMPY_DTYPES[dtype]
    if dtype in ("F4", "BOOL"):
        return rng.integers(0, 16 if dtype == "F4" else 2, shape, np.uint8).view(numpy_dtype)
    raw = rng.integers(0, 256, (*shape, numpy_dtype.itemsize), np.uint8)
    return raw.view(numpy_dtype).reshape(shape)


def raw_file(path, header, data: bytes = b"", length: int | None = None):
    """A file from a header (dict or text) and data, with any header length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def reference_accepts(path) -> bool:
    try:
        with safetensors.safe_open(path, "np") as file:
            list(file.keys())
    except Exception:  # the reference raises its own class, and others for bad UTF-8
        return False
    return True


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    array = sample(dtype, (3, 4, 2))
    write_file(tmp_path / "x.safetensors", {"x": array})
    back = SafetensorsFile(tmp_path / "x.safetensors").read("x")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back.view(np.uint8), array.view(np.uint8))


shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


names = st.text("abé.", min_size=1, max_size=6).filter(lambda name: name != "..")
choices = st.tuples(st.sampled_from([name for name in NUMPY_DTYPES if name != "F4"]), shapes)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, choices, max_size=6))
def test_the_reference_reads_what_we_write(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    arrays = {name: sample(*choice) for name, choice in plan.items()}
    write_file(path, arrays, {"format": "pt"})
    with safetensors.safe_open(path, "np") as file:
        assert set(file.keys()) == set(arrays)
        assert file.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            piece = file.get_slice(name)
            assert tuple(piece.get_shape()) == array.shape
            assert piece.get_dtype() == plan[name][0]
    ours = SafetensorsFile(path)
    for name, array in arrays.items():
        assert ours.read(name).tobytes() == array.tobytes()
        assert ours.read(name).shape == array.shape


def test_we_write_the_bytes_that_the_reference_writes(tmp_path):
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(3, dtype=np.int64),
        "c": np.arange(5, dtype=np.uint8),
        "aa": np.array(2.0, np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "theirs.safetensors")
    write_file(tmp_path / "ours.safetensors", arrays)
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs


def test_fp4_even_element_is_in_the_low_bits(tmp_path):
    header = {"x": entry("F4", [2, 2], 0, 2)}
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, bytes([0x21, 0xF7])))
    np.testing.assert_array_equal(file.read("x").astype(np.float32), [[0.5, 1.0], [6.0, -6.0]])


def test_data_is_mapped_and_read_only(tmp_path):
    write_file(tmp_path / "x.safetensors", {"x": np.ones((4, 4), np.float32)})
    array = SafetensorsFile(tmp_path / "x.safetensors").read("x")
    assert not array.flags.owndata
    assert not array.flags.writeable


def test_unaligned_data_is_read(tmp_path):
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    data = b"\x07" + np.array([1.5, -2.0], np.float32).tobytes()
    file = SafetensorsFile(raw_file(tmp_path / "x.safetensors", header, data))
    np.testing.assert_array_equal(file.read("b"), [1.5, -2.0])


GOOD = {"x": entry("F32", [2], 0, 8), "y": entry("U8", [3], 8, 11)}
DAMAGED = {
    "empty": (b"", None, b""),
    "header longer than the file": (GOOD, 10**6, b"\0" * 11),
    "header length 2^40": (GOOD, 2**40, b"\0" * 11),
    "header length 2^63": (GOOD, 2**63, b"\0" * 11),
    "not JSON": (b"{nope", None, b""),
    "not UTF-8": (b'{"\xff": 1}', None, b""),
    "a list": (b"[]", None, b""),
    "nested": (b"{" + b'"a":{' * 50000, None, b""),
    "last byte missing": (GOOD, None, b"\0" * 10),
    "trailing byte": (GOOD, None, b"\0" * 12),
    "overlap": ({"x": entry("U8", [8], 0, 8), "y": entry("U8", [4], 7, 11)}, None, b"\0" * 11),
    "hole": ({"x": entry("U8", [8], 0, 8), "y": entry("U8", [2], 9, 11)}, None, b"\0" * 11),
    "begins late": ({"x": entry("U8", [4], 1, 5)}, None, b"\0" * 5),
    "same place": ({"x": entry("U8", [4], 0, 4), "y": entry("U8", [4], 0, 4)}, None, b"\0" * 4),
    "shape overflow": ({"x": entry("U8", [2**33, 2**33], 0, 4)}, None, b"\0" * 4),
    "shape wraps to the size": ({"x": entry("U8", [2**32, 2**32, 4], 0, 0)}, None, b""),
    "negative shape": ({"x": entry("U8", [-4], 0, 4)}, None, b"\0" * 4),
    "float shape": ({"x": entry("U8", [4.0], 0, 4)}, None, b"\0" * 4),
    "size mismatch": ({"x": entry("F32", [2], 0, 4)}, None, b"\0" * 4),
    "reversed offsets": ({"x": entry("U8", [0], 4, 0)}, None, b"\0" * 4),
    "unknown dtype": ({"x": entry("F12", [2], 0, 3)}, None, b"\0" * 3),
    "odd FP4": ({"x": entry("F4", [3], 0, 2)}, None, b"\0" * 2),
    "no dtype": ({"x": {"shape": [1], "data_offsets": [0, 1]}}, None, b"\0"),
    "entry is a number": ({"x": 3}, None, b""),
    "metadata not text": ({"__metadata__": {"a": 1}}, None, b""),
    "metadata a list": ({"__metadata__": []}, None, b""),
    "key twice": (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        None,
        b"\0\0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_refused_as_the_reference_does(tmp_path, damage):
    header, length, data = DAMAGED[damage]
    path = tmp_path / "damaged.safetensors"
    raw_file(path, header, data, length)
    with pytest.raises(SafetensorsError) as error:
        SafetensorsFile(path)
    assert "damaged.safetensors" in str(error.value)
    assert not reference_accepts(path)


@pytest.mark.parametrize("kept", [0, 4, 8, 20, 100, -1])
def test_cut_off_files_are_refused(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write_file(path, {"x": np.ones(64, np.float32), "y": np.ones(3, np.int64)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(SafetensorsError, match="x.safetensors"):
        SafetensorsFile(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_changed_header_byte_never_crosses_the_reference(tmp_path_factory, position, byte):
    """What the reference refuses we refuse, and nothing but our error ever comes out."""
    path = tmp_path_factory.mktemp("fuzzed") / "x.safetensors"
    write_file(path, {"x": np.ones((2, 2), np.float32), "yy": np.ones(3, np.int64)})
    data = bytearray(path.read_bytes())
    data[position % (len(data) - 40)] = byte
    path.write_bytes(bytes(data))
    try:
        SafetensorsFile(path)
    except SafetensorsError:
        return
    assert reference_accepts(path)


@pytest.mark.parametrize(
    "name", ["a/../../etc/passwd", "/etc/passwd", "..", "", "a\\..\\b", "a\0b"]
)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    path = raw_file(tmp_path / "x.safetensors", {name: entry("U8", [1], 0, 1)}, b"\0")
    with pytest.raises(SafetensorsError, match="expected one that is not empty"):
        SafetensorsFile(path)
    with pytest.raises(SafetensorsError, match="expected one that is not empty"):
        write_file(tmp_path / "y.safetensors", {name: np.zeros(1)})
    assert not (tmp_path / "y.safetensors").exists()


def test_an_error_names_the_tensor_and_both_sizes(tmp_path):
    path = raw_file(tmp_path / "x.safetensors", {"w": entry("BF16", [3, 5], 0, 28)}, b"\0" * 28)
    with pytest.raises(
        SafetensorsError, match=r"tensor 'w': found 28 bytes .* expected 30 for BF16"
    ):
        SafetensorsFile(path)


def test_an_unwritable_dtype_leaves_no_file(tmp_path):
    with pytest.raises(SafetensorsError, match="'x' has dtype complex128"):
        write_file(tmp_path / "x.safetensors", {"x": np.zeros(2, np.complex128)})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    """Three shards of two tensors each."""
    tensors = {f"t{i}": np.full(4, i, np.float32) for i in range(6)}
    write_folder(tmp_path, tensors, config={"model_type": "none"}, max_shard_bytes=32)
    return tmp_path


def edit_index(folder, change) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_sharded_folder_reads_as_one(folder):
    checkpoint = SafetensorsCheckpoint(folder)
    assert len(checkpoint.files) == 3
    assert checkpoint.read("t5").tolist() == [5.0] * 4
    assert checkpoint.file_of("t0").name == "model-00001-of-00003.safetensors"
    assert set(checkpoint.tensors) == {f"t{i}" for i in range(6)}
    with pytest.raises(KeyError, match="no tensor 'zz'"):
        checkpoint.read("zz")


def test_all_disagreements_are_listed_at_once(folder):
    def change(weight_map):
        weight_map["ghost"] = "model-00001-of-00003.safetensors"
        weight_map["t2"] = "model-00001-of-00003.safetensors"
        del weight_map["t3"]

    edit_index(folder, change)
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(SafetensorsError) as error:
        SafetensorsCheckpoint(folder)
    for text in ("'ghost'", "'t2': the index says", "model-00003-of-00003.safetensors is missing"):
        assert text in str(error.value)


def test_a_tensor_in_two_shards_or_not_in_the_index_is_refused(folder):
    write_file(
        folder / "model-00002-of-00003.safetensors",
        {name: np.zeros(4, np.float32) for name in ("t0", "t2", "t3", "extra")},
    )
    with pytest.raises(SafetensorsError) as error:
        SafetensorsCheckpoint(folder)
    assert "'t0' is in both" in str(error.value)
    assert "'extra' of model-00002-of-00003.safetensors is not in the index" in str(error.value)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "x.bin"]
)
def test_shards_outside_the_folder_are_refused(folder, shard):
    edit_index(folder, lambda weight_map: weight_map.update(t0=shard))
    with pytest.raises(SafetensorsError, match=INDEX_NAME):
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(folder, text):
    (folder / INDEX_NAME).write_text(text)
    with pytest.raises(SafetensorsError, match="weight_map"):
        SafetensorsCheckpoint(folder)


def test_pickle_is_never_read_and_guessing_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is pickled"):
        SafetensorsCheckpoint(tmp_path)
    for name in ("a", "b"):
        write_file(tmp_path / f"{name}.safetensors", {name: np.zeros(1)})
    with pytest.raises(SafetensorsError, match="found 2 safetensors files and no model"):
        SafetensorsCheckpoint(tmp_path)


def test_bfloat16_is_typed(tmp_path):
    values = np.array([1.0, -2.5], ml_dtypes.bfloat16)
    write_file(tmp_path / "model.safetensors", {"x": values})
    assert SafetensorsCheckpoint(tmp_path).read("x").astype(np.float32).tolist() == [1.0, -2.5]

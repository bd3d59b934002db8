import ml_dtypes
import numpy as np
import pytest
from google.protobuf import descriptor_pool
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.tensor_pb2 import TensorProto  # pyright: ignore[reportAttributeAccessIssue]

from sdxl_eqx.data.sources.examples import make_example, make_tensor, parse_example, parse_tensor

TENSORS = {
    "float32": (
        np.array([[0.5, -1], [2, 3]], np.float32),
        "08011208120208021202080222100000003f000080bf0000004000004040",
        "0801120812020802120208022a100000003f000080bf0000004000004040",
    ),
    "float64": (
        np.array([1.5, -2]),
        "08021204120208022210000000000000f83f00000000000000c0",
        "08021204120208023210000000000000f83f00000000000000c0",
    ),
    "int32": (
        np.array([[1, -2]], np.int32),
        "080312081202080112020802220801000000feffffff",
        "0803120812020801120208023a0b01feffffffffffffffff01",
    ),
    "uint8": (np.array([1, 255], np.uint8), "0804120412020802220201ff", "08041204120208023a0301ff01"),
    "int16": (np.array([-3], np.int16), "08051204120208012202fdff", "08051204120208013a0afdffffffffffffffff01"),
    "int8": (np.array([-3, 4], np.int8), "08061204120208022202fd04", "08061204120208023a0bfdffffffffffffffff0104"),
    "int64": (
        np.array([-(2**40)]),
        "080912041202080122080000000000ffffff",
        "0809120412020801520a8080808080e0ffffff01",
    ),
    "bool": (np.array([True, False]), "080a12041202080222020100", "080a1204120208025a020100"),
    "bfloat16": (
        np.array([1.5, -2], ml_dtypes.bfloat16),
        "080e1204120208022204c03f00c0",
        "080e1204120208026a05c07f808003",
    ),
    "uint16": (np.array([65535], np.uint16), "08111204120208012202ffff", "08111204120208013a03ffff03"),
    "float16": (np.array([1.5, -2], np.float16), "08131204120208022204003e00c0", "08131204120208026a05807c808003"),
    "complex64": (
        np.array([1 + 2j], np.complex64),
        "080812041202080122080000803f00000040",
        "08081204120208014a080000803f00000040",
    ),
    "complex128": (
        np.array([1 - 2j]),
        "08121204120208012210000000000000f03f00000000000000c0",
        "08121204120208016210000000000000f03f00000000000000c0",
    ),
    "uint32": (
        np.array([2**32 - 1], np.uint32),
        "08161204120208012204ffffffff",
        "0816120412020801820105ffffffff0f",
    ),
    "uint64": (
        np.array([2**64 - 1], np.uint64),
        "08171204120208012208ffffffffffffffff",
        "08171204120208018a010affffffffffffffffff01",
    ),
    "scalar": (np.array(3, np.float32), "08011200220400004040", "08012a0400004040"),
    "empty": (np.zeros((0, 4), np.float32), "08011206120012020804", "08011206120012020804"),
}
"""Of each array what tf.io.serialize_tensor of TensorFlow 2.21 writes, and the same with the values in the field of
their dtype, which its tf.io.parse_tensor reads as that array."""

EXAMPLE = {
    "caption": [b"a cat", "ä".encode()],
    "image": [b"\x89PNG"],
    "score": np.array([0.5, -2], np.float32),
    "size": np.array([-1, 2**40]),
}
EXAMPLE_BYTES = bytes.fromhex(
    "0a620a180a0763617074696f6e120d0a0b0a0561206361740a02c3a40a110a05696d61676512080a060a0489504e470a150a0573636f726512"
    "0c120a0a080000003f000000c00a1c0a0473697a6512141a120a10ffffffffffffffffff01808080808020"
)
"""What TensorFlow 2.21 writes for it."""


def tensor(dtype: int, shape: list[int], **values) -> bytes:
    """A serialized tensor, by the messages that tensorboardX has."""
    proto = TensorProto(dtype=dtype, **values)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    return proto.SerializeToString()


@pytest.mark.parametrize(("array", "written", "with_values"), TENSORS.values(), ids=TENSORS)
def test_tensors_are_read_and_written_as_tensorflow_does(array, written, with_values):
    assert make_tensor(array).hex() == written
    for data in (written, with_values):
        found = parse_tensor(bytes.fromhex(data))
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        np.testing.assert_array_equal(found, array)


def test_an_array_of_any_byte_order_and_layout_is_written_in_row_major_little_endian():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert make_tensor(array.astype(">f4")) == make_tensor(array)
    assert make_tensor(np.asfortranarray(array)) == make_tensor(array)


def test_the_last_value_fills_up_a_tensor_and_zero_one_without_values():
    np.testing.assert_array_equal(parse_tensor(tensor(1, [2, 2], float_val=[1, 2])), [[1, 2], [2, 2]])
    np.testing.assert_array_equal(parse_tensor(tensor(3, [3], int_val=[-7])), [-7, -7, -7])
    half = parse_tensor(tensor(14, [2], half_val=[0x3FC0]))
    assert half.dtype == ml_dtypes.bfloat16
    assert half.tolist() == [1.5, 1.5]
    np.testing.assert_array_equal(parse_tensor(tensor(1, [3])), [0, 0, 0])


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (tensor(1, [3], tensor_content=b"12345678"), r"shape \(3,\) and dtype float32 has 8 bytes"),
        (tensor(1, [1], float_val=[1, 2]), r"shape \(1,\) has 2 values"),
        (tensor(1, [1 << 40, 1 << 20]), "has 0 values"),
        (tensor(1, [-1]), r"known shape, not \(-1,\)"),
        (tensor(4, [1], int_val=[256]), "uint8 has values that are none of it"),
        (tensor(7, [1], string_val=[b"text"]), "numbers, not of TensorFlow's dtype 7"),
        (b"", "numbers, not of TensorFlow's dtype 0"),
        (b"\x08", "1 bytes are no serialized tensor"),
    ],
)
def test_a_damaged_tensor_is_an_error(data, rule):
    with pytest.raises(ValueError, match=rule):
        parse_tensor(data)


def test_a_tensor_of_unknown_rank_is_an_error():
    proto = TensorProto(dtype=1)
    proto.tensor_shape.unknown_rank = True
    with pytest.raises(ValueError, match="known shape"):
        parse_tensor(proto.SerializeToString())


def test_an_array_of_no_numbers_is_not_written():
    with pytest.raises(ValueError, match="numbers, not of <U1"):
        make_tensor(np.array(["a"]))


def test_examples_are_read_and_written_as_tensorflow_does():
    assert make_example(EXAMPLE) == EXAMPLE_BYTES
    found = parse_example(EXAMPLE_BYTES)
    assert found.keys() == EXAMPLE.keys()
    for name, values in EXAMPLE.items():
        assert isinstance(found[name], type(values))
        assert getattr(found[name], "dtype", None) == getattr(values, "dtype", None)
        assert list(found[name]) == list(values)


def test_a_feature_of_no_kind_has_no_values():
    assert parse_example(bytes.fromhex("0a0a0a080a046e6f6e651200")) == {"none": []}


def test_an_example_of_no_bytes_has_no_features():
    assert parse_example(b"") == {}
    assert parse_example(make_example({})) == {}


def test_an_array_of_neither_floats_nor_integers_is_no_feature():
    with pytest.raises(ValueError, match="feature 'a' must be bytes, floats or integers, not an array of bool"):
        make_example({"a": np.array([True])})


@given(st.integers(1, len(EXAMPLE_BYTES) - 1))
def test_an_example_that_is_cut_off_is_an_error(length):
    with pytest.raises(ValueError, match=f"{length} bytes are no tf.train.Example"):
        parse_example(EXAMPLE_BYTES[:length])


@given(st.binary(max_size=40))
def test_whatever_the_bytes_are_only_a_value_error_comes_of_them(data):
    for parse in (parse_example, parse_tensor):
        try:
            parse(data)
        except ValueError as error:
            assert str(error)


def test_the_names_of_tensorflow_stay_free():
    for name in ("sdxl_eqx.Example", "tensorflow.Example", "tensorflow.TensorProto"):
        with pytest.raises(KeyError):
            descriptor_pool.Default().FindMessageTypeByName(name)

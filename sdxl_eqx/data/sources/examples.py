"""The messages that TensorFlow's record files hold, tf.train.Example and serialized tensors, without TensorFlow."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_Field = descriptor_pb2.FieldDescriptorProto

_MESSAGES: dict[str, dict[str, tuple[int, Any, bool]]] = {
    # tensorflow/core/example/feature.proto and example.proto
    "BytesList": {"value": (1, _Field.TYPE_BYTES, True)},
    "FloatList": {"value": (1, _Field.TYPE_FLOAT, True)},
    "Int64List": {"value": (1, _Field.TYPE_INT64, True)},
    "Feature": {
        "bytes_list": (1, "BytesList", False),
        "float_list": (2, "FloatList", False),
        "int64_list": (3, "Int64List", False),
    },
    "Features": {"feature": (1, "Features.FeatureEntry", True)},
    "Example": {"features": (1, "Features", False)},
    # tensorflow/core/framework/tensor_shape.proto
    "Dim": {"size": (1, _Field.TYPE_INT64, False), "name": (2, _Field.TYPE_STRING, False)},
    "TensorShapeProto": {"dim": (2, "Dim", True), "unknown_rank": (3, _Field.TYPE_BOOL, False)},
    # tensorflow/core/framework/tensor.proto; the enum of types.proto is an int32 on the wire
    "TensorProto": {
        "dtype": (1, _Field.TYPE_INT32, False),
        "tensor_shape": (2, "TensorShapeProto", False),
        "version_number": (3, _Field.TYPE_INT32, False),
        "tensor_content": (4, _Field.TYPE_BYTES, False),
        "float_val": (5, _Field.TYPE_FLOAT, True),
        "double_val": (6, _Field.TYPE_DOUBLE, True),
        "int_val": (7, _Field.TYPE_INT32, True),
        "string_val": (8, _Field.TYPE_BYTES, True),
        "scomplex_val": (9, _Field.TYPE_FLOAT, True),
        "int64_val": (10, _Field.TYPE_INT64, True),
        "bool_val": (11, _Field.TYPE_BOOL, True),
        "dcomplex_val": (12, _Field.TYPE_DOUBLE, True),
        "half_val": (13, _Field.TYPE_INT32, True),
        "uint32_val": (16, _Field.TYPE_UINT32, True),
        "uint64_val": (17, _Field.TYPE_UINT64, True),
    },
}
"""Each message's fields: number, type, and whether it is repeated."""

_DTYPES: dict[int, tuple[np.dtype, str, str]] = {
    1: (np.dtype("<f4"), "float_val", "<f4"),
    2: (np.dtype("<f8"), "double_val", "<f8"),
    3: (np.dtype("<i4"), "int_val", "<i4"),
    4: (np.dtype("u1"), "int_val", "u1"),
    5: (np.dtype("<i2"), "int_val", "<i2"),
    6: (np.dtype("i1"), "int_val", "i1"),
    8: (np.dtype("<c8"), "scomplex_val", "<f4"),
    9: (np.dtype("<i8"), "int64_val", "<i8"),
    10: (np.dtype("bool"), "bool_val", "bool"),
    14: (np.dtype(ml_dtypes.bfloat16), "half_val", "<u2"),
    17: (np.dtype("<u2"), "int_val", "<u2"),
    18: (np.dtype("<c16"), "dcomplex_val", "<f8"),
    19: (np.dtype("<f2"), "half_val", "<u2"),
    22: (np.dtype("<u4"), "uint32_val", "<u4"),
    23: (np.dtype("<u8"), "uint64_val", "<u8"),
}
"""Of each number of tensorflow/core/framework/types.proto: the dtype, the field of its values, and what these are
before they are seen as that dtype (the bits of a half, the two parts of a complex number)."""

_NUMBERS = {dtype: number for number, (dtype, _, _) in _DTYPES.items()}

_MAX_FILLED = 1 << 24
"""More values are not filled up: such a shape is damage, and would fill the memory."""


def _messages() -> dict[str, Any]:
    """The classes of the messages, in a pool of their own: TensorFlow registers its names in the common one."""
    file = descriptor_pb2.FileDescriptorProto(name="sdxl_eqx/example.proto", package="sdxl_eqx", syntax="proto3")
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, (number, kind, is_repeated) in fields.items():
            label = _Field.LABEL_REPEATED if is_repeated else _Field.LABEL_OPTIONAL
            field = message.field.add(name=name, number=number, label=label)
            if isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".sdxl_eqx.{kind}"
            else:
                field.type = kind
    messages = {message.name: message for message in file.message_type}
    for field in messages["Feature"].field:
        field.oneof_index = 0
    messages["Feature"].oneof_decl.add(name="kind")
    entry = messages["Features"].nested_type.add(name="FeatureEntry")  # what map<string, Feature> stands for
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_STRING)
    value = entry.field.add(name="value", number=2, label=_Field.LABEL_OPTIONAL, type=_Field.TYPE_MESSAGE)
    value.type_name = ".sdxl_eqx.Feature"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"sdxl_eqx.{name}"))
        for name in ("Example", "TensorProto")
    }


_CLASSES = _messages()


def _parsed(name: str, data: bytes, what: str) -> Any:
    message = _CLASSES[name]()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise ValueError(f"{len(data)} bytes are no {what} ({error})") from error
    return message


def parse_example(data: bytes) -> dict[str, list[bytes] | np.ndarray]:
    """The features of a serialized tf.train.Example: lists of bytes, float32 or int64; of no kind, an empty list.

    Raises:
        ValueError: the bytes are no such message.
    """
    features: dict[str, list[bytes] | np.ndarray] = {}
    for name, feature in _parsed("Example", data, "tf.train.Example").features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "float_list":
            features[name] = np.array(feature.float_list.value, np.float32)
        elif kind == "int64_list":
            features[name] = np.array(feature.int64_list.value, np.int64)
        else:
            features[name] = list(feature.bytes_list.value)
    return features


def make_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """A serialized tf.train.Example, the features in the order of their names.

    Raises:
        ValueError: a feature is an array of neither floats nor integers.
    """
    example = _CLASSES["Example"]()
    for name, values in features.items():
        feature = example.features.feature[name]
        if not isinstance(values, np.ndarray):
            feature.bytes_list.value.extend(values)
        elif np.issubdtype(values.dtype, np.floating):
            feature.float_list.value.extend(values.ravel().tolist())
        elif np.issubdtype(values.dtype, np.integer):
            feature.int64_list.value.extend(values.ravel().tolist())
        else:
            raise ValueError(f"feature {name!r} must be bytes, floats or integers, not an array of {values.dtype}")
    return example.SerializeToString(deterministic=True)


def parse_tensor(data: bytes) -> np.ndarray:
    """The tensor in a serialized TensorProto, as tf.io.serialize_tensor makes it. It may be read-only.

    Values come from tensor_content or from the field of the dtype, of which the last fills up what is missing, and
    zeros where there is none.

    Raises:
        ValueError: the bytes are no such message, or its shape, dtype and values do not go together.
    """
    message = _parsed("TensorProto", data, "serialized tensor")
    if message.dtype not in _DTYPES:
        raise ValueError(f"a serialized tensor must be of numbers, not of TensorFlow's dtype {message.dtype}")
    dtype, field, stored = _DTYPES[message.dtype]
    shape = tuple(dim.size for dim in message.tensor_shape.dim)
    if message.tensor_shape.unknown_rank or min(shape, default=0) < 0:
        raise ValueError(f"a serialized tensor must have a known shape, not {shape}")
    size = math.prod(shape)
    if content := message.tensor_content:
        if len(content) != size * dtype.itemsize:
            raise ValueError(f"a tensor of shape {shape} and dtype {dtype} has {len(content)} bytes")
        return np.frombuffer(content, dtype).reshape(shape)
    given = np.array(getattr(message, field))
    values = given.astype(stored)
    if values.dtype.kind in "iu" and not np.array_equal(values, given):
        raise ValueError(f"a tensor of dtype {dtype} has values that are none of it")
    values = values.view(dtype)
    if len(values) > size or size > max(len(values), _MAX_FILLED):
        raise ValueError(f"a tensor of shape {shape} has {len(values)} values")
    filled = np.full(size, values[-1] if len(values) else 0, dtype)
    filled[: len(values)] = values
    return filled.reshape(shape)


def make_tensor(array: np.ndarray) -> bytes:
    """An array as tf.io.serialize_tensor writes it, byte for byte.

    Raises:
        ValueError: it is not of numbers.
    """
    number = _NUMBERS.get(array.dtype.newbyteorder("<"))
    if number is None:
        raise ValueError(f"a serialized tensor must be of numbers, not of {array.dtype}")
    message = _CLASSES["TensorProto"](dtype=number)
    message.tensor_shape.SetInParent()  # a scalar's shape is there, and empty
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    message.tensor_content = array.astype(_DTYPES[number][0], copy=False).tobytes()
    return message.SerializeToString()

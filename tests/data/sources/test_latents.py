import dataclasses
import struct
from collections.abc import Mapping

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.data.sources.examples import make_example, make_tensor
from sdxl_eqx.data.sources.latents import LatentRecords

SCALE = 0.13025


def tensors(seed: int) -> dict[str, np.ndarray]:
    """A record as MaxDiffusion makes it of a picture of 32 x 32, the text narrower than SDXL's."""
    rng = np.random.default_rng(seed)
    return {
        "pixel_values": rng.normal(size=(4, 4, 4)).astype(np.float32),
        "input_ids": rng.integers(0, 9, (2, 77), np.int32),
        "prompt_embeds": rng.normal(size=(77, 6)).astype(np.float32),
        "text_embeds": rng.normal(size=5).astype(np.float32),
    }


def serialized(features: Mapping[str, np.ndarray | None]) -> bytes:
    """The record as a tf.train.Example, without what is None."""
    return make_example({name: [make_tensor(value)] for name, value in features.items() if value is not None})


def write(path, *records: bytes):
    """A TFRecord file."""

    def checked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return data + struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    path.write_bytes(b"".join(checked(struct.pack("<Q", len(data))) + checked(data) for data in records))
    return path


def latents(*paths, **options) -> LatentRecords:
    return LatentRecords(paths, **{"scaling_factor": SCALE, "channels": 4, **options})


@pytest.fixture
def source(tmp_path):
    first = write(tmp_path / "a.tfrecord", *(serialized(tensors(i)) for i in range(2)))
    return latents(first, write(tmp_path / "b.tfrecord", serialized(tensors(2))))


def test_a_sample_has_the_fields_that_a_batch_of_latents_takes(source):
    sample = source[0]
    needed = {field.name for field in dataclasses.fields(LatentBatch) if field.default is dataclasses.MISSING}
    assert sample.keys() == needed
    LatentBatch(**{name: value[None] for name, value in sample.items()})
    assert sample["mean"].shape == sample["logvar"].shape == (4, 4, 4)
    assert sample["context"].shape == (77, 6)
    assert sample["pooled"].shape == (5,)
    assert {value.dtype for value in sample.values()} == {np.dtype(np.float32)}


def test_encoding_what_was_read_gives_the_stored_latent_whatever_noise_is_drawn(source):
    sample = source[1]
    noise = np.random.default_rng(0).normal(size=sample["mean"].shape).astype(np.float32)
    drawn = sample["mean"] + np.exp(0.5 * sample["logvar"]) * noise
    np.testing.assert_allclose((drawn * SCALE).transpose(2, 0, 1), tensors(1)["pixel_values"], atol=1e-6)
    assert (sample["logvar"] == -30).all()


def test_rows_columns_and_channels_are_where_they_belong(tmp_path):
    latent = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    path = write(tmp_path / "a", serialized(tensors(0) | {"pixel_values": latent}))
    mean = latents(path, scaling_factor=0.5)[0]["mean"]
    assert mean.flags.c_contiguous
    assert mean[1, 2, 3] == 2 * latent[3, 1, 2]


def test_the_text_is_as_it_was_stored(source):
    for index in range(3):
        np.testing.assert_array_equal(source[index]["context"], tensors(index)["prompt_embeds"])
        np.testing.assert_array_equal(source[index]["pooled"], tensors(index)["text_embeds"])


def test_time_ids_are_those_of_a_picture_of_just_this_size(source, tmp_path):
    assert source[0]["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]
    path = write(tmp_path / "c", serialized(tensors(0) | {"pixel_values": np.zeros((4, 6, 6), np.float32)}))
    assert latents(path)[0]["time_ids"].tolist() == [48, 48, 0, 0, 48, 48]


def test_files_follow_one_another_and_name_their_records(source, tmp_path):
    assert len(source) == 3
    names = [f"record {place} of {tmp_path / file}" for file, place in (("a.tfrecord", 0), ("a.tfrecord", 1),
                                                                        ("b.tfrecord", 0))]  # fmt: skip
    assert [source.name(i) for i in range(3)] == names
    assert repr(source) == "LatentRecords(2 files, 3 samples)"
    assert [len(latents(tmp_path / "a.tfrecord", max_samples=n)) for n in (-1, 1, 5)] == [2, 1, 2]
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]


def test_indices_go_to_the_folder_given_where_they_cannot_lie_beside_the_files(tmp_path):
    (tmp_path / "a.index").mkdir()
    latents(write(tmp_path / "a", serialized(tensors(0))), index_folder=tmp_path / "indices")
    assert len(list((tmp_path / "indices").iterdir())) == 1


@pytest.mark.parametrize(("stored", "read"), [(np.float16, np.float16), (ml_dtypes.bfloat16, np.float32)])
def test_text_of_half_precision_keeps_its_values(tmp_path, stored, read):
    features = {name: value.astype(stored) for name, value in tensors(0).items() if name != "input_ids"}
    sample = latents(write(tmp_path / "a", serialized(features)))[0]
    assert sample["context"].dtype == sample["pooled"].dtype == read
    assert sample["mean"].dtype == np.float32
    np.testing.assert_array_equal(sample["context"], features["prompt_embeds"].astype(read))


@pytest.mark.parametrize(
    ("features", "rule"),
    [
        ({"pixel_values": None}, r"no serialized tensor pixel_values \(features: prompt_embeds, text_embeds\)"),
        ({"prompt_embeds": None}, "no serialized tensor prompt_embeds"),
        ({"text_embeds": None}, "no serialized tensor text_embeds"),
        ({"pixel_values": (3, 4, 4)}, r"pixel_values must be of shape \(4, any, any\), not \(3, 4, 4\); give records"),
        ({"pixel_values": (1, 4, 4, 4)}, r"pixel_values must be of shape \(4, any, any\), not \(1, 4, 4, 4\)"),
        ({"pixel_values": (4, 4, 6)}, r"a square picture, not of shape \(4, 4, 6\)"),
        ({"prompt_embeds": (76, 6)}, r"prompt_embeds must be of shape \(77, 6\), not \(76, 6\)"),
        ({"prompt_embeds": (77, 7)}, r"prompt_embeds must be of shape \(77, 6\), not \(77, 7\)"),
        ({"text_embeds": (6,)}, r"text_embeds must be of shape \(5\), not \(6,\)"),
        ({"text_embeds": (1, 5)}, r"text_embeds must be of shape \(5\), not \(1, 5\)"),
    ],
)
def test_a_first_record_that_is_of_another_kind_or_model_is_an_error(tmp_path, features, rule):
    changed = {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in features.items()}
    path = write(tmp_path / "a", serialized(tensors(0) | {"input_ids": None} | changed))
    with pytest.raises(ValueError, match=rule) as caught:
        latents(path, context_width=6, pooled_width=5)
    assert not isinstance(caught.value, BadSample)
    assert f"record 0 of {path}" in str(caught.value)


def test_any_width_will_do_where_none_is_given(tmp_path):
    path = write(tmp_path / "a", serialized(tensors(0) | {"prompt_embeds": np.zeros((77, 9), np.float32)}))
    assert latents(path)[0]["context"].shape == (77, 9)


def test_records_of_another_kind_are_an_error_that_says_what_is_read(tmp_path):
    with pytest.raises(ValueError, match="--dataset-type tfrecord reads what MaxDiffusion writes for SDXL"):
        latents(write(tmp_path / "a", b"\xffabc"))


def test_no_records_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        latents(write(tmp_path / "a"))


def test_a_later_record_that_is_damaged_or_differs_is_a_bad_sample(tmp_path):
    good = tensors(0)
    nan = good["prompt_embeds"].copy()
    nan[3, 3] = np.nan
    infinite = np.full((4, 4, 4), -np.inf, np.float32)
    bad = {
        "no serialized tensor text_embeds": serialized(good | {"text_embeds": None}),
        "no serialized tensor pixel_values": make_example({"pixel_values": []}),
        "no serialized tensor pixel_values .features: pixel": make_example(
            {"pixel_values": [make_tensor(infinite)] * 2}
        ),
        "its tensors are of shapes": serialized(good | {"pixel_values": np.zeros((4, 2, 2), np.float32)}),
        "its tensors are": serialized(good | {"prompt_embeds": np.zeros((77, 5), np.float32)}),
        "a tensor holds NaN or infinity": serialized(good | {"prompt_embeds": nan}),
        "a tensor holds NaN": serialized(good | {"pixel_values": infinite}),
        "bytes are no tf.train.Example": b"\xffabc",
        "pixel_values: 1 bytes are no serialized tensor": make_example({"pixel_values": [b"\x08"]}),
        "is damaged, its checksum is another": b"damaged",
    }
    path = write(tmp_path / "a", serialized(good), *bad.values(), serialized(tensors(1)))
    path.write_bytes(path.read_bytes().replace(b"damaged", b"Damaged"))
    source = latents(path)
    for index, reason in enumerate(bad, start=1):
        with pytest.raises(BadSample, match=reason) as caught:
            source[index]
        assert caught.value.name == f"record {index} of {path}"
    np.testing.assert_array_equal(source[len(bad) + 1]["context"], tensors(1)["prompt_embeds"])


def test_a_file_that_is_gone_is_a_bad_sample(source, tmp_path):
    (tmp_path / "b.tfrecord").unlink()
    with pytest.raises(BadSample, match="No such file"):
        source[2]

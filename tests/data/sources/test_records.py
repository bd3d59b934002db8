import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordWriter

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.examples import make_example
from sdxl_eqx.data.sources.records import ArrayRecords, Shards, TFRecords

GOLDEN = bytes.fromhex(
    "6e00000000000000c4bf33640a6c0a180a0763617074696f6e120d0a0b0a0561206361740a02c3a40a110a05696d61676512080a060a0489504e"
    "470a080a046e6f6e6512000a150a0573636f7265120c120a0a080000003f000000c00a1c0a0473697a6512141a120a10ffffffffffffffffff01"
    "80808080802048c0e333000000000000000029039807d8ea82a2090000000000000037f97139313233343536373839e5b08ac714000000000000"
    "005e3d291578787878787878787878787878787878787878780d2dd320"
)
"""What TensorFlow 2.21's tf.io.TFRecordWriter writes of an example, b"", b"123456789" and b"x" * 20."""


def framed(data: bytes) -> bytes:
    """A record of a TFRecord file."""

    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def example(number: int, **others) -> bytes:
    features = {"image": [f"picture {number}".encode()], "text": [f"caption {number}".encode()], **others}
    return make_example({name: values for name, values in features.items() if values is not None})


def write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def array_records(path, *records, image_column="image", caption_column="text", max_samples=-1) -> ArrayRecords:
    file = write_array_record(path / "a.array_record", records)
    return ArrayRecords([file], image_column=image_column, caption_column=caption_column, max_samples=max_samples)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(b"".join(framed(b"record %d" % i * (i + 1)) for i in range(5)))
    return path


def records(source: TFRecords) -> list[bytes]:
    return [source.record(i) for i in range(len(source))]


def test_samples_of_several_files_follow_one_another_in_the_order_given(tmp_path):
    b = write_array_record(tmp_path / "b.array_record", [example(0), example(1)])
    a = write_array_record(tmp_path / "a.array_record", [example(2)])
    source = ArrayRecords([b, str(a)], image_column="image", caption_column="text")
    assert isinstance(source, Source)
    assert len(source) == 3
    assert [source.picture(i) for i in range(3)] == [b"picture 0", b"picture 1", b"picture 2"]
    assert [source.captions(i) for i in range(3)] == [("caption 0",), ("caption 1",), ("caption 2",)]
    assert [source.name(i) for i in range(3)] == [f"record 0 of {b}", f"record 1 of {b}", f"record 0 of {a}"]
    assert repr(source) == "ArrayRecords(2 files, 3 samples)"
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source.picture(index)


def test_an_empty_file_between_others_holds_no_samples(tmp_path):
    paths = [write_array_record(tmp_path / f"{n}.array_record", [example(n)] * (n != 1)) for n in range(3)]
    source = ArrayRecords(paths, image_column="image", caption_column="text")
    assert [source.picture(i) for i in range(len(source))] == [b"picture 0", b"picture 2"]
    with pytest.raises(ValueError, match=r"no records in .*1.array_record; give files"):
        ArrayRecords(paths[1:2], image_column="image", caption_column="text")
    with pytest.raises(ValueError, match="no records in 0 files; give files"):
        ArrayRecords([], image_column="image", caption_column="text")


def test_only_the_first_samples_are_there_where_a_number_is_given(tmp_path):
    examples = [example(i) for i in range(3)]
    assert len(array_records(tmp_path, *examples, max_samples=2)) == 2
    assert len(array_records(tmp_path, *examples, max_samples=5)) == 3


def test_the_beginning_of_a_picture_is_what_the_limit_says(tmp_path):
    source = array_records(tmp_path, example(0))
    assert source.picture(0, 3) == b"pic"
    assert source.picture(0, 0) == b""
    assert source.picture(0, 99) == b"picture 0"


def test_several_values_and_lists_in_json_are_several_captions(tmp_path):
    source = array_records(tmp_path, example(0, text=["ein Bär".encode(), b'["b", "c"]']))
    assert source.captions(0) == ("ein Bär", "b", "c")


def test_features_can_have_other_names(tmp_path):
    record = make_example({"jpg": [b"p"], "txt": [b"t"]})
    source = array_records(tmp_path, record, image_column="jpg", caption_column="txt")
    assert (source.picture(0), source.captions(0)) == (b"p", ("t",))


@pytest.mark.parametrize(
    ("others", "rule"),
    [
        (
            {"text": None},
            r"record 0 of .* no feature 'text' of bytes \(features: image, size\); --caption-column names",
        ),
        ({"image": None}, r"no feature 'image' of bytes \(features: size, text\); --image-column names"),
        (
            {"image": np.array([1])},
            r"no feature 'image' of bytes \(features: image, size, text\); --image-column names",
        ),
    ],
)
def test_a_feature_that_the_first_record_lacks_is_an_error_that_lists_those_it_has(tmp_path, others, rule):
    with pytest.raises(ValueError, match=rule) as caught:
        array_records(tmp_path, example(0, size=np.array([1, 2]), **others))
    assert not isinstance(caught.value, BadSample)


def test_records_of_another_kind_are_an_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"4 bytes are no tf.train.Example.*--dataset-type arrayrecord reads"
    ) as caught:
        array_records(tmp_path, b"\xffabc")
    assert not isinstance(caught.value, BadSample)


def test_a_later_record_that_lacks_something_is_a_bad_sample(tmp_path):
    source = array_records(
        tmp_path, example(0), example(1, image=None), example(2, text=[]), example(3, text=[b"\xff"]), b"\xffabc"
    )
    for index, read, reason in (
        (1, source.picture, "it has no bytes in feature 'image'"),
        (2, source.captions, "it has no bytes in feature 'text'"),
        (3, source.captions, "its caption is no UTF-8"),
        (4, source.picture, "4 bytes are no tf.train.Example"),
        (4, source.captions, "4 bytes are no tf.train.Example"),
    ):
        with pytest.raises(BadSample) as caught:
            read(index)
        assert caught.value.name == source.name(index)
        assert caught.value.reason.startswith(reason)
    assert source.captions(1) == ("caption 1",)


def test_a_record_whose_bytes_have_changed_is_a_bad_sample_and_the_others_are_read(tmp_path):
    noise = [np.random.default_rng(i).bytes(30_000) for i in range(3)]
    path = write_array_record(tmp_path / "a.array_record", [example(i, image=[noise[i]]) for i in range(3)])
    data = bytearray(path.read_bytes())
    data[data.index(noise[1]) + 100] ^= 1
    path.write_bytes(data)
    source = ArrayRecords([path], image_column="image", caption_column="text")
    with pytest.raises(BadSample, match=r"record 1 of .* hash mismatch"):
        source.picture(1)
    assert [source.picture(i) for i in (0, 2)] == [noise[0], noise[2]]


@pytest.mark.parametrize("damage", ["cut", "other", "gone"])
def test_a_file_that_is_no_whole_array_record_is_an_error(tmp_path, damage):
    path = write_array_record(tmp_path / "a.array_record", [example(0, image=[bytes(200_000)])])
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:70_000] if damage == "cut" else b"no record" * 20_000)
    with pytest.raises(ValueError, match=r"a.array_record is no ArrayRecord file, or not all of it"):
        ArrayRecords([path], image_column="image", caption_column="text")


def test_many_threads_read_the_samples_that_one_does(tmp_path):
    source = array_records(tmp_path, *(example(i) for i in range(20)))
    with ThreadPoolExecutor(8) as pool:
        indices = [i % 20 for i in range(400)]
        assert list(pool.map(source.picture, indices)) == [f"picture {i}".encode() for i in indices]


def test_a_sample_is_found_in_its_file():
    shards = Shards(["a", "b", "c"], [2, 0, 3])
    assert [shards.find(i) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    with pytest.raises(IndexError, match="sample 5 of 5"):
        shards.find(5)


def test_tfrecords_are_read_as_tensorflow_writes_them(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(GOLDEN)
    source = TFRecords(tmp_path / "a.tfrecord")
    assert records(source)[1:] == [b"", b"123456789", b"x" * 20]
    assert len(source.record(0)) == 110
    assert repr(source) == f"TFRecords({str(tmp_path / 'a.tfrecord')!r}, 4 records)"
    for index in (-1, 4):
        with pytest.raises(IndexError, match=f"record {index} of 4"):
            source.record(index)


def test_the_writer_of_these_tests_writes_as_tensorflow_does():
    start = 110 + 16
    assert b"".join(framed(data) for data in (b"", b"123456789", b"x" * 20)) == GOLDEN[start:]


def test_a_file_without_records_has_none(tmp_path):
    (tmp_path / "a.tfrecord").touch()
    assert len(TFRecords(tmp_path / "a.tfrecord")) == 0


def test_the_index_is_kept_beside_the_file_and_used_instead_of_another_scan(file, monkeypatch, caplog):
    expected = records(TFRecords(file, index_folder=file.parent / "indices"))
    assert not caplog.records
    assert sorted(path.name for path in file.parent.iterdir()) == ["a.tfrecord", "a.tfrecord.index"]
    monkeypatch.setattr("sdxl_eqx.data.sources.records._scan", None)
    assert records(TFRecords(file)) == expected


@pytest.mark.parametrize("change", ["more", "time"])
def test_an_index_of_a_file_that_has_changed_is_made_anew(file, change):
    TFRecords(file)
    status = file.stat()
    if change == "more":
        file.write_bytes(file.read_bytes() + framed(b"one more"))
        os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
        assert TFRecords(file).record(5) == b"one more"
    else:  # the same size, but other records
        size = status.st_size
        file.write_bytes(framed(bytes(size - 16)))
        os.utime(file, ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))
        assert [len(record) for record in records(TFRecords(file))] == [size - 16]


def tampered(index: dict[str, np.ndarray], damage: str) -> bytes:
    """An index that is damaged, or made by another version."""
    offsets = index["offsets"].copy()
    if damage == "format":
        index = index | {"stamp": index["stamp"] + np.array([1, 0, 0])}
    elif damage == "order":
        offsets[1] = offsets[2]
    elif damage == "start":
        offsets[0] = 1
    elif damage == "end":
        offsets = offsets[:-1]
    elif damage == "dtype":
        offsets = offsets.astype(np.int32)
    elif damage == "none":
        offsets = offsets[:0]
    elif damage == "names":
        index = {"stamp": index["stamp"], "other": offsets}
    data = safetensors.numpy.save(index if damage in ("format", "names") else index | {"offsets": offsets})
    return data[:-5] if damage == "cut" else b"" if damage == "empty" else data


@pytest.mark.parametrize("damage", ["format", "order", "start", "end", "dtype", "none", "names", "cut", "empty"])
def test_an_index_that_is_damaged_or_of_another_version_is_made_anew(file, damage):
    expected = records(TFRecords(file))
    index = file.with_name("a.tfrecord.index")
    whole = index.read_bytes()
    index.write_bytes(tampered(safetensors.numpy.load(whole), damage))
    assert index.read_bytes() != whole
    assert records(TFRecords(file)) == expected
    assert index.read_bytes() == whole


def test_where_the_index_cannot_lie_beside_the_file_it_goes_to_the_folder_given(file, tmp_path, monkeypatch):
    (tmp_path / "a.tfrecord.index").mkdir()  # no file can take its place, whoever runs the tests
    folder = tmp_path / "new" / "indices"
    expected = records(TFRecords(file, index_folder=folder))
    (kept,) = folder.iterdir()
    assert kept.name.endswith("a.tfrecord.index")
    monkeypatch.setattr("sdxl_eqx.data.sources.records._scan", None)
    assert records(TFRecords(file, index_folder=folder)) == expected


def test_files_of_one_name_have_indices_of_their_own(tmp_path):
    for name in "ab":
        (tmp_path / name / "x.index").mkdir(parents=True)
        (tmp_path / name / "x").write_bytes(framed(name.encode()))
        os.utime(tmp_path / name / "x", (1, 1))
    for _ in range(2):
        found = [TFRecords(tmp_path / name / "x", index_folder=tmp_path / "indices").record(0) for name in "ab"]
        assert found == [b"a", b"b"]
    assert len(list((tmp_path / "indices").iterdir())) == 2


def test_an_index_that_can_be_kept_nowhere_is_said_and_made_each_time(file, tmp_path, caplog):
    (tmp_path / "a.tfrecord.index").mkdir()
    for _ in range(2):
        caplog.clear()
        assert len(TFRecords(file)) == 5
        assert "the index of" in caplog.text
        assert "cannot be kept, each run makes it again" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tfrecord", "a.tfrecord.index"]


@pytest.mark.parametrize("cut", [1, 4, 5, 12, 15, 20])
def test_a_file_that_is_cut_off_is_an_error_with_the_place(file, cut):
    data = framed(b"whole") + framed(b"cut")[:-cut] if cut < 19 else framed(b"whole")[:-1]
    file.write_bytes(data)
    start = len(framed(b"whole")) if cut < 19 else 0
    with pytest.raises(
        ValueError, match=rf"a.tfrecord: record {int(cut < 19)} at byte {start} is cut off.*{len(data)}"
    ):
        TFRecords(file)
    assert not file.with_name("a.tfrecord.index").exists()


@pytest.mark.parametrize("byte", range(12))
def test_a_damaged_length_is_an_error_with_the_place(file, byte):
    data = bytearray(framed(b"whole") + framed(b"damaged"))
    data[len(framed(b"whole")) + byte] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="record 1 at byte 21 is damaged, or this is no TFRecord file"):
        TFRecords(file)


def test_a_compressed_file_is_an_error_that_says_so(file):
    file.write_bytes(b"\x1f\x8b\x08" + bytes(50))
    with pytest.raises(ValueError, match=r"a.tfrecord is compressed.*unpack it"):
        TFRecords(file)


def test_a_damaged_record_is_an_error_and_the_others_are_read(file):
    expected = records(TFRecords(file))
    data = bytearray(file.read_bytes())
    data[data.index(expected[2]) + 3] ^= 1
    file.write_bytes(data)
    source = TFRecords(file)
    with pytest.raises(ValueError, match=r"record 2 at byte .* is damaged, its checksum is another"):
        source.record(2)
    assert [source.record(i) for i in (0, 1, 3, 4)] == expected[:2] + expected[3:]


def test_a_file_that_changes_under_an_open_reader_is_an_error(file):
    source = TFRecords(file)
    data = file.read_bytes()
    for other in (data[:-1], framed(bytes(len(data) - 16))):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=r"record 4 at byte .* is not what it was"):
            source.record(4)


def test_many_threads_read_the_records_that_one_does(tmp_path):
    written = [np.random.default_rng(i).bytes(1000 + i) for i in range(50)]
    (tmp_path / "a").write_bytes(b"".join(map(framed, written)))
    source = TFRecords(tmp_path / "a")
    barrier = threading.Barrier(8)

    def read(worker: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(worker).permutation(50)
        return all(source.record(int(i)) == written[i] for i in order)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))

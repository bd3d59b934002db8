import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sdxl_eqx.data import store as module
from sdxl_eqx.data.store import Store, StoreWriter, key_text


def digest(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def keys(numbers):
    return key_text([digest(i) for i in numbers])


def arrays(i: int):
    return {"x": np.full((2, 3), i, np.float32), "y": np.full(4, i + 0.5, ml_dtypes.bfloat16)}


def write(folder: Path, numbers, **options):
    with StoreWriter(folder, **options) as writer:
        for key, i in zip(keys(numbers), numbers, strict=True):
            writer.add(key, arrays(i))


def assert_holds(store: Store, numbers):
    where = store.find(keys(numbers))
    assert (where >= 0).all()
    for i, place in zip(numbers, where, strict=True):
        read = store.read(int(place))
        assert read.keys() == arrays(i).keys()
        for name, array in arrays(i).items():
            assert read[name].dtype == array.dtype
            np.testing.assert_array_equal(read[name], array)


def test_what_is_written_is_found_by_its_key_in_whatever_shard_it_lies(tmp_path):
    write(tmp_path, range(20), shard_bytes=1000)
    write(tmp_path, range(20, 25))
    assert len(list(tmp_path.iterdir())) > 3
    store = Store(tmp_path)
    assert len(store) == 25
    assert_holds(store, [24, 3, 19, 0, 7])
    assert store.find(keys([3, 99, -1])).tolist()[1:] == [-1, -1]


def test_an_empty_key_is_never_found(tmp_path):
    write(tmp_path, range(3))
    assert Store(tmp_path).find(key_text(["", digest(1)]))[0] == -1


def test_a_folder_without_shards_is_an_empty_store(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        store = Store(folder)
        assert len(store) == 0 and store.find(keys([1, 2])).tolist() == [-1, -1]


def test_threads_may_read_at_once(tmp_path):
    write(tmp_path, range(30), shard_bytes=2000)
    store = Store(tmp_path)
    where = store.find(keys(range(30)))
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: int(store.read(int(where[i % 30]))["x"][0, 0]), range(300)))
    assert read == [i % 30 for i in range(300)]


def test_what_is_whole_stays_when_the_writer_is_interrupted_and_the_rest_goes(tmp_path):
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path) as writer:
        writer.add(keys([1])[0], arrays(1))
        raise KeyboardInterrupt
    assert_holds(Store(tmp_path), [1])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    writer = StoreWriter(tmp_path, shard_bytes=10)
    writer.add(keys([1])[0], arrays(1))  # a shard of its own
    writer.shard_bytes = 10**6
    writer.add(keys([2])[0], arrays(2))
    assert len(list(tmp_path.iterdir())) == 2
    store = Store(tmp_path)
    assert_holds(store, [1])
    assert len(store) == 1
    writer.discard()
    assert len(list(tmp_path.iterdir())) == 1


def test_two_writers_may_fill_one_folder_and_keep_the_same_key(tmp_path):
    with StoreWriter(tmp_path) as one, StoreWriter(tmp_path) as other:
        for writer, numbers in ((one, [1, 2]), (other, [2, 3])):
            for key, i in zip(keys(numbers), numbers, strict=True):
                writer.add(key, arrays(i))
    assert_holds(Store(tmp_path), [1, 2, 3])


@pytest.mark.parametrize("damage", ["cut", "filled", "empty"])
def test_a_damaged_shard_is_an_error_that_names_it_and_what_to_do(tmp_path, damage):
    write(tmp_path, range(5))
    (shard,) = tmp_path.iterdir()
    data = shard.read_bytes()
    changed = {"cut": data[: len(data) // 2], "filled": b"\0" * len(data), "empty": b""}[damage]
    shard.write_bytes(changed)
    with pytest.raises(ValueError, match=r"no complete cache .*delete it") as error:
        Store(tmp_path)
    assert str(shard) in str(error.value)


def test_a_full_disk_is_an_error_with_a_remedy_and_leaves_nothing(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path: str, options: str):
            Path(path).touch()

        def write(self, record: bytes):
            raise RuntimeError("No space left on device")

        def close(self):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match=r"No space left.*--dataset-save-location"), StoreWriter(tmp_path) as writer:
        writer.add(keys([1])[0], arrays(1))
    assert not list(tmp_path.iterdir())

import itertools
import random
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.data.sources.files import BLOCK, Files, cache_name, is_local, joined, natural_order, whole_file

TOKEN = "hf_secret"
CONTENT = bytes(range(256)) * 4


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """An empty folder, and how to write a file into it."""
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    yield root
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        if memory.exists(root):
            memory.rm(root, recursive=True)


def write(folder, name, data=CONTENT):
    with fsspec.open(joined(folder, name), "wb", auto_mkdir=True) as file:
        file.write(data)  # pyright: ignore[reportAttributeAccessIssue]
    return joined(folder, name)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


class Broken:
    """A file system whose every call fails with what it is given."""

    def __init__(self, error):
        self.error = error

    def __getattr__(self, name):
        def fail(*args, **kwargs):
            raise self.error

        return fail


@pytest.fixture
def broken(monkeypatch):
    """Makes every remote path fail with an error; gives the options that the file systems were made with."""

    def install(error):
        asked = []
        monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **o: asked.append((protocol, o)) or Broken(error))
        return asked

    return install


def test_numbers_are_ordered_by_value_and_folders_stay_together():
    names = ["a/img10.png", "a-b/x", "img2.png", "b.png", "img10.png", "a/img2.png", "img02.png", "img010.txt", "img"]
    ordered = ["a/img2.png", "a/img10.png", "a-b/x", "b.png", "img", "img02.png", "img2.png", "img10.png", "img010.txt"]
    assert natural_order(names) == ordered


@given(st.lists(st.integers(0, 10**400), min_size=2, unique=True), st.sampled_from(["", "img", "a/b 3 "]))
def test_names_that_differ_in_one_number_are_in_its_order(numbers, before):
    name = f"{before}{{}}.png"
    assert natural_order(map(name.format, numbers)) == list(map(name.format, sorted(numbers)))


@given(st.lists(st.text("a1209/.-é", max_size=8), unique=True), st.randoms(use_true_random=False))
def test_the_order_does_not_depend_on_how_the_names_came(names, rng: random.Random):
    shuffled = rng.sample(names, len(names))
    assert natural_order(shuffled) == natural_order(names)
    assert sorted(natural_order(names)) == sorted(names)


def test_a_name_of_thousands_of_digits_is_ordered_too():
    assert natural_order(["9" * 5000, "1" * 5001, "8"]) == ["8", "9" * 5000, "1" * 5001]


def test_a_listing_is_deep_in_natural_order_and_without_what_is_hidden(folder):
    for name in ("b10.png", "b9.png", "a/c/1.txt", "a/c 2.txt", ".git/x", "a/.hidden.png", "__MACOSX/b9.png", "a/B"):
        write(folder, name)
    expected = ["a/B", "a/c/1.txt", "a/c 2.txt", "b9.png", "b10.png"]
    assert Files().listing(folder) == Files().listing(folder + "/") == expected


def test_a_listing_sees_what_came_after_the_last(folder):
    write(folder, "a")
    files = Files()
    assert files.listing(folder) == ["a"]
    write(folder, "b")
    assert files.listing(folder) == ["a", "b"]


def test_links_are_followed_and_do_not_go_round(tmp_path):
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "more").symlink_to(tmp_path / "other")
    (tmp_path / "data" / "2.png").symlink_to(tmp_path / "other" / "1.png")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert Files().listing(str(tmp_path / "data")) == ["1.png", "2.png", "more/1.png"]


def test_what_is_no_folder_is_an_error(folder):
    path = write(folder, "a.png")
    for wrong in (path, joined(folder, "nowhere")):
        with pytest.raises(ValueError, match=r"is no folder; give one that is there, local, gs://"):
            Files().listing(wrong)


def test_folders_and_files_are_told_apart(folder):
    path = write(folder, "in/a.png")
    files = Files()
    paths = (joined(folder, "in"), path, joined(folder, "b"))
    assert [files.is_folder(p) for p in paths] == [True, False, False]
    assert [files.is_file(p) for p in paths] == [False, True, False]


@pytest.mark.parametrize(
    ("start", "stop"), [(0, -1), (0, 10), (3, 7), (1000, -1), (1020, 2000), (5, 5), (7, 3), (0, 0), (0, 2000)]
)
def test_a_read_is_a_slice(folder, start, stop):
    path = write(folder, "a")
    assert Files().read(path, start, stop) == CONTENT[start : stop if stop >= 0 else None]


def test_what_is_not_there_cannot_be_read(folder):
    write(folder, "b")
    files = Files()
    for read in (files.read, files.state, files.open, *([] if is_local(folder) else [files.local_copy])):
        with pytest.raises(FileNotFoundError, match=r"a\.png"):
            read(joined(folder, "a.png"))


def test_a_file_url_is_a_local_path(tmp_path):
    path = "file://" + write(str(tmp_path), "a")
    assert is_local(path) and not is_local("gs://bucket/a") and not is_local("s3+x://a") and is_local("a/b://c")
    assert Files().read(path, 2, 4) == CONTENT[2:4]
    assert Files().local_copy(path) == tmp_path / "a"
    assert Files().listing(f"file://{tmp_path}") == ["a"]


def test_the_state_changes_with_the_file(folder):
    path = write(folder, "a")
    before = Files().state(path)
    assert before == Files().state(path)
    assert before.size == len(CONTENT) and before.stamp
    write(folder, "a", CONTENT[::-1])
    after = Files().state(path)
    assert after.size == before.size and after.stamp != before.stamp


def test_many_threads_read_one_file(folder):
    path = write(folder, "a")
    files = Files()
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda i: files.read(path, i, i + 3), range(500))
    assert list(parts) == [CONTENT[i : i + 3] for i in range(500)]


def test_an_opened_file_reads_and_seeks(folder):
    with Files().open(write(folder, "a")) as file:
        assert file.read(3) == CONTENT[:3]
        assert file.seek(500) == 500
        assert file.read(3) == CONTENT[500:503]
        file.seek(-2, 2)
        assert file.read() == CONTENT[-2:]
        assert file.read(1) == b""
        file.seek(5000)
        assert file.read(1) == b""
        file.seek(1)
        file.seek(2, 1)
        assert file.read(1) == CONTENT[3:4]


def test_of_a_remote_file_only_the_blocks_around_what_is_read_are_fetched(monkeypatch):
    files = Files()
    path = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(path, bytes(5 * BLOCK))
    asked = []
    read = files.read
    monkeypatch.setattr(files, "read", lambda path, start, stop: asked.append((start, stop)) or read(path, start, stop))
    with files.open(path) as file:
        for at in (0, 512, 3 * BLOCK, 3 * BLOCK + 512):
            file.seek(at)
            assert file.read(512) == bytes(512)
    fsspec.filesystem("memory").rm(path)
    assert asked == [(0, BLOCK), (3 * BLOCK, 4 * BLOCK)]


def test_a_remote_file_is_copied_once_and_again_when_it_has_changed(home, monkeypatch):
    folder = f"memory://{uuid.uuid4().hex}"
    path = write(folder, "a b.array_record")
    copy = Files().local_copy(path)
    assert copy.read_bytes() == CONTENT
    assert copy.parent == home / ".cache" / "sdxl_eqx" / "files" and copy.name.endswith("-a_b.array_record")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(Files().local_copy, 4 * [path])) == {copy}
    copy.write_bytes(CONTENT[::-1])
    assert Files().local_copy(path).read_bytes() == CONTENT[::-1]  # it was not fetched again
    copy.write_bytes(CONTENT[:5])
    assert Files().local_copy(path).read_bytes() == CONTENT
    write(folder, "a b.array_record", b"new")
    assert Files().local_copy(path).read_bytes() == b"new"
    fsspec.filesystem("memory").rm(folder, recursive=True)


def test_a_copy_that_fails_or_comes_short_leaves_nothing(home, monkeypatch):
    path = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(path, CONTENT)
    monkeypatch.setattr(type(memory), "get_file", lambda self, path, to: Path(to).write_bytes(b"short") and None)
    with pytest.raises(OSError, match="5 of 1024 bytes came"):
        Files().local_copy(path)
    memory.rm(path)
    assert [p.suffix for p in (home / ".cache/sdxl_eqx/files").iterdir()] == [".lock"]


def test_a_file_becomes_what_was_written_whole_or_stays_what_it_was(tmp_path):
    target = tmp_path / "a"
    with whole_file(target) as partial:
        partial.write_text("one")
        assert not target.exists()
    with pytest.raises(KeyError), whole_file(target) as partial:
        partial.write_text("two")
        raise KeyError
    assert target.read_text() == "one" and list(tmp_path.iterdir()) == [target]


def test_names_of_what_is_kept_differ_by_key_and_fit_a_file_system():
    path = "gs://bucket/" + "é" * 400 + ".tar"
    names = [cache_name(key, path) for key in ("a", "b", "\udcff")]
    assert len(set(names)) == 3 and all(len(n.encode()) < 200 and n.endswith(".tar") for n in names)


@pytest.mark.parametrize(
    ("path", "remedy"), [("s3://bucket/a", "pip install s3fs"), ("gs://bucket/a", "pip install gcsfs")]
)
def test_a_missing_package_is_an_error_that_names_it(monkeypatch, path, remedy):
    protocol = path.partition(":")[0]
    monkeypatch.setitem(sys.modules, remedy.split()[-1], None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    for use in (Files().read, Files().listing, Files().is_file, Files().state, Files().local_copy):
        with pytest.raises(ValueError, match=f"{path}: {protocol}:// needs a package that is not installed: {remedy}"):
            use(path)


@pytest.mark.parametrize("path", ["nothing://bucket/a", "simplecache::memory://a"])
def test_a_protocol_that_nothing_reads_is_an_error(path):
    with pytest.raises(ValueError, match=r"nothing reads .*; give a local path, gs://, s3:// or hf://"):
        Files().read(path)


@pytest.mark.parametrize("method", ["read", "listing", "is_folder", "is_file", "state", "open", "local_copy"])
def test_whatever_goes_wrong_with_a_remote_file_is_an_os_error(broken, method):
    broken(RuntimeError("the network is down"))
    with pytest.raises(OSError, match=r"gs://bucket/a: RuntimeError: the network is down"):
        getattr(Files(), method)("gs://bucket/a")


def test_only_the_hub_gets_the_token_and_nobody_sees_it(broken):
    asked = broken(PermissionError(f"401 for token {TOKEN}"))
    files = Files(TOKEN)
    for path in ("hf://datasets/a/b", "s3://a/b", "gs://a/b", "hf://datasets/a/c"):
        with pytest.raises(OSError, match="401") as caught:
            files.read(path)
        chain = [caught.value, caught.value.__cause__]
        assert TOKEN not in "".join(map(str, chain)) and caught.value.__suppress_context__
    assert asked == [("hf", {"token": TOKEN}), ("s3", {}), ("gs", {})]
    assert TOKEN not in repr(files)
    asked = broken(KeyError("x"))
    with pytest.raises(OSError, match="x"):
        Files().read("hf://datasets/a/b")
    assert asked == [("hf", {})]


def test_a_private_folder_of_the_hub_names_the_token_s_flag(broken):
    broken(FileNotFoundError("no such repository"))
    with pytest.raises(ValueError, match=r"hf://datasets/a/b is no folder.*--hf-access-token"):
        Files().listing("hf://datasets/a/b")


def test_the_hub_is_listed_anew_by_names_below_the_folder_and_read_by_the_range_alone(monkeypatch):
    """The Hub's adds the revision to what it lists, and object stores list the folder's own placeholder."""
    asked = []

    class Hub:
        def info(self, path):
            return {"name": "datasets/a/b@main", "type": "directory"}

        def find(self, path):
            return [f"datasets/a/b@main{name}" for name in ("", "/10.png", "/2.png", "/in/", "/in/1.png")]

        def invalidate_cache(self):
            asked.append("the newest")

        def cat_file(self, path, start, end, **options):
            asked.append(options)
            return b"data"

    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **options: Hub())
    assert Files().listing("hf://datasets/a/b") == ["2.png", "10.png", "in/1.png"]
    assert Files().read("hf://datasets/a/b/2.png", 0, 4) == Files().read("gs://b/2.png", 0, 4) == b"data"
    assert asked == ["the newest", {"cache_type": "none"}, {}]  # the Hub's reads ahead by megabytes otherwise


def test_names_that_differ_in_zeros_alone_have_one_order_too():
    names = ["a0", "a00", "a", "a/0", "a01", "a1"]
    assert len({tuple(natural_order(p)) for p in itertools.permutations(names)}) == 1

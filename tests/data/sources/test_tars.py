import gzip
import io
import json
import logging
import os
import tarfile
import tracemalloc
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pytest

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Source, tar_index
from sdxl_eqx.data.sources.files import BLOCK, Files
from sdxl_eqx.data.sources.tars import Tars


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def tar(members, *, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of files: pairs of name and content, or of name and a type of member."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as file:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes) and content in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
                member.type, member.linkname = content, "elsewhere"
                file.addfile(member)
            else:
                content = content if isinstance(content, bytes) else content.encode()
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    return data.getvalue()


def resummed(data, *at):
    """A tar with the checksums of the headers at these bytes made right."""
    data = bytearray(data)
    for start in at:
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def shard(*keys, **options):
    members = [(f"{key}.{end}", f"{word} {key}") for key in keys for end, word in (("jpg", "picture"), ("txt", "cat"))]
    return tar(members, **options)


@pytest.fixture
def write(tmp_path):
    """Writes a tar of members, or bytes, and gives its path."""
    (tmp_path / "data").mkdir()

    def put(*members, name="0.tar"):
        path = tmp_path / "data" / name
        path.write_bytes(members[0] if isinstance(members[0], bytes) else tar(members))
        return str(path)

    return put


@pytest.fixture
def scans(monkeypatch):
    """The tars whose headers were read."""
    read = []
    scan = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda file, path: read.append(path) or scan(file, path))
    return read


def content(source):
    keys = [source.name(i).rpartition(":")[2] for i in range(len(source))]
    return [(key, source.captions(i), source.picture(i)) for i, key in enumerate(keys)]


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_members_of_one_key_are_a_sample_and_tars_come_in_natural_order(write):
    paths = [write(shard("d"), name="10.tar"), write(shard("b", "a"), name="9.tar"), write(shard("c"), name="09.tar")]
    source = Tars(paths)
    assert isinstance(source, Source)
    assert content(source) == [(key, (f"cat {key}",), f"picture {key}".encode()) for key in "cbad"]
    assert [source.picture(0, limit) for limit in (0, 3, 100)] == [b"", b"pic", b"picture c"]
    assert repr(source) == f"Tars(3 from {paths[2]!r} on, 4 samples)"


def test_only_the_first_samples_and_their_tars_are_read_where_a_number_is_given(write):
    paths = [write(shard("a", "b", "c"), name="0.tar"), write(b"no tar", name="1.tar")]
    assert [key for key, _, _ in content(Tars(paths, max_samples=2))] == ["a", "b"]
    with pytest.raises(ValueError, match=r"1\.tar is damaged or no tar"):
        Tars(paths, max_samples=4)


def test_a_key_ends_at_the_first_dot_of_the_file_s_name(write):
    hidden = [(f"{name}.{end}", "no") for name in ("b/", "__MACOSX/y", "c/.git/z") for end in ("jpg", "txt")]
    path = write(
        ("./a.v/x.jpg", "p"), ("./a.v/x.txt", "c"), ("b/x.PNG", "q"), ("b/x.seg.png", "no"), ("b/x.txt", "d"),
        ("README", "no"), *hidden,
    )  # fmt: skip
    assert content(Tars([path])) == [("a.v/x", ("c",), b"p"), ("b/x", ("d",), b"q")]


def test_members_of_a_key_need_not_be_neighbours_and_a_key_may_come_again(write):
    path = write(("a.jpg", "p"), ("b.jpg", "q"), ("a.txt", "c"), ("b.txt", "d"), ("a.jpg", "r"), ("a.txt", "e"))
    assert content(Tars([path])) == [("a", ("c",), b"p"), ("b", ("d",), b"q"), ("a", ("e",), b"r")]


@pytest.mark.parametrize(
    ("columns", "picture", "caption"),
    [
        ({}, b"jpg", "text"),
        ({"image_column": "Depth.PNG"}, b"depth", "text"),
        ({"image_column": "png"}, b"png", "text"),
        ({"caption_column": "title"}, b"jpg", "from json"),
        ({"caption_column": "prompt"}, b"jpg", "prompt"),
    ],
)
def test_columns_choose_among_the_members_of_a_key(write, columns, picture, caption):
    fields = json.dumps({"title": "from json", "text": "not this"})
    path = write(
        ("a.cls", "7"), ("a.jpg", "jpg"), ("a.depth.png", "depth"), ("a.png", "png"),
        ("a.json", fields), ("a.caption", "no"), ("a.txt", "text\n"), ("a.prompt", "prompt"),
    )  # fmt: skip
    assert content(Tars([path], **columns)) == [("a", (caption,), picture)]


def test_captions_of_json_are_those_of_its_column(write):
    values = ["one", ["one", "two"], '["one", "two"]']
    path = write(
        *(m for i, v in enumerate(values) for m in ((f"{i}.webp", ""), (f"{i}.json", json.dumps({"text": v}))))
    )
    source = Tars([path])
    assert [source.captions(i) for i in range(3)] == [("one",), ("one", "two"), ("one", "two")]


def test_texts_follow_the_rule_of_folders(write, caplog):
    path = write(
        ("a.jpg", ""), ("a.txt", "\n a cat \nmore"), ("b.jpg", ""), ("b.txt", " "), ("c.jpg", ""), ("c.txt", "c")
    )
    source = Tars([path])
    assert said(caplog) == [f"1 of 3 texts of {source!r} have further lines; only the first is the caption"]
    assert [source.captions(i) for i in (0, 2)] == [("a cat",), ("c",)]
    with pytest.raises(BadSample, match="its caption: empty; write the caption into it") as caught:
        source.captions(1)
    assert caught.value.name == f"{path}:b"


@pytest.mark.parametrize("value", ["{'text': 1}", "[" * 100_000, '["a"]', '{"title": "a"}', '{"text": 3}'])
def test_json_without_a_caption_makes_a_bad_sample(write, value):
    path = write(("a.jpg", ""), ("a.json", value), ("b.jpg", ""), ("b.json", '{"text": "b"}'))
    source = Tars([path])
    with pytest.raises(BadSample, match=":a: its caption: "):
        source.captions(0)
    assert source.captions(1) == ("b",)


def test_a_column_that_no_json_has_is_an_error_that_names_those_there(write):
    path = write(*(m for i in range(30) for m in ((f"{i}.jpg", ""), (f"{i}.json", '{"title": "a", "n": 1}'))))
    rule = r"none of the \d+ .json looked at.* no field 'text' \(fields: 'title', 'n'\); --caption-column names the one"
    with pytest.raises(ValueError, match=rule):
        Tars([path])


def test_what_is_left_out_is_counted_once_in_the_log(write, caplog):
    first = write(*[("a.jpg", ""), ("a.txt", "a"), ("b.jpg", "")], name="0.tar")
    second = write(
        ("a.txt", ""), ("b.txt", ""), ("c.jpg", ""), ("c.txt", "c"), ("d.jpg", tarfile.SYMTYPE), ("e", tarfile.DIRTYPE),
        ("f.jpg", tarfile.LNKTYPE), name="1.tar",
    )  # fmt: skip
    lines = [
        f"1 keys with a picture and no caption in 2 tars with 5 keys, the first in {first}: left out",
        f"2 keys without a picture in 2 tars with 5 keys, the first in {second}: left out",
        f"2 links and sparse files in 2 tars with 5 keys, the first in {second}: left out",
    ]
    for _ in range(2):  # the second time from the index
        assert [key for key, _, _ in content(Tars([first, second]))] == ["a", "c"]
        assert sorted(said(caplog)) == lines
        caplog.clear()


def test_tars_without_any_sample_are_an_error_that_says_what_is_there(write):
    paths = [write(("in/a.v1.jpg", ""), ("in/a.cls", ""), ("b.txt", ""), name="0.tar"), write(tar([]), name="1.tar")]
    rule = (
        r"no key of 2 tars .* keys such as \['in/a', 'b'\] with extensions \['cls', 'txt', 'v1.jpg'\]; --image-column"
    )
    with pytest.raises(ValueError, match=rule):
        Tars(paths)
    with pytest.raises(ValueError, match="there are no keys"):
        Tars(paths[1:])
    with pytest.raises(ValueError, match="there are no tars"):
        Tars([])


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_names_in_other_scripts_are_read(write, form):
    key = "/".join(["ordner" * 12] * 3) + "/größe"
    assert content(Tars([write(shard(key, "b", form=form))]))[0][0] == key


def test_names_that_are_no_utf_8_are_read(write):
    path = write(resummed(shard("a").replace(b"a.jpg", b"\xff.jpg").replace(b"a.txt", b"\xff.txt"), 0, 1024))
    assert Tars([path]).name(0) == f"{path}:\udcff"
    assert Tars([path]).name(0) == f"{path}:\udcff"


def test_sparse_members_are_left_out(write, caplog):
    data = bytearray(shard("a", "b"))
    data[156:157] = tarfile.GNUTYPE_SPARSE
    assert [key for key, _, _ in content(Tars([write(resummed(data, 0))]))] == ["b"]
    assert "1 links and sparse files" in said(caplog)[1]


@pytest.mark.parametrize("size", [0, 100, 700, 1024 + 300, 2048 + 512 + 3])
def test_a_truncated_tar_is_an_error_that_names_it(write, size):
    path = write(shard("a", "b")[:size])
    with pytest.raises(ValueError, match=r"0\.tar is damaged or no tar \(.*\); copy or download it again"):
        Tars([path])
    assert not os.path.exists(f"{path}.index")


def test_a_tar_that_ends_without_its_closing_zeros_is_read(write):
    assert len(Tars([write(shard("a", "b")[:4096])])) == 2


@pytest.mark.parametrize(
    ("at", "damage"),
    [
        (1024, b"\xff"),
        (1024 + 124, b"\x80\x00\x01"),
        (1024, b"rubbish"),
        (1024 + 124, 12 * b"\xff"),
        (1024 + 124, 10 * b"\xff" + b"\xfe\x00"),
    ],
)
def test_a_damaged_header_is_an_error_and_not_the_end(write, at, damage):
    data = bytearray(shard("a", "b"))
    data[at : at + len(damage)] = damage
    if len(damage) > 7:  # a size below zero, rightly summed
        data = resummed(data, at - 124)
    with pytest.raises(ValueError, match=r"0\.tar is damaged or no tar"):
        Tars([write(bytes(data))])


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar"])
def test_compressed_tars_are_refused_with_the_remedy(write, name):
    path = write(gzip.compress(shard("a")), name=name)
    with pytest.raises(ValueError, match=rf"{name} is compressed \(gzip\), .*; unpack it to a plain .tar"):
        Tars([path])


def test_the_index_is_made_once_and_lies_beside_the_tar(write, scans, home):
    path = write(shard("a", "b"))
    before = content(Tars([path]))
    assert sorted(os.listdir(os.path.dirname(path))) == ["0.tar", "0.tar.index"]
    assert content(Tars([path])) == before and scans == [path]
    assert content(Tars([path], image_column="txt", caption_column="jpg"))[0] == ("a", ("picture a",), b"cat a")
    assert scans == [path] and not home.exists()


def test_a_tar_that_has_changed_gets_another_index(write, scans):
    path = write(shard("a", "b"))
    Tars([path])
    write(shard("c", "d"))
    os.utime(path, ns=(1, 1))
    assert [key for key, _, _ in content(Tars([path]))] == ["c", "d"]
    write(shard(*"abcdefghij"))
    os.utime(path, ns=(1, 1))
    assert len(Tars([path])) == 10
    Tars([path])
    assert len(scans) == 3


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "text", "head"])
def test_a_damaged_index_is_made_again_with_a_word(write, scans, caplog, damage):
    path = write(shard("a", "b"))
    expected = content(Tars([path]))
    index = f"{path}.index"
    data = bytearray(Files().read(index))
    if damage == "flipped":
        data[-3] ^= 1
    changed = {"empty": b"", "short": data[:-4], "flipped": data, "text": b"not an index at all"}
    changed["head"] = bytes(data).replace(b'\\"txt\\"', b'\\"txu\\"')
    assert changed[damage] != data or damage == "flipped"
    with open(index, "wb") as file:
        file.write(changed[damage])
    assert content(Tars([path])) == expected
    assert len(scans) == 2 and len(said(caplog)) == 1 and f"{index} is damaged (" in said(caplog)[0]
    caplog.clear()
    assert content(Tars([path])) == expected and len(scans) == 2 and not said(caplog)


def test_an_index_of_another_format_is_made_again(write, scans, monkeypatch):
    path = write(shard("a"))
    Tars([path])
    monkeypatch.setattr(tar_index, "FORMAT", "2")
    assert len(Tars([path])) == 1 and len(scans) == 2


def test_where_a_folder_takes_no_file_the_index_lies_in_the_user_s_cache(write, scans, home, monkeypatch):
    path = write(shard("a"))
    save = tar_index.save

    def refuse(index, place, state):
        if place.name == "0.tar.index":
            raise PermissionError("read-only")
        save(index, place, state)

    monkeypatch.setattr(tar_index, "save", refuse)
    for _ in range(2):
        assert len(Tars([path])) == 1
    (index,) = (home / ".cache" / "sdxl_eqx" / "index").iterdir()
    assert index.name.endswith("-0.tar.index") and scans == [path]


def test_an_index_that_can_be_kept_nowhere_is_said_and_used(write, caplog, monkeypatch):
    def refuse(index, place, state):
        raise PermissionError("read-only")

    monkeypatch.setattr(tar_index, "save", refuse)
    assert len(Tars([write(shard("a"))])) == 1
    assert "cannot be kept, so that each run makes it again: read-only" in said(caplog)[0]


def test_a_folder_for_the_index_is_used_where_it_is_given(write, tmp_path):
    path = write(shard("a"))
    Tars([path], index_folder=tmp_path / "given")
    assert len(list((tmp_path / "given").iterdir())) == 1 and not os.path.exists(f"{path}.index")


def test_remote_tars_are_indexed_by_their_headers_and_read_by_ranges(home, scans, monkeypatch):
    folder = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    big = bytes(3 * BLOCK)
    memory.pipe_file(f"{folder}/1.tar", tar([("a.png", big), ("a.txt", "a"), ("b.png", "picture b"), ("b.txt", "b")]))
    memory.pipe_file(f"{folder}/0.tar", shard("z"))
    read = []
    plain = Files.read

    def recorded(self, path, start=0, stop=-1):
        read.append(stop - start)
        return plain(self, path, start, stop)

    monkeypatch.setattr(Files, "read", recorded)
    paths = [f"{folder}/1.tar", f"{folder}/0.tar"]
    source = Tars(paths)
    assert sum(read) < 2.5 * BLOCK
    assert [source.name(i) for i in range(3)] == [f"{folder}/0.tar:z", f"{folder}/1.tar:a", f"{folder}/1.tar:b"]
    assert source.captions(1) == ("a",) and source.picture(2) == b"picture b" and source.picture(1) == big
    assert len(Tars(paths)) == 3 and len(scans) == 2
    assert len(list((home / ".cache" / "sdxl_eqx" / "index").iterdir())) == 2
    memory.pipe_file(f"{folder}/0.tar", shard("y"))
    assert Tars(paths).name(0) == f"{folder}/0.tar:y" and len(scans) == 3
    memory.rm(folder, recursive=True)
    with pytest.raises(BadSample, match=r"1.tar:b: FileNotFoundError: "):
        source.picture(2)


def test_bytes_that_are_no_longer_there_make_a_bad_sample(write):
    path = write(shard("a", "b"))
    source = Tars([path])
    os.truncate(path, 2 * 1024 + 512 + 4)
    assert source.picture(0) == b"picture a" and source.picture(1, 4) == b"pict"
    with pytest.raises(BadSample, match=r":b: the tar ends 5 bytes before its picture does") as caught:
        source.picture(1)
    assert caught.value.name == f"{path}:b"
    with pytest.raises(BadSample, match="before its caption does"):
        source.captions(1)
    os.unlink(path)
    with pytest.raises(BadSample, match="FileNotFoundError"):
        source.picture(0)


def test_many_threads_read_one_source(write):
    paths = [write(shard(*(f"{s}-{i}" for i in range(50))), name=f"{s}.tar") for s in range(4)]
    source = Tars(paths)
    expected = content(source)
    order = np.random.default_rng(0).permutation(800) % 200
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: (source.captions(i), source.picture(i)), order.tolist()))
    assert read == [expected[i][1:] for i in order]


def test_the_memory_to_make_an_index_is_not_that_of_the_headers():
    data = io.BytesIO(tar([(f"{i}.jpg", "") for i in range(2000)]))
    tracemalloc.start()
    index = tar_index.scan(io.BufferedReader(data), "0.tar")  # pyright: ignore[reportArgumentType]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(index.key) == 2000 and peak < 1_000_000

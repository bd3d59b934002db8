import json
import logging
import uuid
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest
from PIL import Image

from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.files import joined
from sdxl_eqx.data.sources.folder import PICTURES, ImageFolder


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """A folder of three pictures, local and remote."""
    root = str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"
    put(root, {f"{name}.png": f"bytes of {name}" for name in "abc"})
    yield root
    if request.param == "memory":
        fsspec.filesystem("memory").rm(root, recursive=True)


@pytest.fixture
def local(tmp_path):
    put(str(tmp_path), {f"{name}.png": f"bytes of {name}" for name in "abc"})
    return str(tmp_path)


def put(folder, files):
    for name, content in files.items():
        with fsspec.open(joined(folder, name), "wb", auto_mkdir=True) as file:
            file.write(content if isinstance(content, bytes) else content.encode())  # pyright: ignore


def lines(*samples):
    return "\n".join(json.dumps(sample) for sample in samples)


def line(name, caption):
    return {"file_name": name, "text": caption}


def content(source):
    return [(source.name(i), source.captions(i)) for i in range(len(source))]


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_samples_keep_the_order_of_the_lines(folder):
    put(folder, {"metadata.jsonl": lines(*(line(f"{n}.png", f"letter {n}") for n in "bac"))})
    source = ImageFolder(folder)
    assert isinstance(source, Source)
    assert content(source) == [(f"{n}.png", (f"letter {n}",)) for n in "bac"]
    assert [source.picture(i) for i in range(3)] == [b"bytes of b", b"bytes of a", b"bytes of c"]
    assert source.picture(1, limit=5) == b"bytes"
    assert repr(source) == f"ImageFolder({folder!r}, 3 samples)"


def test_only_the_first_samples_are_read_where_a_number_is_given(local):
    put(local, {"metadata.jsonl": lines(line("b.png", "b"), line("a.png", "a")) + "\nno JSON"})
    assert content(ImageFolder(local, max_samples=2)) == [("b.png", ("b",)), ("a.png", ("a",))]
    with pytest.raises(ValueError, match="line 3"):
        ImageFolder(local, max_samples=3)


def test_a_column_that_is_asked_for_comes_before_file_name_and_blank_lines_do_not_count(local):
    text = json.dumps({"picture": "a.png", "file_name": "b.png", "prompt": "ä"}, ensure_ascii=False)
    put(local, {"metadata.jsonl": f"\n{text}\n  \n"})
    assert content(ImageFolder(local, image_column="picture", caption_column="prompt")) == [("a.png", ("ä",))]
    assert content(ImageFolder(local, caption_column="prompt")) == [("b.png", ("ä",))]


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        (["one", "two"], ("one", "two")),
        ('["one", "two"]', ("one", "two")),
        ({"long": "one", "n": 3}, ("one",)),
        ("[one", ("[one",)),
        ("", ("",)),
    ],
)
def test_a_caption_may_be_a_list_or_json(local, value, captions):
    put(local, {"metadata.jsonl": lines(line("a.png", value))})
    assert ImageFolder(local).captions(0) == captions


def test_csv_may_have_quotes_commas_line_ends_and_a_byte_order_mark(folder):
    rows = 'file_name,text,size\r\n"a.png","a ""big"",\r\nred cat",3\r\n\r\nb.png,"[""one"", ""ä""]",\r\n'
    put(folder, {"metadata.csv": "\ufeff" + rows})
    assert content(ImageFolder(folder)) == [("a.png", ('a "big",\r\nred cat',)), ("b.png", ("one", "ä"))]


def test_metadata_of_all_folders_are_joined_in_natural_order_with_paths_from_their_own(folder):
    put(folder, {"part10/metadata.jsonl": lines(line("in/y.png", "ten")), "part10/in/y.png": "y"})
    put(folder, {"part2/metadata.csv": "image,text\nx.png,two\n", "part2/x.png": "x", "part2/a.png": "left out"})
    put(folder, {"metadata.jsonl": lines(line("part2/x.png", "root"))})
    source = ImageFolder(folder)
    assert content(source) == [("part2/x.png", ("root",)), ("part2/x.png", ("two",)), ("part10/in/y.png", ("ten",))]
    assert [source.picture(i) for i in range(3)] == [b"x", b"x", b"y"]
    assert content(ImageFolder(folder, max_samples=2)) == content(source)[:2]


def test_pictures_that_no_line_names_are_counted_in_the_log(local, caplog):
    put(local, {"metadata.jsonl": lines(line("a.png", "a")), "notes.md": ""})
    ImageFolder(local)
    assert warnings(caplog) == [f"2 pictures of {local} are in no metadata file: left out"]
    caplog.clear()
    ImageFolder(local, max_samples=1)
    assert not warnings(caplog)


def test_a_path_may_be_written_in_other_ways_and_name_what_is_hidden(folder):
    put(folder, {".in/d.png": "d", "metadata.jsonl": lines(line("./a.png", "a"), line(".in//d.png", "d"))})
    source = ImageFolder(folder)
    assert [source.name(i) for i in range(2)] == ["a.png", ".in/d.png"]
    assert source.picture(1) == b"d"


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ("{'file_name': 'a.png'}", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ('["a.png", "a"]', "a JSON list, not an object"),
        ('{"file_name": "a.png"}', r"no field 'text' \(fields: 'file_name'\); --caption-column"),
        ('{"text": "a"}', r"no field 'image' or 'file_name' \(fields: 'text'\); --image-column"),
        ('{"file_name": "a.png", "text": null}', "field 'text': a caption must be a string, .* not 'None'"),
        ('{"file_name": "a.png", "text": []}', "field 'text': a caption must be a string"),
        ('{"file_name": 3, "text": "a"}', "field 'file_name' must be a string, not 3"),
        ('{"file_name": "a.png", "image": {}, "text": "a"}', "field 'image' must be a string, not {}"),
        ('{"file_name": "d.png", "text": "d"}', "there is no picture .*d.png; add the file or remove the line"),
        ('{"file_name": "", "text": "d"}', "there is no picture"),
        ('{"file_name": "\\u0000", "text": "d"}', "there is no picture"),
        ('{"file_name": "/etc/passwd", "text": "d"}', "leaves the folder"),
        ('{"file_name": "../a.png", "text": "d"}', "leaves the folder"),
        ('{"file_name": "in/../a.png", "text": "d"}', "leaves the folder"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number_and_rule(folder, bad, rule):
    put(folder, {"metadata.jsonl": f'{{"file_name": "a.png", "text": "a"}}\n{bad}'})
    with pytest.raises(ValueError, match=f"metadata.jsonl line 2: .*{rule}") as caught:
        ImageFolder(folder)
    remedies = ("write a line such as {", "names the one to read", "add the file", "give a path inside")
    assert any(remedy in str(caught.value) for remedy in remedies)


def test_a_nested_line_does_not_leave_its_own_folder_and_the_error_names_it(folder):
    put(folder, {"in/metadata.jsonl": lines(line("../a.png", "a"))})
    with pytest.raises(ValueError, match=r"in/metadata.jsonl line 1: .*leaves the folder; give a path inside .*/in,"):
        ImageFolder(folder)


@pytest.mark.parametrize(
    ("rows", "rule"),
    [
        (b'file_name,text\n"a\nb.png",x\na.png,a,b\n', r"line 4: 3 values for the 2 columns \['file_name', 'text'\]"),
        (b"file_name,text\na.png\n", r"line 2: 1 values for the 2 columns .*; quote a value that holds commas"),
        (b'file_name,text\na.png,"a\n', "line 2: unexpected end of data; quote a value"),
        (b'file_name,text\na.png,"a"b"\n', "line 2: .*double the quotes in it"),
        (b"file_name,caption\na.png,a\n", r"line 2: no field 'text' \(fields: 'file_name', 'caption'\)"),
        (b"file_name,text\nd.png,a\n", "line 2: there is no picture"),
        (b"file_name,text\n\xff.png,a\n", "no UTF-8 .*; save it as UTF-8"),
        (b"file_name,text\n", 'has no samples: it must hold one a line, such as {"file_name": "cat.png"'),
        (b"", "has no samples"),
    ],
)
def test_bad_csv_is_an_error_with_its_line_and_rule(local, rows, rule):
    put(local, {"metadata.csv": rows, "a\nb.png": ""})
    with pytest.raises(ValueError, match=f"metadata.csv {rule}"):
        ImageFolder(local)


def test_bytes_that_are_no_utf_8_are_an_error(local):
    put(local, {"metadata.jsonl": b'{"file_name": "a.png", "text": "\xff"}'})
    with pytest.raises(ValueError, match="line 1: no valid JSON in UTF-8"):
        ImageFolder(local)


def test_a_file_without_lines_is_an_error(local):
    put(local, {"metadata.jsonl": "\n\n"})
    with pytest.raises(ValueError, match=r"metadata\.jsonl has no samples"):
        ImageFolder(local)


def test_two_kinds_of_metadata_in_one_folder_are_an_error_and_in_two_are_not(local):
    put(local, {"in/metadata.jsonl": lines(line("x.png", "x")), "in/x.png": "", "metadata.csv": "image,text\na.png,a"})
    assert content(ImageFolder(local)) == [("in/x.png", ("x",)), ("a.png", ("a",))]
    put(local, {"in/metadata.csv": "image,text\nx.png,x"})
    with pytest.raises(ValueError, match=r"/in has both metadata.csv and metadata.jsonl; keep one of them"):
        ImageFolder(local)


def test_the_first_line_of_a_text_that_is_not_empty_is_the_caption_of_its_picture(folder):
    put(
        folder, {"a.txt": "\ufeff\r\n  a cat \r\nsitting", "b.caption": "b", "c.TXT": "c\x0c\u2028d", "c.caption": "no"}
    )
    put(folder, {"in/x10.JPG": "x10", "in/x10.txt": "[ten", "in/x9.v2.webp": "x9", "in/x9.v2.txt": "nine"})
    put(folder, {"a.caption": "no", ".hidden.png": "", "__MACOSX/a.png": ""})
    source = ImageFolder(folder)
    names = ["a.png", "b.png", "c.png", "in/x9.v2.webp", "in/x10.JPG"]
    captions = ["a cat", "b", "c\x0c\u2028d", "nine", "[ten"]
    assert content(source) == list(zip(names, ((c,) for c in captions), strict=True))
    assert source.picture(4) == b"x10"
    assert content(ImageFolder(folder, max_samples=2)) == content(source)[:2]


def test_further_lines_of_texts_and_texts_without_pictures_are_said_once(local, caplog):
    put(local, {"a.txt": "a\nmore", "b.txt": "b\n\n", "c.txt": "\n c\n d", "readme.txt": "hello"})
    source = ImageFolder(local)
    assert warnings(caplog) == [
        f"1 texts of {local} have no picture of a kind that is read beside them, such as readme.txt: left out",
        f"2 of 3 texts of {source!r} have further lines; only the first is the caption",
    ]


def test_of_many_texts_some_from_all_over_are_looked_at(tmp_path, caplog):
    for i in range(1500):
        (tmp_path / f"{i}.png").touch()
        (tmp_path / f"{i}.txt").write_text("a\nb" if i >= 1000 else "a")
    ImageFolder(str(tmp_path))
    assert "250 of 750 texts" in warnings(caplog)[0] and "that were looked at have further" in warnings(caplog)[0]


def test_a_text_that_cannot_be_read_makes_a_bad_sample(folder):
    put(folder, {"a.txt": " \n", "b.txt": b"\xff", "c.txt": "c"})
    source = ImageFolder(folder)
    for index, reason in enumerate(["its text a.txt: empty; write the caption", "its text b.txt: .*utf-8"]):
        with pytest.raises(BadSample, match=reason) as caught:
            source.captions(index)
        assert caught.value.name == source.name(index)
    assert source.captions(2) == ("c",)


def test_a_picture_without_its_text_is_an_error_that_names_both(local):
    put(local, {"a.txt": "a", "c.txt": "c"})
    rule = r"1 of 3 pictures of .* have no text, such as b.png: write its caption into b.txt, move the picture away, "
    rule += "or give those without one with --instance-prompt"
    with pytest.raises(ValueError, match=rule):
        ImageFolder(local)
    assert len(ImageFolder(local, max_samples=1)) == 1


def test_pictures_without_any_captions_are_an_error_that_shows_both_ways(local):
    with pytest.raises(
        ValueError,
        match=r'has pictures but no captions.*"caption": "a photo.*, a text.*such as a.txt, or all.*--instance-prompt',
    ):
        ImageFolder(local, caption_column="caption")


def test_a_folder_without_pictures_is_an_error_that_says_what_is_there(tmp_path):
    (tmp_path / "a.jxl").touch()
    with pytest.raises(ValueError, match=r'no metadata.jsonl, .*: \.jxl\).*metadata.jsonl .*"file_name": "cat.png"'):
        ImageFolder(str(tmp_path))
    (tmp_path / "a.jxl").unlink()
    with pytest.raises(ValueError, match=r"no pictures \(kinds of file: none\)"):
        ImageFolder(str(tmp_path))


def test_a_missing_folder_is_an_error(folder):
    with pytest.raises(ValueError, match=r"nowhere is no folder; give one that is there"):
        ImageFolder(joined(folder, "nowhere"))


def test_a_picture_that_cannot_be_read_is_a_bad_sample(folder):
    put(folder, {"metadata.jsonl": lines(line("a.png", "a"), line("b.png", "b"))})
    source = ImageFolder(folder)
    fs = fsspec.filesystem(folder.partition("://")[0] if "://" in folder else "file")
    fs.rm(joined(folder, "a.png"))
    with pytest.raises(BadSample, match=r"^a\.png: FileNotFoundError: .*a\.png") as caught:
        source.picture(0)
    assert caught.value.name == "a.png"
    assert source.captions(0) == ("a",) and source.picture(1) == b"bytes of b"


def test_many_threads_read_one_source(folder):
    put(folder, {f"{n}.txt": f"letter {n}" for n in "abc"})
    source = ImageFolder(folder)
    with ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda i: (source.captions(i % 3), source.picture(i % 3, 10)), range(300))
    assert list(read) == [((f"letter {'abc'[i % 3]}",), f"bytes of {'abc'[i % 3]}".encode()) for i in range(300)]


def test_the_bundled_pictures_are_64_samples():
    source = ImageFolder(str(resolve("asset:emoji")))
    assert len(source) == 64 and source.name(0) == "sloth.png"
    assert source.captions(0) == ("a 3d emoji of sloth, animals & nature",)


def test_pillow_reads_every_kind_of_picture():
    opened = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    assert opened >= PICTURES and {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif"} <= PICTURES

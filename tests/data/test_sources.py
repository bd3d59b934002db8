import json

import pytest

from sdxl_eqx.data.assets import resolve
from sdxl_eqx.data.sources import Example, ImageFolder


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"not looked at")
    write(tmp_path, *(json.dumps({"file_name": f"{n}.png", "text": f"letter {n}"}) for n in "bac"))
    return tmp_path


def write(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


def test_samples_keep_the_order_of_the_file(folder):
    source = ImageFolder(folder)
    assert len(source) == 3
    assert [source[i] for i in range(3)] == [Example(folder / f"{n}.png", f"letter {n}") for n in "bac"]


def test_only_the_first_samples_are_read_where_a_number_is_given(folder):
    assert [e.caption for e in ImageFolder(folder, max_samples=2).examples] == ["letter b", "letter a"]


def test_columns_can_have_other_names_and_blank_lines_do_not_count(folder):
    write(folder, "", json.dumps({"image": "a.png", "prompt": "ä"}, ensure_ascii=False), "  ", "")
    assert ImageFolder(folder, image_column="image", caption_column="prompt")[0].caption == "ä"


def test_the_bundled_pictures_are_64_samples():
    assert ImageFolder(resolve("asset:emoji"))[0].caption == "a 3d emoji of sloth, animals & nature"
    assert len(ImageFolder(resolve("asset:emoji"))) == 64


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder; give a folder"):
        ImageFolder(tmp_path / "nowhere")


def test_a_folder_without_metadata_is_an_error_that_shows_a_line(tmp_path):
    with pytest.raises(ValueError, match=r'has no metadata.jsonl: .*"file_name": "cat.png"'):
        ImageFolder(tmp_path)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("{'file_name': 'a.png'}", "no valid JSON"),
        ('["a.png", "a"]', "a JSON list, not an object"),
        ('{"file_name": "a.png"}', r"no field 'text' \(fields: 'file_name'\); --caption-column"),
        ('{"text": "a"}', "no field 'file_name' .*--image-column"),
        ('{"file_name": "a.png", "text": null}', "field 'text' must be a string, not None"),
        ('{"file_name": 3, "text": "a"}', "field 'file_name' must be a string, not 3"),
        ('{"file_name": "d.png", "text": "d"}', "there is no picture .*d.png; add the file or remove the line"),
        ('{"file_name": "", "text": "d"}', "there is no picture"),
        ('{"file_name": "/etc/passwd", "text": "d"}', "leaves the folder"),
        ('{"file_name": "../a.png", "text": "d"}', "leaves the folder"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number_and_rule(folder, line, rule):
    write(folder, '{"file_name": "a.png", "text": "a"}', line)
    with pytest.raises(ValueError, match=f"metadata.jsonl line 2: .*{rule}") as caught:
        ImageFolder(folder)
    remedies = ("write a line such as {", "names the one to read", "add the file", "give a path inside")
    assert any(remedy in str(caught.value) for remedy in remedies)


def test_bytes_that_are_no_utf_8_are_an_error(folder):
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "\xff"}')
    with pytest.raises(ValueError, match="line 1: no valid JSON in UTF-8"):
        ImageFolder(folder)


def test_a_file_without_lines_is_an_error(folder):
    write(folder, "", "")
    with pytest.raises(ValueError, match="has no samples"):
        ImageFolder(folder)

"""Pictures that say how they were made: files that last, and their names."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from made_pictures import FULL, PLAIN, SAID, changed
from PIL import Image

from sdxl_eqx.sampling.png import (
    grid_file,
    next_number,
    picture_file,
    read_parameters,
    read_settings,
    save_png,
)

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


@pytest.mark.parametrize("prompt, chunk", [("a café", b"tEXtparameters"), ("日本 🐱", b"iTXtparameters")])
def test_a_file_keeps_pixels_parameters_and_settings(tmp_path: Path, prompt: str, chunk: bytes):
    file = tmp_path / "new" / "one.png"
    made = changed(FULL, prompt=prompt)
    save_png(PICTURE, file, made, {"steps": 30, "size": (832, 1216), "where": Path("here")})
    np.testing.assert_array_equal(np.asarray(Image.open(file)), PICTURE)
    assert read_parameters(file) == made
    assert read_settings(file) == {"steps": 30, "size": [832, 1216], "where": "here"}
    assert chunk in file.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["one.png"]


def test_no_secret_is_kept(tmp_path: Path):
    file = tmp_path / "one.png"
    url = "https://me:s3cret@host/a.png?sig=s3cret#s3cret"
    inner = {"hf_access_token": "s3cret", "api-key": "s3cret", "tokenizer": "kept", "keep_tokens": 2}
    settings = {"token": "s3cret", "parts": [inner], "image": f"see {url}"}
    save_png(PICTURE, file, PLAIN, settings)
    assert b"s3cret" not in file.read_bytes()
    assert read_settings(file) == {
        "parts": [{"tokenizer": "kept", "keep_tokens": 2}],
        "image": "see https://host/a.png",
    }


def test_text_that_no_file_can_hold_is_replaced(tmp_path: Path):
    file = tmp_path / "one.png"
    save_png(PICTURE, file, changed(PLAIN, prompt="a\0b\udc80"), {})
    assert read_parameters(file).prompt == "ab?"


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "one.png"
    save_png(PICTURE, file, PLAIN, {})
    before = file.read_bytes()

    def fail(self: Image.Image, where: Path, *args: object, **options: object) -> None:
        Path(where).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(PICTURE, file, FULL, {})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_a_text_behind_the_pixels_is_found(tmp_path: Path):
    file = tmp_path / "one.png"
    Image.fromarray(PICTURE).save(file)
    chunk = b"tEXtparameters\0" + SAID.encode("latin-1")
    whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    pixels, end = file.read_bytes()[:-12], file.read_bytes()[-12:]
    file.write_bytes(pixels + whole + end)
    assert read_parameters(file) == FULL


@pytest.mark.parametrize("data", [b"", b"GIF89a", None])
def test_a_file_without_parameters_is_named(tmp_path: Path, data: bytes | None):
    file = tmp_path / "one.png"
    if data is None:
        Image.fromarray(PICTURE).save(file)
    else:
        file.write_bytes(data)
    for read in (read_parameters, read_settings):
        with pytest.raises(ValueError, match=r"one\.png"):
            read(file)


def test_a_sheet_of_several_pictures_has_settings_alone(tmp_path: Path):
    save_png(PICTURE, tmp_path / "grid.png", None, {"n": 4})
    assert read_settings(tmp_path / "grid.png") == {"n": 4}
    with pytest.raises(ValueError, match="holds no text"):
        read_parameters(tmp_path / "grid.png")


def test_numbers_go_on_after_the_highest(tmp_path: Path):
    assert next_number(tmp_path / "none") == 0
    assert grid_file(tmp_path).name == "grid-0000.png"
    for name in ("00002-77.png", "00010-1.png", "grid-0041.png", "99999x.png", "notes.txt", "00003.jpg"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 11
    assert picture_file(tmp_path, 11, 5) == tmp_path / "00011-5.png"
    assert grid_file(tmp_path).name == "grid-0042.png"

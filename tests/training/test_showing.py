import json

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.config import SampleConfig
from sdxl_eqx.data.sources.folder import ImageFolder
from sdxl_eqx.training.showing import caption_retrieval, sample_prompts, save_pictures

COLORS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90))


@pytest.fixture
def source(tmp_path):
    """Four plain pictures, none square."""
    for i, color in enumerate(COLORS):
        Image.new("RGB", (12, 8 + i), color).save(tmp_path / f"{i}.png")
    lines = (json.dumps({"file_name": f"{i}.png", "text": f"color {i}"}) for i in range(4))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    return ImageFolder(str(tmp_path))


def drawn(*colors):
    return np.stack([np.full((8, 8, 3), color, np.uint8) for color in colors])


@pytest.mark.parametrize(
    ("colors", "expected"),
    [
        ((COLORS[0], COLORS[1], COLORS[2]), 1.0),
        (((180, 20, 0), (0, 255, 10), (10, 0, 150)), 1.0),
        ((COLORS[1], COLORS[0], COLORS[2]), 1 / 3),
        (((80, 90, 100), (90, 90, 90), (255, 0, 0)), 0.0),
    ],
)
def test_retrieval_is_the_share_of_captions_whose_nearest_picture_is_their_own(colors, expected, source):
    assert caption_retrieval(drawn(*colors), source, 8) == pytest.approx(expected)


def test_an_unreadable_picture_is_nobodys_nearest_and_shifts_no_other(source, tmp_path):
    (tmp_path / "1.png").write_bytes(b"no picture")
    assert caption_retrieval(drawn(*COLORS[:3]), source, 8) == pytest.approx(2 / 3)


def test_prompts_are_the_prompt_or_the_first_captions_in_turn(source):
    assert sample_prompts(SampleConfig(prompt="a cat"), source, 2) == ["a cat", "a cat"]
    assert sample_prompts(SampleConfig(prompt=""), source, 5) == ["color 0", "color 1", "color 2", "color 3", "color 0"]


def test_saved_pictures_are_read_back_as_they_were(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (11, 4, 6, 3), np.uint8)
    save_pictures(pictures, tmp_path / "eval")
    files = sorted((tmp_path / "eval").iterdir())
    assert [f.name for f in files] == [f"{i:02d}.png" for i in range(11)]
    np.testing.assert_array_equal(np.stack([np.asarray(Image.open(f)) for f in files]), pictures)

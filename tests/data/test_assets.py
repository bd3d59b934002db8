from pathlib import Path

import pytest

from sdxl_eqx.data.assets import resolve


def test_the_bundled_pictures_are_found_by_name():
    assert len(list(resolve("asset:emoji").glob("*.png"))) == 64


def test_any_other_string_is_a_path():
    assert resolve("some/folder") == Path("some/folder")


@pytest.mark.parametrize("path", ["asset:emojis", "asset:", "asset:../data"])
def test_an_unknown_asset_is_an_error_that_lists_the_known_ones(path):
    with pytest.raises(ValueError, match=r"names no bundled asset; known are .*asset:emoji"):
        resolve(path)

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.synthetic import Synthetic


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return np.array(image)


@pytest.mark.parametrize("resolution", [1, 5, 6, 7, 64])
def test_a_picture_is_a_square_of_noise(resolution):
    source = Synthetic(2, resolution, seed=0)
    assert isinstance(source, Source)
    data = source.picture(0)
    assert pixels(data).shape == (resolution, resolution, 3)
    assert int.from_bytes(data[2:6], "little") == len(data)


def test_every_byte_is_as_likely_and_rows_and_colours_go_their_own_ways():
    noise = pixels(Synthetic(1, 256, seed=0).picture(0))
    counts = np.bincount(noise.ravel(), minlength=256)
    assert len(counts) == 256
    assert np.abs(counts / counts.mean() - 1).max() < 0.2  # 768 each, 5 deviations
    planes = noise.reshape(-1, 3).T.astype(float)
    assert np.abs(np.corrcoef(planes) - np.eye(3)).max() < 0.02
    assert np.abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.02


def test_a_picture_follows_from_seed_and_index_alone():
    source = Synthetic(3, 8, seed=1)
    backwards = [source.picture(i) for i in (2, 1, 0)][::-1]
    assert backwards == [Synthetic(100, 8, seed=1).picture(i) for i in range(3)]
    assert len({*backwards, *(Synthetic(3, 8, seed=2).picture(i) for i in range(3))}) == 6


def test_the_first_bytes_are_those_of_the_whole_picture():
    source = Synthetic(1, 9, seed=0)
    whole = source.picture(0)
    for limit in (0, 10, 54, 55, 61, 63, len(whole), len(whole) + 1):
        assert source.picture(0, limit) == whole[:limit]


def test_captions_are_one_for_each_picture_and_always_the_same():
    source = Synthetic(3, 8, seed=1)
    captions = [source.captions(i) for i in range(3)]
    assert all(len(each) == 1 and each[0] for each in captions)
    assert len(set(captions)) == 3
    assert captions == [Synthetic(9, 16, seed=2).captions(i) for i in range(3)]


def test_pictures_have_names_and_the_set_a_length():
    source = Synthetic(3, 8, seed=1)
    assert len(source) == 3
    assert source.name(2) == "synthetic picture 2"
    assert repr(source) == "Synthetic(3 pictures of 8 x 8, seed 1)"


def test_a_set_of_a_billion_takes_no_memory():
    tracemalloc.start()
    source = Synthetic(10**9, 8, seed=0)
    source.picture(10**9 - 1)
    used = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert used < 100_000


@pytest.mark.parametrize(("count", "resolution", "name"), [(0, 8, "count"), (-1, 8, "count"), (1, 0, "resolution")])
def test_no_pictures_and_none_with_a_pixel_are_an_error(count, resolution, name):
    with pytest.raises(ValueError, match=f"{name} of synthetic pictures must be at least 1, not {min(count, 0)}"):
        Synthetic(count, resolution, seed=0)

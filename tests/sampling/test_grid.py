import numpy as np

from sdxl_eqx.sampling.grid import grid


def plain(*colors):
    """Pictures of one colour each."""
    return np.stack([np.full((8, 8, 3), color, np.uint8) for color in colors])


def test_pictures_stand_in_rows_from_the_left():
    colors = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90), (1, 2, 3))
    sheet = np.asarray(grid(plain(*colors)))
    assert sheet.shape == (16, 24, 3)
    for (y, x), color in zip([(0, 0), (0, 8), (0, 16), (8, 0), (8, 8)], colors, strict=True):
        assert (sheet[y : y + 8, x : x + 8] == color).all()
    assert (sheet[8:, 16:] == 255).all()
    assert np.asarray(grid(plain(colors[0]))).shape == (8, 8, 3)

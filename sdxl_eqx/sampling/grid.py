"""Many pictures on one sheet."""

import numpy as np
from PIL import Image


def grid(pictures: np.ndarray) -> Image.Image:
    """Pictures `[n, H, W, 3]` side by side, in rows as nearly square as can be."""
    n, h, w, _ = pictures.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = int(np.ceil(n / columns))
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * h, i % columns * w
        sheet[y : y + h, x : x + w] = picture
    return Image.fromarray(sheet)

"""What a ControlNet sees of each sample: a map that is cut as its picture is."""

import numpy as np
from jaxtyping import UInt8

from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import Picture, Size, picture_size, read_picture, scaled_size
from sdxl_eqx.data.sources import Conditioned, Source
from sdxl_eqx.data.transforms import as_of_size, flipped, resize_and_crop


def read_control(
    source: Source, sample: int, size: Size, target: Size, top_left: tuple[int, int], *, flip: bool
) -> UInt8[np.ndarray, "H W 3"]:
    """The crop of a sample's map, in sRGB, that lies over the crop of its picture.

    A map of another size counts as scaled to cover the picture's, its middle over the picture's middle.

    Args:
        source: has the map.
        sample: its index.
        size: of the picture's file, upright.
        target: size of the crop.
        top_left: where it lies in the scaled picture, before it is mirrored.
        flip: whether it is mirrored then.

    Raises:
        BadSample: there is no map, or it cannot be used.
    """
    seen, _ = resize_and_crop(_read_map(source, sample, size, target), target, top_left)
    return flipped(seen) if flip else seen


def _read_map(source: Source, sample: int, size: Size, target: Size) -> Picture:
    """A sample's map as if it were of the picture's size."""
    name = source.name(sample)
    if not isinstance(source, Conditioned):
        raise BadSample(name, f"{type(source).__name__} has nothing for a ControlNet to see")
    data = source.condition(sample)
    try:
        own = picture_size(lambda limit: data if limit < 0 else data[:limit], name)
        # One of another ratio is cropped too, so that more of it must be decoded to cover the same target.
        whole = target if own == size else scaled_size(size, target)
        return as_of_size(read_picture(data, name, target=whole), size)
    except BadSample as bad:
        raise BadSample(name, f"what a ControlNet sees of it: {bad.reason}") from bad

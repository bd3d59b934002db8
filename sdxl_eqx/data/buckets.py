"""Aspect-ratio buckets: the few shapes of batches that lose least of a data set's pictures."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sdxl_eqx.data.pictures import Size

STEP = 64
"""Sides are multiples of so many pixels, as SDXL was trained (Podell et al. 2023, appendix I)."""

MAX_RATIO = 4
"""Of a shape's sides; a picture that is longer is cropped."""

CANDIDATES = 128
"""Shapes that are weighed against each other: those that most pictures would take."""

ROUGH = 16
"""Sizes are told apart by so many pixels when shapes are chosen; it divides `STEP`."""

AT_ONCE = 1 << 20
"""Costs that are computed at once."""

Costs = Float[np.ndarray, "n k"]
"""Of pictures of n sizes in k shapes: what of a picture is lost; infinite where it would have to be enlarged."""


@dataclass(frozen=True)
class Buckets:
    """The shapes of a data set's batches, and which of them each sample takes."""

    shapes: tuple[Size, ...]
    """(height, width) in pixels, the most frequent first."""
    of: Int[np.ndarray, " n"]
    """Each sample's shape; -1 where it cannot be used."""

    def counts(self) -> Int[np.ndarray, " k"]:
        """How many samples take each shape."""
        return np.bincount(self.of[self.of >= 0], minlength=len(self.shapes))

    def describe(self, batch_size: int) -> str:
        """A histogram, a line a shape."""
        counts = self.counts()
        lines = []
        for (h, w), n in zip(self.shapes, counts.tolist(), strict=True):
            batches = (
                f"{n / batch_size:.1f} batches an epoch"
                if n >= batch_size
                else f"a batch in {batch_size / n:.1f} epochs"
            )
            lines.append(f"  {h:5d} x {w:<5d} {'#' * max(1, round(30 * n / counts.max())):30s} {n} pictures, {batches}")
        return "\n".join(lines)


def one_bucket(usable: Bool[np.ndarray, " n"], resolution: int) -> Buckets:
    """The square for all samples that can be used.

    Raises:
        ValueError: none can.
    """
    if not usable.any():
        raise ValueError(f"none of {len(usable)} samples can be used; the log says why")
    return Buckets(((resolution, resolution),), np.where(usable, 0, -1).astype(np.int16))


def choose_buckets(sizes: Int[np.ndarray, "n 2"], resolution: int, *, count: int, upscale: bool) -> Buckets:
    """At most `count` shapes for pictures of these (height, width), chosen greedily by what of them is lost.

    Sides are multiples of 64, areas at most that of the resolution's square. What a picture loses is the share of it
    that is cropped away, and of what is left the share of its detail (by the side, and at most what the resolution has
    room for) that is scaled away. Without `upscale` no picture is enlarged, so that small ones get smaller shapes, and
    those with a side under 64 pixels none. Sizes of (0, 0) are of samples that cannot be used.

    Raises:
        ValueError: no picture can be used.
    """
    usable = (sizes >= (1 if upscale else STEP)).all(axis=1)
    if not usable.any():
        if upscale or not sizes.any():
            raise ValueError(f"none of {len(sizes)} pictures can be read; give files that hold pictures")
        raise ValueError(f"none of {len(sizes)} pictures has sides of {STEP} pixels; add --bucket-upscale")
    # Shapes are chosen for sizes rounded down, so that none is too large for the true ones.
    rough, weights = np.unique(np.maximum(sizes[usable] // ROUGH * ROUGH, 1), axis=0, return_counts=True)
    shapes = _shapes(resolution, only_largest=upscale)
    votes = np.bincount(_cheapest(rough, shapes, resolution, upscale), weights, minlength=len(shapes))
    wanted = np.argsort(-votes, kind="stable")[: min(CANDIDATES, int((votes > 0).sum()))]
    chosen = _choose(rough, weights, shapes[np.sort(wanted)], resolution, count, upscale)
    of = np.full(len(sizes), -1, np.int16)
    of[usable] = _cheapest(sizes[usable], chosen, resolution, upscale)
    # The most frequent first; of equals the smaller.
    taken = np.bincount(of[usable], minlength=len(chosen))
    order = np.lexsort([chosen[:, 1], chosen[:, 0], -taken])
    order = order[taken[order] > 0]
    place = np.full(len(chosen) + 1, -1, np.int16)  # the last one is that of -1
    place[order] = np.arange(len(order))
    return Buckets(tuple((int(h), int(w)) for h, w in chosen[order]), place[of])


def _shapes(resolution: int, *, only_largest: bool) -> Int[np.ndarray, "k 2"]:
    """All shapes that may be, or of each height the widest and of each width the highest."""
    sides = range(STEP, resolution * MAX_RATIO + 1, STEP)
    shapes = {
        (h, w) for h in sides for w in range(STEP, resolution**2 // h + 1, STEP) if max(h, w) <= MAX_RATIO * min(h, w)
    }
    if only_largest:
        shapes = {(h, w) for h, w in shapes if (h, w + STEP) not in shapes and (h + STEP, w) not in shapes}
    return np.array(sorted(shapes))


def _costs(sizes: Int[np.ndarray, "n 2"], shapes: Int[np.ndarray, "k 2"], resolution: int, upscale: bool) -> Costs:
    h, w = (side[:, None].astype(float) for side in sizes.T)
    H, W = (side[None].astype(float) for side in shapes.T)
    scale = np.maximum(H / h, W / w)
    kept = H * W / (h * w * scale**2)
    finest = np.minimum(1, resolution / np.sqrt(h * w * kept))  # of what is left, at the resolution's area
    costs = (1 - kept) + (1 - np.minimum(1, scale / finest))
    return costs if upscale else np.where(scale <= 1, costs, np.inf)


def _cheapest(
    sizes: Int[np.ndarray, "n 2"], shapes: Int[np.ndarray, "k 2"], resolution: int, upscale: bool
) -> Int[np.ndarray, " n"]:
    """The shape in which a picture of each size loses least."""
    parts = [_costs(sizes[part], shapes, resolution, upscale).argmin(axis=1) for part in _parts(sizes, shapes)]
    return np.concatenate(parts)


def _parts(sizes: Int[np.ndarray, "n 2"], shapes: Int[np.ndarray, "k 2"]) -> list[slice]:
    """Slices of the sizes whose costs fit into memory at once."""
    step = max(1, AT_ONCE // len(shapes))
    return [slice(i, i + step) for i in range(0, len(sizes), step)]


def _choose(
    sizes: Int[np.ndarray, "n 2"],
    weights: Int[np.ndarray, " n"],
    shapes: Int[np.ndarray, "k 2"],
    resolution: int,
    count: int,
    upscale: bool,
) -> Int[np.ndarray, "c 2"]:
    """One shape after the other, each the one that saves most; the last one makes room for all that are left."""
    lost = np.full(len(sizes), 4.0)  # more than any shape loses: a picture must have one
    chosen = np.empty((0, 2), int)
    while len(chosen) < count:
        saved = np.zeros(len(shapes))
        for part in _parts(sizes, shapes):
            costs = _costs(sizes[part], shapes, resolution, upscale)
            saved += (weights[part, None] * np.maximum(lost[part, None] - costs, 0)).sum(axis=0)
        best = shapes[int(saved.argmax())]
        left = lost == 4.0
        is_last = len(chosen) == count - 1 or saved.max() <= 1e-9
        if is_last and not upscale and not (sizes[left] >= best).all():
            best = _under(sizes[left], resolution)  # also where no candidate is small enough for them
        elif saved.max() <= 1e-9:
            break
        chosen = np.vstack([chosen, best])
        lost = np.minimum(lost, _costs_of(sizes, best, resolution, upscale))
    return chosen


def _costs_of(sizes: Int[np.ndarray, "n 2"], shape: Int[np.ndarray, "2"], resolution: int, upscale: bool):
    return _costs(sizes, shape[None], resolution, upscale)[:, 0]


def _under(sizes: Int[np.ndarray, "n 2"], resolution: int) -> Int[np.ndarray, "2"]:
    """The largest shape that none of these pictures is enlarged for."""
    h, w = (sizes.min(axis=0) // STEP * STEP).tolist()
    shapes = _shapes(resolution, only_largest=False)
    inside = shapes[(shapes <= [h, w]).all(axis=1)]
    return inside[np.lexsort([inside[:, 0], inside.prod(axis=1)])[-1]]

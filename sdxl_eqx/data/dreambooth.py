"""Pictures of a subject beside pictures of its class, as DreamBooth trains on them (Ruiz et al. 2023, section 3.3)."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int

from sdxl_eqx.data.sources import Source
from sdxl_eqx.data.sources.files import is_local
from sdxl_eqx.data.sources.joined import Joined, Picked


def beside_class(
    subject: Source, held: Int[np.ndarray, " m"], pictures: Source, class_weight: float
) -> tuple[Source, Int[np.ndarray, " m"], Float32[np.ndarray, " n"]]:
    """(both sets as one source, which of its samples are held out, the weight of each sample's loss).

    The larger set decides the epoch, as in diffusers' `train_dreambooth_lora_sdxl.py`: of it every picture comes once,
    and of the other as many, its pictures again and again. None is left out, and half of all visits are to the class.
    What is held out are pictures of the subject alone; none of them is among those trained on.

    Args:
        subject: pictures of the subject.
        held: which of them are held out.
        pictures: those of the class.
        class_weight: of the loss of these; that of the subject's is 1.
    """
    own = np.setdiff1d(np.arange(len(subject)), held)
    count = max(len(own), len(pictures))
    joined = Joined(
        {
            "instance": Picked(subject, np.resize(own, count)),
            "class": Picked(pictures, np.resize(np.arange(len(pictures)), count)),
            "held out": Picked(subject, held),
        }
    )
    # By turns, so that it is so without shuffling too.
    turns = np.arange(2 * count).reshape(2, count).T.reshape(-1)
    source = Picked(joined, np.concatenate([turns, np.arange(2 * count, len(joined))]))
    weights = np.concatenate([np.tile([1.0, class_weight], count), np.ones(len(held))]).astype(np.float32)
    return source, np.arange(2 * count, len(source)), weights


def check_apart(place: str, subject: str) -> None:
    """Check that the folders of the class and of the subject lie outside each other.

    Raises:
        ValueError: naming both.
    """
    if is_local(place) and is_local(subject) and subject:
        folders = [Path(path).absolute() for path in (place, subject)]
        if any(one.is_relative_to(other) for one, other in (folders, folders[::-1])):
            raise ValueError(
                f"--class-data-dir {place}: must lie outside --train-data-dir {subject}, and that outside it: each is "
                "read with all folders in it."
            )

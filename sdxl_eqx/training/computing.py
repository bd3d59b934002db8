"""How a run computes: what is computed again to save memory, and what is said of it."""

import dataclasses
import logging

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.computing import attention_compute
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.training.memory import BY_RECOMPUTATION, NONE, Encoding, step_bytes

log = logging.getLogger("sdxl_eqx")


def unet_compute(
    config: TrainConfig,
    unet: UNetConfig,
    layout: Layout,
    batch_size: int,
    *,
    side: int,
    memory: int | None = None,
    encoders: Encoding = NONE,
) -> Compute:
    """How the UNet is computed on these devices, for latents of `side` by `side`, beside encoders if they run.

    Each device has `memory` bytes; None is as much as is asked for.

    Raises:
        ValueError: where the attention asked for cannot serve, or the mesh does not divide the heads.
    """
    compute = attention_compute(config, unet, layout)
    remat = config.attention.remat_policy
    if remat == "auto":
        if memory is None:
            return compute
        return _least_remat(config, unet, layout, batch_size, side, memory, compute, encoders)
    return dataclasses.replace(compute, remat=remat)


def _least_remat(
    config: TrainConfig,
    unet: UNetConfig,
    layout: Layout,
    batch_size: int,
    side: int,
    memory: int,
    compute: Compute,
    encoders: Encoding,
) -> Compute:
    """With the policy that computes least again of those that fit the devices, and a line that says which."""
    # Not every activation is shared by tensor.
    each = batch_size / layout.size(layout.batch + layout.axes("activation_length"))
    needed, chosen = 0.0, compute
    for remat in BY_RECOMPUTATION:
        chosen = dataclasses.replace(compute, remat=remat)
        needed = step_bytes(config, unet, layout, each, side, chosen, encoders)
        if needed < memory:
            break
    log.info(
        "remat auto: %s (about %.1f of %.1f GB a device)%s.", chosen.remat, needed / 1e9, memory / 1e9,
        "" if needed < memory else "; it may not fit: lower --per-device-batch-size, or raise --ici-fsdp-parallelism",
    )  # fmt: skip
    return chosen

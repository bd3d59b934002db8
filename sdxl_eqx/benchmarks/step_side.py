"""One side of the training step that is measured, in a process of its own: `python -m ...step_side SIDE JSON`.

It trains on one batch that stays on the device, and says how many seconds a step took and what it needed.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sdxl_eqx.benchmarks.sides import say

WARM = 2
"""Steps that are not counted: the first one compiles, and the second may still set something up."""


def ours(asked: dict[str, Any]) -> None:
    """The step that scripts/train.py runs, from random weights: without clipping or a moving average, as by default.

    It takes norms of gradients, updates and weights, and leaves out steps that are not finite; theirs does not.
    """
    import jax
    import jax.random as jr

    from sdxl_eqx.config import RunConfig, TrainConfig
    from sdxl_eqx.diffusion.schedule import Schedule
    from sdxl_eqx.flags import merge
    from sdxl_eqx.models.unet import UNet
    from sdxl_eqx.parallel.begin import begin_jax, configure_jax
    from sdxl_eqx.parallel.devices import memory
    from sdxl_eqx.training.flops import training_flops
    from sdxl_eqx.training.meter import memory_used, peak_tflops
    from sdxl_eqx.training.networks import Networks, split
    from sdxl_eqx.training.optimizer import make_optimizer, rates
    from sdxl_eqx.training.program import Program
    from sdxl_eqx.training.state import new_state

    begin_jax(RunConfig(skip_jax_distributed_system=True))
    devices = jax.devices()[:1]
    shapes, said = model_of(asked, devices[0].platform)
    values = {
        "activations_dtype": said["dtype"],
        "cache_latents_text_encoder_outputs": True,
        "jax_cache_dir": "none",  # what it takes to compile is measured too
        "per_device_batch_size": float(asked["batch"]),
        "resolution": said["side"],
        "remat_policy": asked["remat_policy"],
    }
    config = merge(TrainConfig(), values)
    configure_jax(config.run, config.model.precision)
    sentences = Sentences()
    program = Program.make(config, shapes, devices, memory(devices))
    optimizer = make_optimizer(config.optim, *rates(config, total_steps=1000, batch_size=program.batch_size))

    def begin(key: Any) -> Any:
        unet_key, state_key = jr.split(key)
        trained, _ = split(Networks(UNet(shapes.unet, key=unet_key), None), config)
        return new_state(trained, optimizer, ema=config.optim.ema_decay > 0, key=state_key)

    with jax.sharding.set_mesh(program.mesh):
        arguments = program.arguments(optimizer)
        where, frozen = jax.tree.map(lambda x: x.sharding, arguments[0]), arguments[1]
        state = jax.block_until_ready(jax.jit(begin, out_shardings=where)(jr.key(0)))
        shapes_of_batch, structure = jax.tree.flatten(arguments[2])
        batch = jax.tree.unflatten(structure, [
            jax.device_put(jr.normal(jr.key(i), x.shape, x.dtype), x.sharding)
            for i, x in enumerate(shapes_of_batch, 1)
        ])  # fmt: skip
        schedule = jax.device_put(Schedule(shapes.schedule), program.layout.whole)
        step: Any = None

        def train(steps: int) -> float:
            nonlocal state, step
            step = step or program.jit(optimizer).lower(*arguments).compile()
            metrics: Any = {}
            for _ in range(steps):
                state, metrics = step(state, frozen, batch, schedule)
            return float(metrics["learning/loss"])  # waits for it

        measured = measure(train, asked["steps"])
    tflop = training_flops(shapes, config, (said["side"], said["side"])) * asked["batch"] / 1e12
    say(
        **measured, **said,
        device=devices[0].device_kind, platform=devices[0].platform, remat_policy=program.compute.remat,
        tflop=tflop, peak_tflops=peak_tflops(devices), unet=shapes.unet.to_json(), sentences=sentences.said,
        memory=memory_used(devices).get("perf/memory_peak_bytes", resident(devices[0].platform)),
    )  # fmt: skip


def theirs(asked: dict[str, Any]) -> None:
    """The UNet and the loss of diffusers' train_text_to_image_sdxl.py on what is encoded already, without clipping."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # as ours
    import diffusers
    import torch
    import torch.nn.functional as F

    lazy: Any = diffusers
    on_gpu = asked["platform"] == "gpu"
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), getattr(torch, asked["dtype"])
    torch.backends.cudnn.benchmark = True  # XLA tries kernels out too
    torch.set_float32_matmul_precision("high")  # TF32, as JAX by default
    torch.manual_seed(0)
    with torch.device(device):
        unet = lazy.UNet2DConditionModel.from_config(asked["unet"]).train()
    unet = unet.to(memory_format=torch.channels_last)
    if asked["checkpointing"]:
        unet.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, weight_decay=1e-2, fused=on_gpu)
    scheduler = lazy.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    config, b = asked["unet"], asked["batch"]
    side = asked["side"] // asked["downscale"]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]

    def draw(*shape: int) -> Any:
        return torch.randn(b, *shape, device=device)

    x0 = draw(config["in_channels"], side, side).contiguous(memory_format=torch.channels_last)
    context, added = draw(77, config["cross_attention_dim"]), {"text_embeds": draw(pooled), "time_ids": draw(6).abs()}
    predict = torch.compile(unet) if asked["compile"] else unet
    low = partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext

    def train(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            eps = torch.randn_like(x0)
            t = torch.randint(0, 1000, (b,), device=device)
            with low():
                found = predict(scheduler.add_noise(x0, eps, t), t, context, added_cond_kwargs=added).sample
            loss = F.mse_loss(found.float(), eps)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits for it

    before = [x.detach().clone() for x in unet.parameters() if x.ndim == 1]
    measured = measure(train, asked["steps"])
    after = [x for x in unet.parameters() if x.ndim == 1]
    if all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
        raise ValueError("no weight has changed: this is no training.")
    say(
        **measured,
        parameters=sum(x.numel() for x in unet.parameters()),
        memory=torch.cuda.max_memory_allocated() if on_gpu else resident("cpu"),
        cudnn=torch.backends.cudnn.version() if on_gpu else None,
    )


def model_of(asked: dict[str, Any], platform: str) -> tuple[Any, dict[str, Any]]:
    """The shapes of the model that is asked for, and what `auto` stands for on a platform."""
    from sdxl_eqx.benchmarks.random_models import HALF, TINY
    from sdxl_eqx.config import DiffusionSchedulerConfig
    from sdxl_eqx.diffusion.schedule import ScheduleConfig
    from sdxl_eqx.loading import ModelShapes

    here = platform == "cpu"
    name = asked["model"] if asked["model"] != "auto" else "tiny" if here else "sdxl"
    dtype = asked["dtype"] if asked["dtype"] != "auto" else "float32" if here else "bfloat16"
    shapes = ModelShapes.sdxl_base(DiffusionSchedulerConfig())
    if name != "sdxl":
        one = {"tiny": TINY, "300m": HALF}[name]
        shapes = ModelShapes(one.unet, one.vae, one.text, one.text_2, ScheduleConfig())
    side = asked["side"] or shapes.unet.sample_size * shapes.vae.downscale
    return shapes, {"model": name, "dtype": dtype, "side": side, "downscale": shapes.vae.downscale}


def measure(train: Callable[[int], float], steps: int) -> dict[str, float]:
    """Seconds of a step, those until the first one was done, and the last loss.

    Raises:
        ValueError: where the loss is no number.
    """
    began = time.perf_counter()
    train(1)
    first = time.perf_counter() - began
    train(WARM - 1)
    began = time.perf_counter()
    loss = train(steps)
    seconds = (time.perf_counter() - began) / steps
    if not 0 < loss < 100:
        raise ValueError(f"the loss is {loss}: this is no training.")
    return {"seconds": seconds, "first": first, "loss": loss}


def resident(platform: str) -> int | None:
    """Bytes that this process had in memory at most, where the device is a CPU and the system says."""
    if platform != "cpu" or sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Sentences(logging.Handler):
    """Keeps what is said of attention and memory."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []
        log = logging.getLogger("sdxl_eqx")
        log.setLevel(logging.INFO)
        log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.said.append(record.getMessage())


SIDES = {"ours": ours, "theirs": theirs}

if __name__ == "__main__":
    SIDES[sys.argv[1]](json.loads(sys.argv[2]))

"""A hundred training steps beside PyTorch: diffusers' UNet, torch's AdamW and the loss of diffusers' SDXL script.

Both are given the same weights, latents, conditioning, noise and timesteps: those that our own step draws.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import parity_models as tiny
import parity_torch as theirs
import pytest

from sdxl_eqx.config import LossConfig, OptimConfig, TrainConfig
from sdxl_eqx.data.batch import LatentBatch
from sdxl_eqx.diffusion.loss import Draws
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.training.networks import Networks, split
from sdxl_eqx.training.optimizer import make_optimizer
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.step import StepConfig, train_step

pytestmark = pytest.mark.parity

STEPS, RATE, GRID, BATCH = 100, 1e-4, (8, 6), 4

CASES = {
    "plain": (LossConfig(), ScheduleConfig()),
    "min-SNR 5": (LossConfig(snr_gamma=5.0), ScheduleConfig()),
    "v-prediction with zero terminal SNR": (
        LossConfig(),
        ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ),
}


def batch() -> tuple[dict[str, np.ndarray], LatentBatch]:
    """Four samples, for both."""
    parts = [tiny.unet_inputs(tiny.UNET, GRID, seed=seed) for seed in (0, 1)]
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # A posterior without spread: its mean is what both train on.
    logvar = np.full_like(inputs["x"], -80.0)
    return inputs, LatentBatch(inputs["x"], logvar, inputs["context"], inputs["pooled"], inputs["time_ids"])


def drawn(state: TrainState, schedule: Schedule, loss: LossConfig) -> Draws:
    """What the step draws from a state, as `train_step` does."""
    _, draw_key = jr.split(jr.fold_in(state.key, state.step))
    return Draws.draw(schedule, loss, None, (BATCH, *GRID, 4), key=draw_key)


def their_step(unet: Any, optimizer: Any, ddpm: Any, inputs: Any, draws: Draws, gamma: float) -> float:
    """One step of `train_text_to_image_sdxl.py`."""
    from diffusers.training_utils import compute_snr

    torch = theirs.torch
    x0, eps = theirs.to_torch(inputs["x"]), theirs.to_torch(draws.eps)
    t = torch.from_numpy(np.array(draws.t)).long()
    prediction = theirs.call_unet(unet, ddpm.add_noise(x0, eps, t), t, inputs)
    is_epsilon = ddpm.config.prediction_type == "epsilon"
    target = eps if is_epsilon else ddpm.get_velocity(x0, eps, t)
    losses = torch.nn.functional.mse_loss(prediction.float(), target.float(), reduction="none").mean((1, 2, 3))
    if gamma > 0:
        snr = compute_snr(ddpm, t)
        weights = torch.stack([snr, gamma * torch.ones_like(t)], dim=1).min(dim=1)[0]
        losses = losses * (weights / snr if is_epsilon else weights / (snr + 1))
    loss = losses.mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "plain" else [pytest.mark.slow]) for case in CASES]
)
def test_a_hundred_steps_are_those_of_pytorch(case: str):
    loss_config, schedule_config = CASES[case]
    inputs, given = batch()
    schedule = Schedule(schedule_config)
    optim = OptimConfig(learning_rate=RATE)
    optimizer = make_optimizer(optim, optax.constant_schedule(RATE))
    config = StepConfig(1.0, jnp.dtype(jnp.float32), Compute(), Compute(), 0.0, 1, loss=loss_config)
    step = jax.jit(partial(train_step, config=config, optimizer=optimizer))
    trained, frozen = split(Networks(tiny.filled(UNet, tiny.UNET), None), TrainConfig())
    state = new_state(trained, optimizer, ema=False, key=jr.key(0))
    begin = tiny.file_tensors(state.trained.unet)

    unet = theirs.their_unet(tiny.UNET).train()
    decayed = [p for p in unet.parameters() if p.ndim >= 2]
    others = [p for p in unet.parameters() if p.ndim < 2]
    their_optimizer = theirs.torch.optim.AdamW(
        [{"params": decayed, "weight_decay": optim.adam_weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=RATE, betas=(optim.adam_b1, optim.adam_b2), eps=optim.adam_eps,
    )  # fmt: skip
    changes = {k: v for k, v in dataclasses.asdict(schedule_config).items() if v != getattr(ScheduleConfig(), k)}
    ddpm = theirs.scheduler(theirs.DDPMScheduler, **changes)

    ours, wanted, unweighted = [], [], []
    for _ in range(STEPS):
        draws = drawn(state, schedule, loss_config)
        state, metrics = step(state, frozen, given, schedule)
        ours.append(float(metrics["learning/loss"]))
        unweighted.append(float(metrics["decile_sums"].sum()) / BATCH)
        wanted.append(their_step(unet, their_optimizer, ddpm, inputs, draws, loss_config.snr_gamma))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4)
    assert np.mean(unweighted[-20:]) < 0.8 * np.mean(unweighted[:5]), "the loss does not fall"

    found, theirs_now = tiny.file_tensors(state.trained.unet), unet.state_dict()
    assert tiny.cosine(begin, found, {key: theirs_now[key].detach().numpy() for key in begin}) >= 0.999

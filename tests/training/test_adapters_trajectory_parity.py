"""Fifty training steps of what is not the whole UNet, beside PyTorch: LoRA of PEFT, text encoders of transformers, and
diffusers' ControlNet, each with torch's AdamW and the loss of diffusers' SDXL scripts.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

from sdxl_eqx.config import (
    ControlNetTrainingConfig,
    LoraTrainingConfig,
    LossConfig,
    OptimConfig,
    TextEncoderConfig,
    TrainConfig,
)
from sdxl_eqx.data.batch import LatentBatch, LatentTextBatch
from sdxl_eqx.diffusion.loss import Draws
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.controlnet import ControlNet
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.training.networks import Networks, split, with_changes
from sdxl_eqx.training.optimizer import make_optimizer
from sdxl_eqx.training.state import TrainState, new_state
from sdxl_eqx.training.step import StepConfig, train_step
from sdxl_eqx.training.targets import lora_shape
from sdxl_eqx.weights.adapters import parts_of, to_lora

pytestmark = pytest.mark.parity

torch = theirs.torch

STEPS, GRID, BATCH = 50, (8, 6), 4
RATE, TEXT_RATE, LORA_RATE = 1e-4, 5e-5, 1e-3


def inputs() -> dict[str, np.ndarray]:
    """Four samples."""
    parts = [tiny.unet_inputs(tiny.UNET, GRID, seed=seed) for seed in (0, 1)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def ours(
    config: TrainConfig, networks: Networks, batch: Any, rate: float
) -> tuple[TrainState, list[Draws], list[float], Networks]:
    """(the last state, what each step drew, its loss, what trained before the first one)."""
    schedule = Schedule(ScheduleConfig())
    text_rate = optax.constant_schedule(TEXT_RATE) if config.text.train_text_encoder else None
    optimizer = make_optimizer(OptimConfig(), optax.constant_schedule(rate), text_rate)
    plain = Compute()
    of = StepConfig(1.0, jnp.dtype(jnp.float32), plain, plain, 0.0, 1, trains_text=config.text.train_text_encoder)
    step = jax.jit(partial(train_step, config=of, optimizer=optimizer))
    begin, frozen = split(networks, config)
    state = new_state(begin, optimizer, ema=False, key=jr.key(0))
    drawn, losses = [], []
    for _ in range(STEPS):
        _, draw_key = jr.split(jr.fold_in(state.key, state.step))
        drawn.append(Draws.draw(schedule, LossConfig(), None, (BATCH, *GRID, 4), key=draw_key))
        state, metrics = step(state, frozen, batch, schedule)
        losses.append(float(metrics["learning/loss"]))
    return state, drawn, losses, begin


def their_losses(
    drawn: list[Draws], predict: Callable[[Any, Any], Any], groups: list[tuple[list[Any], float]], x0: np.ndarray
) -> list[float]:
    """The losses of as many steps of theirs; `groups` are of parameters and their learning rate."""
    optim, ddpm = OptimConfig(), theirs.scheduler(theirs.DDPMScheduler)
    parameters = [
        {"params": [p for p in group if (p.ndim >= 2) == is_matrix], "weight_decay": decay, "lr": rate}
        for group, rate in groups
        for is_matrix, decay in ((True, optim.adam_weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(parameters, betas=(optim.adam_b1, optim.adam_b2), eps=optim.adam_eps)
    losses = []
    for draws in drawn:
        eps, t = theirs.to_torch(draws.eps), torch.from_numpy(np.array(draws.t)).long()
        loss = torch.nn.functional.mse_loss(predict(ddpm.add_noise(theirs.to_torch(x0), eps, t), t), eps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@dataclass(frozen=True)
class LoraCase:
    """A LoRA as both sides are told."""

    config: LoraTrainingConfig
    targets: list[str]


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
LORAS = {
    "plain": LoraCase(LoraTrainingConfig(lora_rank=4, lora_alpha=8.0), ATTENTION),
    "DoRA, with convolutions and rank stabilization": LoraCase(
        LoraTrainingConfig(
            lora_rank=4, use_dora=True, use_rslora=True, lora_targets=("attention", "feed_forward", "convolution")
        ),
        [*ATTENTION, "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"],
    ),
}


def tensors_of(trained: Networks, config: LoraTrainingConfig) -> dict[str, np.ndarray]:
    """The changes under PEFT's names."""
    found = {}
    for module, layer in to_lora(parts_of(trained.unet, None), lora_shape(config), {}).layers.items():
        path = module.removeprefix("unet.")
        found[f"{path}.lora_A.default.weight"] = layer.down.read()
        found[f"{path}.lora_B.default.weight"] = layer.up.read()
        if layer.magnitude is not None:
            found[f"{path}.lora_magnitude_vector.default.weight"] = layer.magnitude.read()
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "plain" else [pytest.mark.slow]) for case in LORAS]
)
def test_a_lora_trains_as_pefts(case: str):
    peft = pytest.importorskip("peft")
    lora, arrays = LORAS[case].config, inputs()
    config = TrainConfig(lora=lora)
    networks = with_changes(Networks(tiny.filled(UNet, tiny.UNET), None), config, key=jr.key(1))
    logvar = np.full_like(arrays["x"], -80.0)  # a posterior without spread
    batch = LatentBatch(arrays["x"], logvar, arrays["context"], arrays["pooled"], arrays["time_ids"])
    state, drawn, losses, begin = ours(config, networks, batch, LORA_RATE)

    unet = theirs.their_unet(tiny.UNET).requires_grad_(False).train()
    with theirs.their_warnings_are_theirs():
        unet.add_adapter(
            peft.LoraConfig(
                r=lora.lora_rank, lora_alpha=lora.lora_alpha or lora.lora_rank, target_modules=LORAS[case].targets,
                use_dora=lora.use_dora, use_rslora=lora.use_rslora,
            )
        )  # fmt: skip
    start = tensors_of(begin, lora)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained.keys() == start.keys()
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(torch.tensor(start[name]).reshape(p.shape))
    predict = partial(theirs.call_unet, unet, inputs=arrays)
    wanted = their_losses(drawn, predict, [(list(trained.values()), LORA_RATE)], arrays["x"])
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    assert losses[-1] != losses[0]
    now = {name: p.detach().numpy().reshape(start[name].shape) for name, p in trained.items()}
    assert tiny.cosine(start, tensors_of(state.trained, lora), now) >= 0.999


@pytest.mark.slow
def test_text_encoders_train_beside_the_unet_as_those_of_transformers():
    arrays, (ids, ids_2) = inputs(), tiny.prompt_ids()
    config = TrainConfig(text=TextEncoderConfig(train_text_encoder=True))
    encoders = Encoders(
        tiny.filled(CLIPText, tiny.TEXT), tiny.filled(CLIPText, tiny.TEXT_2), tiny.filled(VAE, tiny.VAE_CONFIG)
    )
    networks = Networks(tiny.filled(UNet, tiny.UNET), encoders)
    batch = LatentTextBatch(
        arrays["x"], np.full_like(arrays["x"], -80.0), ids.astype(np.int32), ids_2.astype(np.int32), arrays["time_ids"]
    )
    state, drawn, losses, begin = ours(config, networks, batch, RATE)

    unet = theirs.their_unet(tiny.UNET).train()
    first, second = (theirs.their_text(one).train() for one in (tiny.TEXT, tiny.TEXT_2))

    def predict(x: Any, t: Any) -> Any:
        with theirs.their_warnings_are_theirs():
            one = first(torch.from_numpy(ids).long(), output_hidden_states=True)
            two = second(torch.from_numpy(ids_2).long(), output_hidden_states=True)
            context = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
            added = {"text_embeds": two.text_embeds, "time_ids": theirs.to_torch(arrays["time_ids"])}
            return unet(x, t, context, added_cond_kwargs=added).sample

    text = [*first.parameters(), *second.parameters()]
    groups = [(list(unet.parameters()), RATE), (text, TEXT_RATE)]
    wanted = their_losses(drawn, predict, groups, arrays["x"])
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    for name, module in (("text_encoder", first), ("text_encoder_2", second)):
        start, found = (tiny.file_tensors(getattr(x.encoders, name)) for x in (begin, state.trained))
        # Of the first encoder SDXL uses neither the last layer nor what follows: torch's AdamW leaves these alone.
        now = {full(key, start): p.detach().numpy() for key, p in module.named_parameters() if not is_idle(name, key)}
        assert tiny.cosine({key: start[key] for key in now}, found, now) >= 0.999
        assert all(np.abs(found[key] - start[key]).max() < 1e-4 for key in start.keys() - now.keys())


def full(key: str, start: dict[str, Any]) -> str:
    """A key with `text_model.` before it where this version of transformers leaves it out."""
    return key if key in start else f"text_model.{key}"


def is_idle(name: str, key: str) -> bool:
    """Whether SDXL makes nothing of that parameter."""
    return name == "text_encoder" and (f"layers.{tiny.TEXT.num_hidden_layers - 1}." in key or "final_layer" in key)


@pytest.mark.slow
def test_a_controlnet_trains_as_diffusers():
    arrays = inputs()
    config = TrainConfig(controlnet=ControlNetTrainingConfig(train_controlnet=True))
    net = tiny.filled(ControlNet, tiny.CONTROLNET)
    networks = Networks(tiny.filled(UNet, tiny.UNET), None, net)
    image = np.concatenate([tiny.control_image(tiny.CONTROLNET, GRID, seed=seed) for seed in (0, 1)])
    pixels = np.round(image * 255).astype(np.uint8)
    logvar = np.full_like(arrays["x"], -80.0)
    batch = LatentBatch(arrays["x"], logvar, arrays["context"], arrays["pooled"], arrays["time_ids"], control=pixels)
    state, drawn, losses, begin = ours(config, networks, batch, RATE)

    unet = theirs.their_unet(tiny.UNET).requires_grad_(False)
    module = theirs.their_controlnet(tiny.CONTROLNET).train()
    context, added = theirs.to_torch(arrays["context"]), theirs.added_conditions(arrays)

    def predict(x: Any, t: Any) -> Any:
        with theirs.their_warnings_are_theirs():
            down, mid = module(
                x, t, encoder_hidden_states=context, controlnet_cond=theirs.to_torch(pixels.astype(np.float32) / 255),
                added_cond_kwargs=added, return_dict=False,
            )  # fmt: skip
        return theirs.call_unet(
            unet, x, t, arrays, down_block_additional_residuals=down, mid_block_additional_residual=mid
        )

    wanted = their_losses(drawn, predict, [(list(module.parameters()), RATE)], arrays["x"])
    np.testing.assert_allclose(losses, wanted, rtol=1e-4)
    start, found = tiny.file_tensors(begin.controlnet), tiny.file_tensors(state.trained.controlnet)
    now = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    assert tiny.cosine(start, found, {key: now[key] for key in start}) >= 0.999
    assert all(leaf is None for leaf in jax.tree.leaves(state.trained.unet, is_leaf=lambda x: x is None))

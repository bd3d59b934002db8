"""Rows of the model, of attention, optimizer, loss and schedule."""

import dataclasses
from functools import partial
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flag_row import SHAPES, Row, Rows, caught, program, seen, stand_in

from sdxl_eqx.config import TrainConfig
from sdxl_eqx.diffusion.loss import Draws, training_loss
from sdxl_eqx.diffusion.schedule import Schedule, ScheduleConfig
from sdxl_eqx.diffusion.timesteps import timestep_weights
from sdxl_eqx.kernels import choose as kernels
from sdxl_eqx.kernels.splash import splash_blocks
from sdxl_eqx.loading import ModelParts, ModelShapes
from sdxl_eqx.models.sdxl import Conditioning
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.parallel.specs import Layout
from sdxl_eqx.sampling.schedulers.scheduler import Scheduler
from sdxl_eqx.training.meter import Meter, RunError
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer

# The model


def opened(config: TrainConfig) -> Any:
    """The model that is asked for, and which of its parts."""
    read = partial(ModelParts.read, config.model, config.diffusion_scheduler_config, token="")
    return seen("sdxl_eqx.loading.open_model", read)


def source(field: str) -> Any:
    """One field of where the model is read from."""
    return lambda config: getattr(opened(config).given[0], field)


def other_unet(config: TrainConfig) -> str:
    """The UNet that is put in, or ''."""
    read = partial(ModelParts.read, config.model, config.diffusion_scheduler_config, token="")
    whole = Mock(configs={"vae": {}})
    found = caught(
        "sdxl_eqx.loading._with_unet", read, loading__open_model=lambda *_, **__: whole,
        loading___Configs=Mock(side_effect=RuntimeError),
    ) if config.model.unet_checkpoint else None  # fmt: skip
    return found.given[1].name if found else ""


def new_encoders(config: TrainConfig) -> str:
    """What happens where a model has no text encoders: its tensors are asked for, or new ones laid out."""
    model, layout = stand_in(ModelParts, model=Mock(parts={}), text=SHAPES.text), stand_in(Layout)
    layout.shardings.side_effect = InterruptedError("new")
    model.tensors.side_effect = InterruptedError("of the model")
    with pytest.raises(InterruptedError) as raised:
        ModelParts.encoders(model, config.model, layout, key=jr.key(0))
    return str(raised.value)


def groups(config: TrainConfig) -> int:
    """Of the UNet's GroupNorms, in the bundled tiny model."""
    model = dataclasses.replace(config.model, pretrained_model_name_or_path="asset:tiny-sdxl")
    return ModelParts.read(model, config.diffusion_scheduler_config, token="", with_weights=False).unet.norm_num_groups


def stored_dtype(config: TrainConfig) -> str:
    """Of the UNet that training begins with."""
    parts = stand_in(ModelParts)
    parts.stored_unet.return_value = object.__new__(Silent)
    ModelParts.new_unet(parts, config.model, stand_in(Layout), key=jr.key(0))
    return str(parts.stored_unet.call_args.kwargs["dtype"])


def jax_settings(config: TrainConfig) -> dict[str, Any]:
    """What JAX is set to, on a machine with one CPU."""
    from sdxl_eqx.parallel import begin

    told: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin.jax.config, "update", told.__setitem__)
        patch.setattr(begin.jax, "device_count", lambda: 1)
        begin.configure_jax(config.run, config.model.precision)
    return told


MODEL: Rows = {
    "pretrained_model_name_or_path": Row("a/b", source("name"), "stabilityai/stable-diffusion-xl-base-1.0", "a/b"),
    "revision": Row("other", source("revision"), "main", "other"),
    "variant": Row("fp16", source("variant"), "", "fp16"),
    "from_pt": Row(False, source("from_pt"), True, False),
    "unet_checkpoint": Row("c/d", other_unet, "", "c/d"),
    "train_new_unet": Row(True, lambda c: "unet" in opened(c).named["parts"], True, False),
    "norm_num_groups": Row(8, groups, 16, 8, {"train_new_unet": True}),
    "new_text_encoders": Row(True, new_encoders, "of the model", "new"),
    "weights_dtype": Row("bfloat16", stored_dtype, "float32", "bfloat16"),
    "activations_dtype": Row("float32", lambda c: str(program(c).dtype), "bfloat16", "float32"),
    "precision": Row("HIGHEST", lambda c: jax_settings(c)["jax_default_matmul_precision"], None, "highest"),
}

# Attention


def compute(config: TrainConfig, devices: int = 1) -> Any:
    """How the UNet is computed, as if its heads were as wide as SDXL's."""

    def wide(*args: Any, **named: Any) -> Any:
        return kernels.choose(*args, **{**named, "head_width": 64})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_eqx.parallel.computing.choose", wide)
        return program(config, devices).compute


def attention(config: TrainConfig) -> str:
    """What computes it."""
    attend = compute(config).attend
    return getattr(attend, "__name__", type(attend).__name__)


def block(field: str) -> Any:
    """A block of the kernel, at SDXL's longest sequence."""
    return lambda config: getattr(splash_blocks(compute(config).attend.block_sizes, 4096, 4096, 1024), field)


FLASH = {"attention": "flash"}
ATTENTION: Rows = {
    "attention": Row("flash", attention, "dot_product", "Flash"),
    "flash_min_seq_length": Row(256, lambda c: getattr(compute(c).attend, "length", 0), 0, 256, FLASH),
    "split_head_dim": Row(False, attention, "dot_product", "Folded"),
    "attention_sharding_uniform": Row(
        False, lambda c: compute(c, 2).attend.uniform, True, False,
        {"ici_context_parallelism": 2, "activations_dtype": "float32"},
    ),
    "mask_padding_tokens": Row(False, lambda c: compute(c).attend.mask_padding, True, False, FLASH),
    "remat_policy": Row("full", lambda c: compute(c).remat, "none", "full"),
    "scan_unroll": Row(4, lambda c: compute(c).scan_unroll, 1, 4),
    **{
        f"flash_block_sizes.{name}": Row(512, block(name), 1024, 512, FLASH)
        for name in (
            "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute",
            "block_q_dq", "block_kv_dq",
        )
    },
    "flash_block_sizes.use_fused_bwd_kernel": Row(True, block("use_fused_bwd_kernel"), False, True, FLASH),
}  # fmt: skip

# The optimizer


def rate(*steps: int) -> Any:
    """The learning rate after steps of 100, with 8 samples an update."""

    def observe(config: TrainConfig) -> Any:
        schedule = learning_rate(config.optim, total_steps=100, batch_size=8)
        return pytest.approx([float(np.asarray(schedule(n))) for n in steps], rel=1e-5)

    return observe


def updates(config: TrainConfig) -> Any:
    """The second update of a matrix and a bias, both 2, after gradients of 3 and -1, at a rate of 0.1."""
    optimizer = make_optimizer(config.optim, optax.constant_schedule(0.1))
    params = {"bias": jnp.full(2, 2.0), "weight": jnp.full((2, 2), 2.0)}
    state = optimizer.init(params)
    found: Any = params
    for grad in (3.0, -1.0):
        found, state = optimizer.update(jax.tree.map(lambda x, g=grad: jnp.full_like(x, g), params), state, params)
    return pytest.approx([float(found["weight"][0, 0]), float(found["bias"][0])], rel=1e-4)


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, decay: float = 0.01, on_bias: bool = False) -> Any:
    """The same by the paper's algorithm 2."""
    m, v, step = 0.0, 0.0, 0.0
    for n, g in enumerate((3.0, -1.0), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        step = m / (1 - b1**n) / (np.sqrt(v / (1 - b2**n)) + eps)
    return [-0.1 * (step + decay * 2), -0.1 * (step + decay * 2 * on_bias)]


def moments(config: TrainConfig) -> Any:
    """What gradients of (3, 4) add to the first moment, over 0.1, and of which dtype that is."""
    optimizer = make_optimizer(config.optim, optax.constant_schedule(0.1))
    params = {"weight": jnp.zeros((1, 2))}
    _, state = optimizer.update({"weight": jnp.asarray([[3.0, 4.0]])}, optimizer.init(params), params)
    mu: Any = optax.tree_utils.tree_get(state, "mu")
    return mu["weight"]


def clipped(config: TrainConfig) -> Any:
    """Gradients of (3, 4) as the optimizer gets them."""
    return pytest.approx([float(x) * 10 for x in moments(config)[0]], rel=1e-5)


def steps(config: TrainConfig) -> int:
    """Updates of a run on 100 samples in batches of 2."""
    from sdxl_eqx.training.inputs import Inputs
    from sdxl_eqx.training.program import Program
    from sdxl_eqx.training.setup import _Plan

    with pytest.MonkeyPatch.context() as patch:
        inputs = stand_in(Inputs, trained_on=100, parts=SHAPES)
        patch.setattr("sdxl_eqx.training.setup.read_data_and_model", lambda _: inputs)
        patch.setattr("sdxl_eqx.training.setup.choose_hardware", lambda _: jax.devices()[:1])
        patch.setattr("sdxl_eqx.training.setup.Program", Mock(make=lambda *_: stand_in(Program, batch_size=2)))
        return _Plan.make(config).total_steps


def forgiven(config: TrainConfig) -> int:
    """How many steps in a row may be not finite."""
    run = Mock(
        config=config, batch_size=2, total_steps=20, mesh=Mock(local_devices=jax.devices()[:1]), rate=lambda n: 0.1
    )
    meter = object.__new__(Meter)
    meter.__dict__.update(
        run=run, writer=Mock(), watch=Mock(), bad=Mock(count=0), timings=Mock(), skipped=0, in_a_row=0, clock=0.0,
        began=None, first=0, waited=0.0, tflop={(64, 64): 1.0}, devices=jax.devices()[:1], peak=None, pending=None,
    )  # fmt: skip
    values = {"learning/loss": np.nan, "learning/grad_norm": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdxl_eqx.training.meter.last_good", lambda _: "")
        for n in range(1, 20):
            meter.pending = (n, values | {k: np.zeros(10) for k in ("decile_sums", "decile_counts")}, (64, 64), 0.0)
            try:
                meter.flush()
            except RunError:
                return n - 1
    return 20


DECAY = {"adam_weight_decay": 0.5}
LINEAR = {"lr_schedule": "linear", "learning_rate": 1.0}
OPTIM: Rows = {
    "learning_rate": Row(1e-3, rate(0, 99), [4e-7, 4e-7], [1e-3, 1e-3]),
    "scale_lr": Row(True, rate(0), [1e-3], [8e-3], {"learning_rate": 1e-3}),
    "lr_schedule": Row("linear", rate(0, 50), [1.0, 1.0], [1.0, 0.5], {"learning_rate": 1.0}),
    "lr_num_cycles": Row(2, rate(25, 50), [0.5 + np.sqrt(0.125), 0.5], [0.5, 1.0],
                         {"lr_schedule": "cosine_with_restarts", "learning_rate": 1.0}),
    "lr_step_rules": Row("1:10,0.1", rate(5, 20), [1.0, 1.0], [1.0, 0.1], {"learning_rate": 1.0},
                         {"lr_schedule": "piecewise"}),
    "warmup_steps_fraction": Row(0.2, rate(0, 10, 20), [1.0, 1.0, 1.0], [0.0, 0.5, 1.0], {"learning_rate": 1.0}),
    "learning_rate_schedule_steps": Row(50, rate(25, 50), [0.75, 0.5], [0.5, 0.0], LINEAR),
    "max_train_steps": Row(7, steps, 200, 7),
    "num_train_epochs": Row(3, steps, 200, 150),
    "per_device_batch_size": Row(4, lambda c: program(c, 2).batch_size, 4, 8),
    "gradient_accumulation_steps": Row(
        4, lambda c: (program(c).batch_size, program(c).step_config.parts), (2, 1), (8, 4)
    ),
    "optimizer": Row("lion", updates, adamw(), [0.1 * (1 - 0.02), 0.1]),
    "adam_b1": Row(0.5, updates, adamw(), adamw(b1=0.5)),
    "adam_b2": Row(0.9, updates, adamw(), adamw(b2=0.9)),
    "adam_eps": Row(1.0, updates, adamw(), adamw(eps=1.0)),
    "adam_weight_decay": Row(0.5, updates, adamw(), adamw(decay=0.5)),
    "decay_all": Row(True, updates, adamw(decay=0.5), adamw(decay=0.5, on_bias=True), DECAY),
    "moments_dtype": Row("bfloat16", lambda c: str(moments(c).dtype), "float32", "bfloat16"),
    "opt_enable_grad_clipping": Row(True, clipped, [3, 4], [1, 1]),
    "max_grad_value": Row(3.5, clipped, [1, 1], [3, 3.5], {"opt_enable_grad_clipping": True}),
    "opt_enable_grad_global_norm_clipping": Row(True, clipped, [3, 4], [0.6, 0.8]),
    "max_grad_norm": Row(0.5, clipped, [0.6, 0.8], [0.3, 0.4], {"opt_enable_grad_global_norm_clipping": True}),
    "ema_decay": Row(0.9, lambda c: program(c).step_config.ema_decay, 0.0, 0.9),
    "ema_every": Row(3, lambda c: program(c).step_config.ema_every, 1, 3, {"ema_decay": 0.9}),
    "max_nonfinite_steps": Row(3, forgiven, 10, 3),
}  # fmt: skip

# The loss

TIMES = (100, 900)
ALPHA_BAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[list(TIMES)]
SNR = ALPHA_BAR / (1 - ALPHA_BAR)


class Silent(UNet):
    """A UNet that predicts nothing."""

    def __init__(self) -> None:
        raise NotImplementedError("object.__new__ makes it")

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return jnp.zeros_like(x)


def loss(config: TrainConfig) -> Any:
    """Of samples at TIMES, whose noise is 2 everywhere and whose prediction is 0."""
    eps, b = jnp.full((2, 2, 2, 4), 2.0), len(TIMES)
    cond = Conditioning(jnp.zeros((b, 77, 32)), jnp.zeros((b, 16)), jnp.zeros((b, 6)))
    draws = Draws(eps, eps, jnp.asarray(TIMES))
    unet, schedule = object.__new__(Silent), Schedule(ScheduleConfig())
    found = training_loss(
        unet, schedule, config.loss, jnp.zeros_like(eps), draws, cond, dtype=jnp.dtype("float32"), compute=Compute()
    )
    return pytest.approx(float(found[0]), rel=1e-4)


def huber(c: Any) -> Any:
    """kohya's loss of a difference of 2, for the place `c` of each time."""
    c = np.asarray(c)
    return float(np.mean(2 * c * (np.sqrt(4 + c * c) - c)))


def by_snr(c: float) -> Any:
    """That place by the schedule's signal and noise."""
    return (1 - c) / (1 + 1 / np.sqrt(SNR)) ** 2 + c


def extra(config: TrainConfig) -> Any:
    """The noise that is added in (all of it, the input alone), in parts of the draws that it is made of."""
    key, shape = jr.key(3), (2, 4, 4, 4)
    schedule = Schedule(ScheduleConfig())
    plain = Draws.draw(schedule, TrainConfig().loss, None, shape, key=key)
    found = Draws.draw(schedule, config.loss, None, shape, key=key)
    offset = (found.eps - plain.eps) / jr.normal(jr.fold_in(key, 1), (2, 1, 1, 4))
    beyond = (found.input_eps - found.eps) / jr.normal(jr.fold_in(key, 2), shape)
    assert np.ptp(offset) < 1e-4 and np.ptp(beyond) < 1e-2
    return pytest.approx([float(np.median(offset)), float(np.median(beyond))], abs=1e-4)


def often(config: TrainConfig) -> Any:
    """(first, last, how much) of the timesteps that are drawn more often, or None."""
    weights = timestep_weights(config.timestep_bias, 1000)
    if weights is None:
        return None
    raised = np.flatnonzero(weights > weights.min())
    return int(raised[0]), int(raised[-1]), round(float(weights.max() / weights.min()), 6)


HUBER = {"loss_type": "huber"}
RANGE = {"timestep_bias.strategy": "range", "timestep_bias.multiplier": 2}
LATER = {"timestep_bias.strategy": "later"}
LOSS: Rows = {
    "snr_gamma": Row(5, loss, 4.0, 4 * float(np.mean(np.minimum(SNR, 5) / SNR))),
    "loss_type": Row("huber", loss, 4.0, huber(by_snr(0.1))),
    "huber_c": Row(0.5, loss, huber(by_snr(0.1)), huber(by_snr(0.5)), HUBER),
    "huber_schedule": Row("exponential", loss, huber(by_snr(0.1)), huber(0.1 ** (np.array(TIMES) / 1000)), HUBER),
    "noise_offset": Row(0.1, extra, [0, 0], [0.1, 0]),
    "input_perturbation": Row(0.2, extra, [0, 0], [0, 0.2]),
    "timestep_bias.strategy": Row("later", often, None, (750, 999, 2), {"timestep_bias.multiplier": 2}),
    "timestep_bias.multiplier": Row(3, often, None, (750, 999, 3), LATER),
    "timestep_bias.begin": Row(100, often, None, (100, 999, 2), RANGE),
    "timestep_bias.end": Row(500, often, None, (0, 500, 2), RANGE),
    "timestep_bias.portion": Row(0.5, often, (750, 999, 2), (500, 999, 2), {**LATER, "timestep_bias.multiplier": 2}),
}


def schedule(field: str) -> Any:
    """A field of the schedule that is trained on."""
    return lambda config: getattr(ModelShapes.sdxl_base(config.diffusion_scheduler_config).schedule, field)


def sampler(field: str) -> Any:
    """A field of the sampler, where the model's file is SDXL's."""

    def observe(config: TrainConfig) -> Any:
        stated = {"_class_name": "EulerDiscreteScheduler", **ScheduleConfig().to_json()}
        return getattr(Scheduler.from_json({**stated, **config.diffusion_scheduler_config.changed()}), field)

    return observe


SOLVER = {"diffusion_scheduler_config._class_name": "DPMSolverMultistep"}
SCHEDULE: Rows = {
    "diffusion_scheduler_config._class_name": Row(
        "FlaxDDIMScheduler", sampler("name"), "EulerDiscreteScheduler", "DDIMScheduler"
    ),
    "diffusion_scheduler_config.prediction_type": Row(
        "v_prediction", schedule("prediction_type"), "epsilon", "v_prediction"
    ),
    "diffusion_scheduler_config.rescale_zero_terminal_snr": Row(
        True, schedule("rescale_betas_zero_snr"), False, True,
        {"diffusion_scheduler_config.prediction_type": "v_prediction"},
    ),
    "diffusion_scheduler_config.timestep_spacing": Row(
        "trailing", schedule("timestep_spacing"), "leading", "trailing"
    ),
    "diffusion_scheduler_config.use_karras_sigmas": Row(True, sampler("use_karras_sigmas"), False, True),
    "diffusion_scheduler_config.algorithm_type": Row(
        "sde-dpmsolver++", sampler("algorithm_type"), "dpmsolver++", "sde-dpmsolver++", SOLVER
    ),
}  # fmt: skip

ROWS: Rows = {**MODEL, **ATTENTION, **OPTIM, **LOSS, **SCHEDULE}

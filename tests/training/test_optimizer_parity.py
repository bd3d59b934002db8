"""Learning rates against diffusers' schedules, optimizers against PyTorch's and transformers'. Needs PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import parity_torch as theirs
import pytest

from sdxl_eqx.config import OptimConfig
from sdxl_eqx.training.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.parity

STEPS = 120


@pytest.mark.parametrize(
    ("name", "options", "their_options"),
    [
        ("constant_with_warmup", {"lr_schedule": "constant"}, {}),
        ("linear", {"lr_schedule": "linear"}, {}),
        ("cosine", {"lr_schedule": "cosine"}, {"num_cycles": 0.5}),
        ("cosine_with_restarts", {"lr_schedule": "cosine_with_restarts", "lr_num_cycles": 3}, {"num_cycles": 3}),
        (
            "piecewise_constant",
            {"lr_schedule": "piecewise", "lr_step_rules": "1:10,0.1:70,0.01"},
            {"step_rules": "1:10,0.1:70,0.01"},
        ),
    ],
)
@pytest.mark.parametrize("warmup", [0, 24])
def test_learning_rates_are_those_of_diffusers(name: str, options: Any, their_options: Any, warmup: int):
    from diffusers import optimization

    if name == "piecewise_constant" and warmup:
        pytest.skip("diffusers has no warm-up there")
    torch = theirs.torch
    config = OptimConfig(learning_rate=1.0, warmup_steps_fraction=warmup / STEPS, **options)
    schedule = learning_rate(config, total_steps=STEPS, batch_size=1)
    ours = np.asarray(jax.vmap(schedule)(jnp.arange(STEPS + 20)))
    sgd = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler: Any
    if name == "cosine":  # whose number of cycles `get_scheduler` does not pass on
        scheduler = optimization.get_cosine_schedule_with_warmup(sgd, warmup, STEPS)
    else:
        scheduler = optimization.get_scheduler(
            name, sgd, num_warmup_steps=warmup, num_training_steps=STEPS, **their_options
        )
    # diffusers' cosine rises again after its end.
    count = STEPS if name == "cosine" else STEPS + 20
    expected = [scheduler.lr_lambdas[0](n) for n in range(count)]
    np.testing.assert_allclose(ours[:count], expected, atol=1e-6)


def trained(config: OptimConfig, shape: tuple[int, ...]) -> np.ndarray:
    """Weights after the updates of `gradients`."""
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    params = {"weight": jnp.asarray(start(shape))}

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update({"weight": gradient}, state, params)
        return (optax.apply_updates(params, updates), state), None

    begin = (params, optimizer.init(params))
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.asarray(gradients(shape))))(begin)
    return np.asarray(params["weight"])


def start(shape: tuple[int, ...]) -> np.ndarray:
    """The first weights."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def gradients(shape: tuple[int, ...]) -> np.ndarray:
    """Thirty, not all of one size."""
    rng = np.random.default_rng(1)
    return (rng.standard_normal((30, *shape)) * 10 ** rng.uniform(-3, 1, (30, *(1 for _ in shape)))).astype(np.float32)


def their_weights(make: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The same in PyTorch."""
    torch = theirs.torch
    weight = torch.nn.Parameter(torch.from_numpy(start(shape)))
    optimizer = make([weight])
    for gradient in gradients(shape):
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    return weight.detach().numpy()


def test_adamw_is_pytorchs():
    config = OptimConfig(learning_rate=0.01, adam_weight_decay=0.1)
    expected = their_weights(lambda w: theirs.torch.optim.AdamW(w, lr=0.01, weight_decay=0.1), (8, 4))
    np.testing.assert_allclose(trained(config, (8, 4)), expected, atol=1e-5)


@pytest.mark.parametrize("shape", [(128, 144), (40,)])
def test_adafactor_is_that_of_transformers_with_fixed_steps(shape: tuple[int, ...]):
    from transformers.optimization import Adafactor

    def make(weights: Any) -> Any:
        return Adafactor(weights, lr=0.01, weight_decay=0.1, scale_parameter=False, relative_step=False)

    config = OptimConfig(optimizer="adafactor", learning_rate=0.01, adam_weight_decay=0.1, decay_all=True)
    np.testing.assert_allclose(trained(config, shape), their_weights(make, shape), atol=1e-5)

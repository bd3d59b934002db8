"""The LoRA that trains, written and read: files hold what the networks compute."""

from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_models as tiny
import pytest

from sdxl_eqx.config import LoraTrainingConfig, TextEncoderConfig, TrainConfig
from sdxl_eqx.models.clip import CLIPText
from sdxl_eqx.models.sdxl import Encoders
from sdxl_eqx.models.unet import UNet
from sdxl_eqx.models.vae import VAE
from sdxl_eqx.nn.lora import LoraShape
from sdxl_eqx.training.networks import Networks, join, split, with_changes
from sdxl_eqx.training.targets import lora_shape
from sdxl_eqx.weights.adapters import from_lora, parts_of, to_lora
from sdxl_eqx.weights.lora import merge, read_lora, write_kohya, write_peft
from sdxl_eqx.weights.model import Model
from sdxl_eqx.weights.read import fill
from sdxl_eqx.weights.tensors import Tensor

TARGETS = ("attention", "feed_forward", "projection", "convolution")


def config(**changes: Any) -> TrainConfig:
    """A LoRA of every kind of layer, of text encoders too."""
    lora = LoraTrainingConfig(**{"lora_rank": 2, "lora_alpha": 3.0, "lora_targets": TARGETS, **changes})
    return TrainConfig(lora=lora, text=TextEncoderConfig(train_text_encoder=True))


@pytest.fixture(scope="module")
def base() -> Networks:
    """The networks without changes."""
    texts = (tiny.filled(CLIPText, one) for one in (tiny.TEXT, tiny.TEXT_2))
    return Networks(tiny.filled(UNet, tiny.UNET), Encoders(*texts, vae=tiny.filled(VAE, tiny.VAE_CONFIG)))


@pytest.fixture(scope="module")
def model(base: Networks) -> Model:
    """The same as files have them."""
    parts = parts_of(base.unet, base.encoders)
    tensors = {
        part: {key: Tensor.of(x) for key, x in tiny.file_tensors(module).items()} for part, module in parts.items()
    }
    return Model(tensors, {part: module.config.to_json() for part, module in parts.items()})


def trained(base: Networks, asked: TrainConfig) -> tuple[Networks, Networks]:
    """(changes that have an effect, what they change)."""
    shapes = eqx.filter_eval_shape(partial(with_changes, config=asked, key=jr.key(1)), base)
    changes, frozen = split(shapes, asked)
    arrays = iter(jax.tree.leaves(base))
    rng = np.random.default_rng(0)

    def draw(path: Any, x: Any) -> Any:
        is_size = jax.tree_util.keystr(path).endswith("magnitude")
        return jnp.asarray(0.3 * rng.standard_normal(x.shape) + is_size, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, changes), jax.tree.map(lambda _: next(arrays), frozen)


@pytest.mark.parametrize("form", ["peft", "kohya"])
@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "use_rslora": True}], ids=["LoRA", "rank-stabilized DoRA"])
def test_a_file_merged_into_the_model_computes_what_trained_and_is_gone_on_from(
    base: Networks, model: Model, tmp_path: Path, form: str, kind: dict[str, bool]
):
    asked = config(**kind)
    changes, frozen = trained(base, asked)
    shape, parts = lora_shape(asked.lora), parts_of(changes.unet, changes.encoders)
    lora, file = to_lora(parts, shape, {}), tmp_path / "lora.safetensors"
    write_peft(lora, file) if form == "peft" else write_kohya(lora, tiny.UNET, file)
    found = read_lora(file, model)
    merged = merge(model, [(found, 1.0)])
    assert sum(x is not y for x, y in zip(merged.parts["unet"].values(), model.parts["unet"].values(), strict=True)) > 9

    whole, inputs, ids = join(changes, frozen), tiny.unet_inputs(tiny.UNET, (8, 8)), tiny.prompt_ids()
    put = partial(fill, dtype=np.float32, source="merged", put=lambda _, x: jnp.asarray(x))
    unet = put(base.unet, merged.parts["unet"])
    ours = tiny.apply_unet(whole.unet, inputs)
    tiny.assert_close(ours, tiny.apply_unet(unet, inputs), 1e-4)
    assert np.abs(ours - tiny.apply_unet(base.unet, inputs)).max() > 0.1
    assert whole.encoders is not None and base.encoders is not None
    for name, one in zip(("text_encoder", "text_encoder_2"), ids, strict=True):
        there = put(getattr(base.encoders, name), merged.parts[name])
        for x, y in zip(tiny.run_text(getattr(whole.encoders, name), one), tiny.run_text(there, one), strict=True):
            tiny.assert_close(x, y, 1e-4)

    blank = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), parts)
    again = from_lora(found, blank, shape, file)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(parts), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_rank": 4}, "has rank 2; give --lora-rank 2"),
        ({"lora_alpha": 1.0}, "counts 1.5 times, here 0.5; give --lora-alpha 3"),
        ({"use_dora": True}, "is no DoRA; --use-dora must say so"),
        ({"lora_targets": ("attention",)}, "does not train; name it with --lora-targets"),
    ],
)
def test_a_file_of_another_lora_is_not_gone_on_from(base: Networks, changes: dict[str, Any], said: str):
    of_file, now = trained(base, config())[0], trained(base, config(**changes))[0]
    lora = to_lora(parts_of(of_file.unet, of_file.encoders), lora_shape(config().lora), {})
    with pytest.raises(ValueError, match=f"--lora-init a.safetensors.*{said}"):
        from_lora(lora, parts_of(now.unet, now.encoders), lora_shape(config(**changes).lora), Path("a.safetensors"))


def test_only_changes_train(base: Networks):
    changes, frozen = trained(base, config())
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(changes)]
    assert all(jax.tree_util.keystr(path, simple=True).endswith(("lora_down", "lora_up")) for path in paths)
    assert all(x is y for x, y in zip(jax.tree.leaves(frozen), jax.tree.leaves(base), strict=True))
    assert {x.dtype for x in jax.tree.leaves(changes)} == {jnp.dtype(jnp.float32)}
    assert lora_shape(config().lora) == LoraShape(2, 1.5)


def test_a_file_with_a_number_that_is_none_is_not_gone_on_from(base: Networks):
    changes = trained(base, config())[0]
    parts = parts_of(changes.unet, changes.encoders)
    spoilt = {part: jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), model) for part, model in parts.items()}
    lora = to_lora(spoilt, lora_shape(config().lora), {})
    with pytest.raises(ValueError, match=r"--lora-init a\.safetensors: .* holds NaN or infinity"):
        from_lora(lora, parts, lora_shape(config().lora), Path("a.safetensors"))

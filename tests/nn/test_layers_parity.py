"""Every layer against its twin in PyTorch, diffusers or transformers: random weights through the reader, float32."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import parity_torch as theirs
import pytest
from parity_models import TEXT, TEXT_2, assert_close, generator, strict

from sdxl_eqx.kernels.attention import dot_product
from sdxl_eqx.models.clip import MLP, EncoderLayer
from sdxl_eqx.nn.attention import Attention, GridAttention
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.conv import Conv2d, Downsample, Upsample
from sdxl_eqx.nn.embedding import TimestepEmbedding, sinusoid
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.norm import GroupNorm, LayerNorm
from sdxl_eqx.nn.resnet import ResNetBlock
from sdxl_eqx.nn.transformer import FeedForward, Transformer, TransformerBlock
from sdxl_eqx.weights.read import read_model

pytestmark = pytest.mark.parity
torch = theirs.torch

with theirs.their_warnings_are_theirs():
    from diffusers.models.attention import BasicTransformerBlock as TheirBlock
    from diffusers.models.attention import FeedForward as TheirFeedForward
    from diffusers.models.attention_processor import Attention as TheirAttention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.embeddings import TimestepEmbedding as TheirEmbedding
    from diffusers.models.embeddings import get_timestep_embedding
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D
    from transformers.models.clip.modeling_clip import CLIPMLP, CLIPEncoderLayer

ATOL = 1e-5


def array(*shape: int, name: str = "x") -> np.ndarray:
    return generator("layer", name, shape).standard_normal(shape).astype(np.float32)


def transplant(module: Any, make: Callable[..., Any], tmp_path: Path) -> Any:
    """Our twin of a module of theirs: random weights (their norms' would be ones), saved and read."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            scale = 0.3 if value.ndim == 1 else value[0].numel() ** -0.5
            draw = scale * torch.from_numpy(array(*value.shape, name=name))
            value.copy_(draw + 1 if "norm" in name and name.endswith("weight") else draw)
    file = theirs.save(module.eval().state_dict(), tmp_path / "layer.safetensors")
    return read_model(eqx.filter_eval_shape(make, key=jr.key(0)), [file], dtype=np.float32)


def check(ours: Callable[..., Any], module: Callable[..., Any], *inputs: np.ndarray) -> None:
    with torch.no_grad(), theirs.their_warnings_are_theirs():
        wanted = module(*(theirs.to_torch(x) for x in inputs))
    assert_close(strict(ours)(*(jnp.asarray(x) for x in inputs)), theirs.to_numpy(wanted), ATOL)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_is_torchs(kernel: int, stride: int, tmp_path: Path):
    module = torch.nn.Conv2d(5, 7, kernel, stride=stride, padding=kernel // 2)
    ours = transplant(module, partial(Conv2d, 5, 7, kernel), tmp_path)
    check(partial(ours, stride=stride), module, array(2, 6, 9, 5))


@pytest.mark.parametrize("use_bias", [True, False])
def test_a_dense_layer_is_torchs(use_bias: bool, tmp_path: Path):
    module = torch.nn.Linear(6, 9, bias=use_bias)
    check(transplant(module, partial(Linear, 6, 9, use_bias=use_bias), tmp_path), module, array(2, 3, 6))


@pytest.mark.parametrize("pad", ["around", "after"])
@pytest.mark.parametrize("grid", [(8, 10), (7, 9)])
def test_halving_pads_as_the_unet_or_as_the_autoencoder_does(pad: Any, grid: tuple[int, int], tmp_path: Path):
    module = Downsample2D(6, use_conv=True, padding=1 if pad == "around" else 0, name="op")
    ours = transplant(module, partial(Downsample, 6, pad=pad), tmp_path)
    check(ours, module, array(2, *grid, 6))


@pytest.mark.parametrize("size", [None, (9, 10), (10, 9), (9, 9)])
def test_doubling_reaches_the_size_it_is_given(size: tuple[int, int] | None, tmp_path: Path):
    module = Upsample2D(6, use_conv=True)
    ours = transplant(module, partial(Upsample, 6), tmp_path)
    check(lambda x: ours(x, size), lambda x: module(x, output_size=size), array(2, 5, 5, 6))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_group_norm_is_torchs_even_far_from_zero(offset: float, tmp_path: Path):
    module = torch.nn.GroupNorm(3, 12, eps=1e-6)

    def make(key: Any) -> GroupNorm:
        return GroupNorm(3, 12, eps=1e-6)

    ours = transplant(module, make, tmp_path)
    x = array(2, 4, 5, 12)
    if not offset:
        # So small that eps counts.
        check(ours, module, 1e-3 * x)
        return
    with torch.no_grad():
        exact = theirs.to_numpy(module.double()(theirs.to_torch(x + np.float64(offset))))
    np.testing.assert_allclose(np.asarray(ours(jnp.asarray(x + np.float32(offset)))), exact, rtol=0, atol=3e-5)


def test_layer_norm_is_torchs(tmp_path: Path):
    module = torch.nn.LayerNorm(12, eps=1e-5)
    ours = transplant(module, lambda key: LayerNorm(12), tmp_path)
    check(ours, module, array(2, 5, 12))
    check(ours, module, 3e-3 * array(2, 5, 12))


@pytest.mark.parametrize("width", [8, 32, 320])
@pytest.mark.parametrize("flip, shift", [(True, 0.0), (False, 0.0), (True, 1.0)])
def test_sinusoids_are_diffusers(width: int, flip: bool, shift: float):
    x = np.array([0, 1, 17, 500, 999, 1365], np.float32)
    wanted = get_timestep_embedding(torch.from_numpy(x), width, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    ours = sinusoid(jnp.asarray(x), width, flip_sin_to_cos=flip, freq_shift=shift)
    # An angle of 1365 rad in float32 is off by half of 1.2e-4 wherever its frequency was rounded.
    np.testing.assert_allclose(ours[:2], wanted[:2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-4)
    assert np.abs(np.asarray(ours) - wanted.numpy()).mean() < ATOL


def test_the_timestep_embedding_is_diffusers(tmp_path: Path):
    module = TheirEmbedding(16, 24)
    check(transplant(module, partial(TimestepEmbedding, 16, 24), tmp_path), module, array(3, 16))


def test_self_attention_is_diffusers(tmp_path: Path):
    module = TheirAttention(24, heads=3, dim_head=8)
    ours = transplant(module, partial(Attention, 24, 24, 3), tmp_path)
    check(lambda x: ours(x, x, dot_product), module, 3 * array(2, 12, 24))


def test_cross_attention_is_diffusers(tmp_path: Path):
    module = TheirAttention(24, cross_attention_dim=20, heads=3, dim_head=8)
    ours = transplant(module, partial(Attention, 24, 20, 3), tmp_path)
    check(lambda x, y: ours(x, y, dot_product), module, 3 * array(2, 12, 24), 3 * array(2, 7, 20))


def test_the_autoencoders_attention_is_diffusers(tmp_path: Path):
    module = TheirAttention(
        16,
        heads=1,
        dim_head=16,
        norm_num_groups=4,
        eps=1e-6,
        residual_connection=True,
        bias=True,
        upcast_softmax=True,
        _from_deprecated_attn_block=True,
    )
    ours = transplant(module, partial(GridAttention, 16, 4, eps=1e-6), tmp_path)
    check(lambda x: ours(x, dot_product), module, array(2, 4, 5, 16))


def test_feed_forward_with_its_geglu_is_diffusers(tmp_path: Path):
    module = TheirFeedForward(12, activation_fn="geglu")
    check(transplant(module, partial(FeedForward, 12), tmp_path), module, 2 * array(2, 5, 12))


def test_a_transformer_block_is_diffusers(tmp_path: Path):
    module = TheirBlock(24, 3, 8, cross_attention_dim=20)
    ours = transplant(module, partial(TransformerBlock, 24, 20, 3), tmp_path)

    def call(x: Any, context: Any) -> Any:
        return module(x, encoder_hidden_states=context)

    check(lambda x, y: ours(x, y, dot_product), call, array(2, 12, 24), array(2, 7, 20))


def test_a_stage_of_two_transformer_blocks_is_diffusers(tmp_path: Path):
    module = Transformer2DModel(
        3, 8, 24, num_layers=2, cross_attention_dim=20, norm_num_groups=6, use_linear_projection=True
    )
    ours = transplant(module, partial(Transformer, 24, 20, 3, 2, groups=6), tmp_path)

    def call(x: Any, context: Any) -> Any:
        return module(x, encoder_hidden_states=context).sample

    # The first norm's eps shows where activations are small.
    for scale in (1, 3e-3):
        check(lambda x, y: ours(x, y, Compute()), call, scale * array(2, 3, 4, 24), array(2, 7, 20))


@pytest.mark.parametrize("c_in", [12, 24])
def test_a_residual_block_with_time_is_diffusers(c_in: int, tmp_path: Path):
    module = ResnetBlock2D(in_channels=c_in, out_channels=24, temb_channels=16, groups=6, eps=1e-5)
    ours = transplant(module, partial(ResNetBlock, c_in, 24, 16, groups=6, eps=1e-5), tmp_path)
    assert (ours.conv_shortcut is None) == (c_in == 24)
    check(ours, module, array(2, 4, 5, c_in), array(2, 16, name="temb"))


@pytest.mark.parametrize("c_in", [12, 24])
def test_a_residual_block_without_time_is_diffusers(c_in: int, tmp_path: Path):
    no_time: Any = None
    module = ResnetBlock2D(in_channels=c_in, out_channels=24, temb_channels=no_time, groups=6, eps=1e-6)
    ours = transplant(module, partial(ResNetBlock, c_in, 24, None, groups=6, eps=1e-6), tmp_path)
    check(ours, lambda x: module(x, None), array(2, 4, 5, c_in))


@pytest.mark.parametrize("config", [TEXT, TEXT_2], ids=["quick_gelu", "gelu"])
def test_the_encoders_dense_layers_are_transformers(config: Any, tmp_path: Path):
    module = CLIPMLP(theirs.TorchTextConfig(**config.to_json()))
    check(transplant(module, partial(MLP, config), tmp_path), module, 2 * array(2, 5, config.hidden_size))


@pytest.mark.parametrize("config", [TEXT, TEXT_2], ids=["quick_gelu", "gelu"])
def test_an_encoder_layer_is_transformers_and_looks_back_only(config: Any, tmp_path: Path):
    with theirs.their_warnings_are_theirs():
        module = CLIPEncoderLayer(theirs.TorchTextConfig(**config.to_json(), attn_implementation="eager"))
    ours = transplant(module, partial(EncoderLayer, config), tmp_path)
    x = 2 * array(2, 6, config.hidden_size)
    mask = torch.full((6, 6), float("-inf")).triu(1)[None, None]
    check(lambda x: ours(x, dot_product), lambda x: module(x, mask), x)
    changed = x.copy()
    changed[:, -1] += 1
    before, after = (ours(jnp.asarray(y), dot_product) for y in (x, changed))
    np.testing.assert_array_equal(jax.device_get(before)[:, :-1], jax.device_get(after)[:, :-1])

"""The two text encoders: CLIP ViT-L and OpenCLIP ViT-bigG."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdxl_eqx.arrays import Attend
from sdxl_eqx.models.hf_config import require
from sdxl_eqx.nn.compute import Compute
from sdxl_eqx.nn.linear import Linear
from sdxl_eqx.nn.norm import LayerNorm
from sdxl_eqx.nn.transformer import run_stack


@dataclass(frozen=True)
class CLIPTextConfig:
    """The shape of a text encoder, under the names of transformers' `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: Literal["quick_gelu", "gelu"]
    projection_dim: int | None
    """Width of the pooled embedding; None where the model has no projection."""
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    @classmethod
    def sdxl_base(cls) -> "CLIPTextConfig":
        """SDXL's first encoder, openai/clip-vit-large-patch14 (Radford et al. 2021)."""
        return cls(49408, 768, 3072, 12, 12, 77, "quick_gelu", None)

    @classmethod
    def sdxl_base_2(cls) -> "CLIPTextConfig":
        """SDXL's second encoder, OpenCLIP ViT-bigG/14 (Cherti et al. 2022), with projection."""
        return cls(49408, 1280, 5120, 32, 20, 77, "gelu", 1280)

    @classmethod
    def tiny(cls) -> "CLIPTextConfig":
        """A small first encoder over the real vocabulary."""
        return cls(49408, 64, 128, 2, 2, 77, "quick_gelu", None)

    @classmethod
    def tiny_2(cls) -> "CLIPTextConfig":
        """A small second encoder over the real vocabulary."""
        return dataclasses.replace(cls.tiny(), hidden_act="gelu", projection_dim=64)

    @classmethod
    def from_json(cls, config: Mapping[str, Any], *, projection: bool) -> "CLIPTextConfig":
        """Read transformers' `config.json`; `projection` says whether the model has a projection (SDXL's second).

        Raises:
            ValueError: for a variant that SDXL does not use, with its key and value.
        """
        require("text encoder", config, must={"model_type": "clip_text_model"})
        if config.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
            raise ValueError(f"text encoder config: hidden_act={config['hidden_act']!r} is not supported.")
        return cls(
            vocab_size=config.get("vocab_size", 49408),
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            max_position_embeddings=config.get("max_position_embeddings", 77),
            hidden_act=config.get("hidden_act", "quick_gelu"),
            projection_dim=config.get("projection_dim", 512) if projection else None,
            layer_norm_eps=config.get("layer_norm_eps", 1e-5),
            eos_token_id=config.get("eos_token_id", 49407),
        )

    def to_json(self) -> dict[str, Any]:
        """transformers' `config.json`; `from_json` reads it back."""
        projection = self.projection_dim is not None
        return {
            "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
            "attention_dropout": 0.0,
            "bos_token_id": 49406,
            "eos_token_id": self.eos_token_id,
            "hidden_act": self.hidden_act,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "layer_norm_eps": self.layer_norm_eps,
            "max_position_embeddings": self.max_position_embeddings,
            "model_type": "clip_text_model",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "pad_token_id": 1,
            "projection_dim": self.projection_dim if projection else self.hidden_size,
            "vocab_size": self.vocab_size,
        }


class Embedding(eqx.Module):
    """A table of vectors."""

    weight: Float[Array, "v c"]

    def __init__(self, v: int, c: int, *, key: PRNGKeyArray):
        self.weight = jr.normal(key, (v, c))


class Embeddings(eqx.Module):
    """Token plus position."""

    token_embedding: Embedding
    position_embedding: Embedding

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        token_key, position_key = jr.split(key)
        self.token_embedding = Embedding(config.vocab_size, config.hidden_size, key=token_key)
        self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size, key=position_key)

    def __call__(self, ids: Int[Array, "b s"]) -> Float[Array, "b s c"]:
        return self.token_embedding.weight[ids] + self.position_embedding.weight[None, : ids.shape[1]]


class SelfAttention(eqx.Module):
    """Causal self-attention with biases (transformers `CLIPAttention`)."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    out_proj: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        q_key, k_key, v_key, out_key = jr.split(key, 4)
        c = config.hidden_size
        self.q_proj, self.k_proj = Linear(c, c, key=q_key), Linear(c, c, key=k_key)
        self.v_proj, self.out_proj = Linear(c, c, key=v_key), Linear(c, c, key=out_key)
        self.heads = config.num_attention_heads

    def __call__(self, x: Float[Array, "b s c"], attend: Attend) -> Float[Array, "b s c"]:
        b, s, _ = x.shape
        query, key, value = (to(x).reshape(b, s, self.heads, -1) for to in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(query, key, value, causal=True).reshape(x.shape))


class MLP(eqx.Module):
    """Two dense layers; CLIP-L between them has `x * sigmoid(1.702 x)`, bigG the exact GELU."""

    fc1: Linear
    fc2: Linear
    act: Literal["quick_gelu", "gelu"] = eqx.field(static=True)

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        first_key, second_key = jr.split(key)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, key=first_key)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, key=second_key)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "b s c"]) -> Float[Array, "b s c"]:
        y = self.fc1(x)
        y = y * jax.nn.sigmoid(1.702 * y) if self.act == "quick_gelu" else jax.nn.gelu(y, approximate=False)
        return self.fc2(y)


class EncoderLayer(eqx.Module):
    """One pre-norm transformer layer."""

    layer_norm1: LayerNorm
    self_attn: SelfAttention
    layer_norm2: LayerNorm
    mlp: MLP

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        attention_key, mlp_key = jr.split(key)
        self.layer_norm1 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = SelfAttention(config, key=attention_key)
        self.layer_norm2 = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, key=mlp_key)

    def __call__(self, x: Float[Array, "b s c"], attend: Attend) -> Float[Array, "b s c"]:
        x = x + self.self_attn(self.layer_norm1(x), attend)
        return x + self.mlp(self.layer_norm2(x))


class TextStack(eqx.Module):
    """All layers, stacked on axis 0."""

    layers: EncoderLayer

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        self.layers = jax.vmap(lambda k: EncoderLayer(config, key=k))(jr.split(key, config.num_hidden_layers))


class TextTransformer(eqx.Module):
    """Embeddings, layers and the final norm."""

    embeddings: Embeddings
    encoder: TextStack
    final_layer_norm: LayerNorm

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        embeddings_key, encoder_key = jr.split(key)
        self.embeddings = Embeddings(config, key=embeddings_key)
        self.encoder = TextStack(config, key=encoder_key)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPText(eqx.Module):
    """A CLIP text encoder (transformers `CLIPTextModel`, with a projection `CLIPTextModelWithProjection`)."""

    text_model: TextTransformer
    text_projection: Linear | None
    config: CLIPTextConfig = eqx.field(static=True)

    def __init__(self, config: CLIPTextConfig, *, key: PRNGKeyArray):
        model_key, projection_key, values_key = jr.split(key, 3)
        c, p = config.hidden_size, config.projection_dim
        self.text_model = _initial_values(TextTransformer(config, key=model_key), config, key=values_key)
        self.text_projection = None if p is None else Linear(c, p, use_bias=False, key=projection_key)
        self.config = config

    def __call__(
        self, ids: Int[Array, "b s"], *, compute: Compute = Compute()
    ) -> tuple[Float[Array, "b s c"], Float[Array, "b p"]]:
        """(penultimate hidden state without the final norm, pooled embedding at the first end-of-text token).

        SDXL conditions on the state before the last layer of both encoders and on the second one's pooled embedding.
        Padding is attended to, as in training. Without a projection the pooled embedding is not projected.
        """
        layers = self.text_model.encoder.layers
        x = compute.run(self.text_model.embeddings, ids)
        penultimate = run_stack(jax.tree.map(lambda a: a[:-1], layers), x, compute.attend, compute=compute)
        last = compute.run(jax.tree.map(lambda a: a[-1], layers), penultimate, compute.attend)
        state = self.text_model.final_layer_norm(last)
        pooled = state[jnp.arange(ids.shape[0]), self._end(ids)]
        return penultimate, pooled if self.text_projection is None else compute.run(self.text_projection, pooled)

    def _end(self, ids: Int[Array, "b s"]) -> Int[Array, " b"]:
        # Published configs say eos_token_id 2, which stands for "the largest id" (transformers keeps that reading).
        if self.config.eos_token_id == 2:
            return jnp.argmax(ids, axis=1)
        return jnp.argmax(ids == self.config.eos_token_id, axis=1)


def _initial_values(model: TextTransformer, config: CLIPTextConfig, *, key: PRNGKeyArray) -> TextTransformer:
    """CLIP's own initial values (Radford et al. 2021; transformers `CLIPPreTrainedModel`).

    With a plain dense layer's, biases drown what tells one prompt from another.
    """
    c = config.hidden_size
    residual = (2 * config.num_hidden_layers) ** -0.5
    scales = {
        "token_embedding": 0.02,
        "position_embedding": 0.01,
        "q_proj": c**-0.5,
        "k_proj": c**-0.5,
        "v_proj": c**-0.5,
        "out_proj": c**-0.5 * residual,
        "fc1": (2 * c) ** -0.5,
        "fc2": c**-0.5 * residual,
    }
    leaves, structure = jax.tree_util.tree_flatten_with_path(model)
    values = []
    for (path, leaf), leaf_key in zip(leaves, jr.split(key, len(leaves)), strict=True):
        *_, module, name = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        if module not in scales:
            values.append(leaf)
        elif name == "bias":
            values.append(jnp.zeros_like(leaf))
        else:
            values.append(scales[module] * jr.normal(leaf_key, leaf.shape))
    return jax.tree.unflatten(structure, values)

"""The single-file layout of Stability AI: its names and how its tensors differ from diffusers'.

Sources: the `sgm` package's modules (Stability-AI/generative-models) and diffusers' converter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_eqx.models.unet import UNetConfig
from sdxl_eqx.models.vae import VAEConfig
from sdxl_eqx.weights.read import clip_key
from sdxl_eqx.weights.tensors import Tensor, Tensors

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "conditioner.embedders.0.transformer."
TEXT_2 = "conditioner.embedders.1.model."
TEXT_2_ALONE = "conditioner.embedders.0.model."
"""Of the same encoder in the refiner, which has no other."""


@dataclass(frozen=True)
class Rule:
    """A prefix in diffusers' names, and the one that stands for it in the single file."""

    here: str
    there: str


RESNET = (
    Rule("norm1.", "in_layers.0."),
    Rule("conv1.", "in_layers.2."),
    Rule("time_emb_proj.", "emb_layers.1."),
    Rule("norm2.", "out_layers.0."),
    Rule("conv2.", "out_layers.3."),
    Rule("conv_shortcut.", "skip_connection."),
)


def unet_rules(config: UNetConfig) -> list[Rule]:
    """Of the UNet, without its prefix: blocks are numbered through, transformers keep their inner names."""
    rules = [
        Rule("time_embedding.linear_1.", "time_embed.0."),
        Rule("time_embedding.linear_2.", "time_embed.2."),
        Rule("add_embedding.linear_1.", "label_emb.0.0."),
        Rule("add_embedding.linear_2.", "label_emb.0.2."),
        Rule("conv_in.", "input_blocks.0.0."),
        Rule("conv_norm_out.", "out.0."),
        Rule("conv_out.", "out.2."),
    ]
    levels, n = len(config.block_out_channels), config.layers_per_block
    for i in range(levels):
        for j in range(n):
            at = f"input_blocks.{(n + 1) * i + j + 1}"
            rules += _resnet(f"down_blocks.{i}.resnets.{j}.", f"{at}.0.")
            if config.attention_levels[i]:
                rules.append(Rule(f"down_blocks.{i}.attentions.{j}.", f"{at}.1."))
        if i < levels - 1:
            rules.append(Rule(f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{(n + 1) * (i + 1)}.0.op."))
    rules += _resnet("mid_block.resnets.0.", "middle_block.0.")
    rules.append(Rule("mid_block.attentions.0.", "middle_block.1."))
    rules += _resnet("mid_block.resnets.1.", "middle_block.2.")
    for i in range(levels):
        attention = config.attention_levels[levels - 1 - i]
        for j in range(n + 1):
            at = f"output_blocks.{(n + 1) * i + j}"
            rules += _resnet(f"up_blocks.{i}.resnets.{j}.", f"{at}.0.")
            if attention:
                rules.append(Rule(f"up_blocks.{i}.attentions.{j}.", f"{at}.1."))
        if i < levels - 1:
            at = f"output_blocks.{(n + 1) * i + n}.{2 if attention else 1}"
            rules.append(Rule(f"up_blocks.{i}.upsamplers.0.conv.", f"{at}.conv."))
    return rules


def _resnet(here: str, there: str) -> list[Rule]:
    return [Rule(here + rule.here, there + rule.there) for rule in RESNET]


def vae_rules(config: VAEConfig) -> list[Rule]:
    """Of the VAE, without its prefix: the decoder's levels are numbered from the other end."""
    levels, n = len(config.block_out_channels), config.layers_per_block
    rules = []
    for side, down, count in (("encoder", "down", n), ("decoder", "up", n + 1)):
        for i in range(levels):
            level = i if side == "encoder" else levels - 1 - i
            for j in range(count):
                here, there = f"{side}.{down}_blocks.{i}.resnets.{j}.", f"{side}.{down}.{level}.block.{j}."
                rules += [Rule(here + "conv_shortcut.", there + "nin_shortcut."), Rule(here, there)]
            sample = f"{down}samplers.0.conv."
            rules.append(Rule(f"{side}.{down}_blocks.{i}.{sample}", f"{side}.{down}.{level}.{down}sample.conv."))
        rules += [
            Rule(f"{side}.mid_block.resnets.0.", f"{side}.mid.block_1."),
            Rule(f"{side}.mid_block.resnets.1.", f"{side}.mid.block_2."),
            Rule(f"{side}.mid_block.attentions.0.group_norm.", f"{side}.mid.attn_1.norm."),
            Rule(f"{side}.mid_block.attentions.0.to_q.", f"{side}.mid.attn_1.q."),
            Rule(f"{side}.mid_block.attentions.0.to_k.", f"{side}.mid.attn_1.k."),
            Rule(f"{side}.mid_block.attentions.0.to_v.", f"{side}.mid.attn_1.v."),
            Rule(f"{side}.mid_block.attentions.0.to_out.0.", f"{side}.mid.attn_1.proj_out."),
            Rule(f"{side}.conv_norm_out.", f"{side}.norm_out."),
        ]
    return rules


TEXT_2_RULES = (
    Rule("text_model.embeddings.token_embedding.", "token_embedding."),
    Rule("text_model.final_layer_norm.", "ln_final."),
)
TEXT_2_LAYER = (
    Rule("self_attn.out_proj.", "attn.out_proj."),
    Rule("layer_norm1.", "ln_1."),
    Rule("layer_norm2.", "ln_2."),
    Rule("mlp.fc1.", "mlp.c_fc."),
    Rule("mlp.fc2.", "mlp.c_proj."),
)


def rename(rules: Sequence[Rule], *, to_file: bool) -> Callable[[str], str]:
    """A key in the other layout, by the first rule that fits; one that no rule names keeps its name."""
    pairs = [(r.here, r.there) if to_file else (r.there, r.here) for r in rules]

    def one(key: str) -> str:
        for start, new in pairs:
            if key.startswith(start):
                return new + key.removeprefix(start)
        return key

    return one


def renamed(tensors: Tensors, rules: Sequence[Rule], *, to_file: bool) -> Tensors:
    """Tensors under their keys in the other layout.

    Raises:
        ValueError: where two keys mean the same tensor.
    """
    name = rename(rules, to_file=to_file)
    found: Tensors = {}
    for key, tensor in tensors.items():
        _put(found, name(key), tensor, key)
    return found


def _put(found: Tensors, key: str, tensor: Tensor, stored: str) -> None:
    if key in found:
        raise ValueError(f"{key} is held twice: as {stored} and under another name; save the file again with one.")
    found[key] = tensor


def _is_vae_attention(key: str) -> bool:
    """Whether a diffusers key is a matrix of the VAE's attention, which the single file stores as 1x1 convolution."""
    return ".mid_block.attentions.0.to_" in key and key.endswith(".weight")


def vae_to_file(tensors: Tensors, config: VAEConfig) -> Tensors:
    """A diffusers VAE in the single file's layout, with its prefix."""
    name = rename(vae_rules(config), to_file=True)
    return {
        VAE + name(key): t.then(lambda x: x[:, :, None, None], (*t.shape, 1, 1)) if _is_vae_attention(key) else t
        for key, t in tensors.items()
    }


def vae_from_file(tensors: Tensors, config: VAEConfig) -> Tensors:
    """The inverse of `vae_to_file`, without the prefix on either side."""
    return {
        key: t.then(lambda x: x[:, :, 0, 0], t.shape[:2]) if _is_vae_attention(key) and len(t.shape) == 4 else t
        for key, t in renamed(tensors, vae_rules(config), to_file=False).items()
    }


def text_from_file(tensors: Tensors) -> Tensors:
    """The first encoder, without its prefix; diffusers' own script writes what transformers 5 saves, which lacks one.

    Raises:
        ValueError: where two keys mean the same tensor.
    """
    found: Tensors = {}
    for key, tensor in tensors.items():
        _put(found, clip_key(key), tensor, key)
    return found


def text_2_to_file(tensors: Tensors, prefix: str) -> Tensors:
    """The second encoder in OpenCLIP's names: q, k and v in one matrix, the projection transposed."""
    found: Tensors = {}
    for key, t in tensors.items():
        if key == "text_projection.weight":
            found["text_projection"] = t.then(np.transpose, t.shape[::-1])
        elif key == "text_model.embeddings.position_embedding.weight":
            found["positional_embedding"] = t
        elif key.startswith("text_model.encoder.layers."):
            number, rest = key.removeprefix("text_model.encoder.layers.").split(".", 1)
            there = f"transformer.resblocks.{number}."
            part, _, kind = rest.removeprefix("self_attn.").partition(".")
            if rest.startswith("self_attn.q_proj."):
                stem = f"text_model.encoder.layers.{number}.self_attn."
                found[f"{there}attn.in_proj_{kind}"] = _joined([tensors[f"{stem}{p}_proj.{kind}"] for p in "qkv"])
            elif part not in ("k_proj", "v_proj"):
                found[there + rename(TEXT_2_LAYER, to_file=True)(rest)] = t
        else:
            found[rename(TEXT_2_RULES, to_file=True)(key)] = t
    return {prefix + key: t for key, t in found.items()}


def text_2_from_file(tensors: Tensors) -> Tensors:
    """The inverse of `text_2_to_file`, without the prefix.

    Raises:
        ValueError: where two keys mean the same tensor.
    """
    found: Tensors = {}
    for key, t in tensors.items():
        if key == "text_projection":
            _put(found, "text_projection.weight", t.then(np.transpose, t.shape[::-1]), key)
        elif key == "positional_embedding":
            _put(found, "text_model.embeddings.position_embedding.weight", t, key)
        elif key.startswith("transformer.resblocks."):
            number, rest = key.removeprefix("transformer.resblocks.").split(".", 1)
            here = f"text_model.encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for i, part in enumerate("qkv"):
                    _put(found, f"{here}self_attn.{part}_proj.{kind}", _third(t, i), key)
            else:
                _put(found, here + rename(TEXT_2_LAYER, to_file=False)(rest), t, key)
        else:
            _put(found, rename(TEXT_2_RULES, to_file=False)(key), t, key)
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    rows = sum(part.shape[0] for part in parts)
    return Tensor((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: np.concatenate([p.read() for p in parts]))


def _third(tensor: Tensor, i: int) -> Tensor:
    rows = tensor.shape[0] // 3
    return tensor.then(lambda x: x[i * rows : (i + 1) * rows], (rows, *tensor.shape[1:]))

"""The groups that say what of a model trains beside the whole UNet or instead of it."""

from dataclasses import dataclass

from sdxl_eqx.config.shared import Texts


@dataclass(frozen=True)
class LoraTrainingConfig:
    """LoRA: small changes of the layers train in float32, the model stays as it is."""

    lora_rank: int = 0
    """Rank of the changes; 0 trains the whole UNet."""
    lora_alpha: float = 0.0
    """The changes count alpha / rank times; 0 is the rank, so once."""
    lora_targets: Texts = ("attention", "feed_forward")
    """The layers that are changed: attention, feed_forward, projection (in and out of a transformer stage), convolution
    (of residual blocks and resizing), or ends and patterns of their names, as to_q or unet.mid_block.*.proj_in."""
    lora_init: str = ""
    """A LoRA file of the same rank and alpha to go on from."""
    lora_dropout: float = 0.0
    """Share of a layer's inputs that its change does not see while it trains."""
    use_rslora: bool = False
    """The changes count alpha / sqrt(rank) times: higher ranks learn as fast."""
    int8_base: bool = False
    """Keep the frozen weights of the UNet's transformer stages in 8 bits, with a scale for each output: half the memory
    of bfloat16. They are multiplied in activations_dtype."""
    use_dora: bool = False
    """DoRA: the size of each output's weights trains apart from their direction."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """The text encoders, which train beside the UNet, whole or by LoRA as it does."""

    train_text_encoder: bool = False
    """Train both text encoders too. Then latents alone are cached."""
    text_encoder_learning_rate: float = 4.25e-6
    """Their own peak learning rate."""

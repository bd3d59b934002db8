"""The groups of flags that training and generation share; each is a part of one group or stands by itself."""

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import tyro

from sdxl_eqx.arrays import DtypeName

Axes = tuple[str, ...]
"""Axes of the mesh."""

Texts = tuple[str, ...] | None
"""One text after the other; None is none."""

Floats = tuple[float, ...] | None
"""One number after the other; None leaves them to us."""

Bools = tuple[bool, ...] | None
"""One yes or no after the other; None leaves them to us."""

AxisRules = tuple[tuple[str, Axes], ...]
"""The axes of the mesh that share each named dimension."""

MESH_AXES: Axes = ("data", "fsdp", "context", "tensor")

AXIS_RULES: AxisRules = (
    ("batch", ("data",)),
    ("activation_batch", ("data", "fsdp")),
    ("activation_length", ("context",)),
    ("activation_kv_length", ()),
    ("activation_heads", ("tensor",)),
    ("activation_kv", ("tensor",)),
    ("mlp", ("tensor",)),
    ("embed", ("fsdp",)),
    ("heads", ("tensor",)),
    ("conv_batch", ("data", "fsdp")),
    ("conv_in", ()),
    ("out_channels", ("tensor",)),
    ("conv_out", ("fsdp",)),
)
"""MaxDiffusion's, and three dimensions that its rules leave out."""


@dataclass(frozen=True)
class MachineConfig:
    """Where and how repeatably it runs."""

    seed: int = 0
    """Every random draw of the run follows from it."""
    hardware: Literal["auto", "tpu", "gpu", "cpu"] = "auto"
    """Where to run; auto takes what JAX finds, the others are an error where there is none."""
    jax_cache_dir: str = ""
    """Persistent compile cache; '' is the user's cache folder, `none` turns it off."""
    skip_jax_distributed_system: bool = False
    """Do not start jax.distributed, whatever the environment says."""


@dataclass(frozen=True)
class ModelSourceConfig:
    """The model and how it computes."""

    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """Hub id, diffusers folder, single .safetensors file, or a folder that convert_weights.py made `--to native`;
    `asset:tiny-sdxl` is the small one that comes with the package."""
    revision: str = "main"
    """Branch, tag or commit on the Hub."""
    variant: str = ""
    """Word in the names of a diffusers folder's weight files, such as fp16; only those are fetched and read."""
    unet_checkpoint: str = ""
    """Another UNet to put in: diffusers folder, .safetensors file in either layout, Hub id, or a run (its average, if
    it has one)."""
    from_pt: bool = True
    """Read PyTorch-layout files (safetensors); otherwise Flax ones (.msgpack) where there are any."""
    activations_dtype: DtypeName = "bfloat16"
    """Dtype of the computation; norms, softmax and loss are float32 all the same."""
    precision: Literal["DEFAULT", "HIGH", "HIGHEST"] = "DEFAULT"
    """Precision of every matrix product and convolution."""


@dataclass(frozen=True)
class AttentionKernelConfig:
    """What computes attention."""

    attention: Literal["auto", "dot_product", "flash", "cudnn", "cudnn_flash_te"] = "auto"
    """What computes attention: XLA (dot_product), JAX's flash kernels, or cuDNN, by itself or through Transformer
    Engine. auto takes the best for the device and says which; one asked for by name serves or is an error."""
    flash_min_seq_length: int = 0
    """flash serves from so many queries and keys on, dot_product below."""
    split_head_dim: bool = True
    """Heads are an axis of their own, which tensor parallelism shares out; otherwise they are folded into the batch."""
    attention_sharding_uniform: bool = True
    """Under context parallelism queries of self- and cross-attention are shared out alike, by their place in the
    sequence; otherwise self-attention by heads."""
    mask_padding_tokens: bool = True
    """Keep attention off the padding of keys up to a kernel's block; without, its zeros are attended to, as
    MaxDiffusion does."""


@dataclass(frozen=True)
class FlashBlockSizes:
    """How many queries and keys a flash kernel takes at a time; none of it changes the result.

    What is None is chosen by shape, and nothing is larger than the padded sequence.
    """

    block_q: int | None = None
    """Queries at a time in the forward pass."""
    block_kv: int | None = None
    """Keys at a time in the forward pass."""
    block_kv_compute: int | None = None
    """Part of block_kv that is worked on at once (TPU only)."""
    block_q_dkv: int | None = None
    """Queries at a time for the gradients of keys and values."""
    block_kv_dkv: int | None = None
    """Keys at a time for the gradients of keys and values."""
    block_kv_dkv_compute: int | None = None
    """Part of block_kv_dkv that is worked on at once (TPU only)."""
    block_q_dq: int | None = None
    """Queries at a time for the gradient of the queries."""
    block_kv_dq: int | None = None
    """Keys at a time for the gradient of the queries."""
    use_fused_bwd_kernel: bool | None = None
    """All three gradients in one kernel, whose memory grows with the number of blocks of keys (TPU; on a GPU it is
    always so)."""

    def asked(self) -> dict[str, int]:
        """The sizes that are not left to us."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name.startswith("block_")}
        return {name: size for name, size in sizes.items() if size is not None}


SCHEDULERS = (
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler",
    "DDPMScheduler", "DPMSolverMultistepScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "UniPCMultistepScheduler", "LCMScheduler",
)  # fmt: skip
"""Samplers, under diffusers' names."""


@dataclass(frozen=True)
class DiffusionSchedulerConfig:
    """What is changed of the model's scheduler, for training and sampling alike; '' and none keep the model's."""

    _class_name: str = ""
    """Sampler by diffusers' name, such as EulerDiscreteScheduler or DDIM, with or without Flax before it."""
    prediction_type: Annotated[
        Literal["", "epsilon", "v_prediction"], tyro.conf.arg(metavar="{'',epsilon,v_prediction}")
    ] = ""
    """What the UNet predicts."""
    rescale_zero_terminal_snr: bool | None = None
    """Noise at the last timestep leaves nothing of the picture (Lin et al. 2023); wants v_prediction."""
    timestep_spacing: Annotated[
        Literal["", "leading", "trailing", "linspace"], tyro.conf.arg(metavar="{'',leading,trailing,linspace}")
    ] = ""
    """How sampling steps are spread over the schedule."""
    use_karras_sigmas: bool | None = None
    """Noise levels of Karras et al. (2022) while sampling, where the sampler has them."""
    algorithm_type: Annotated[
        Literal["", "dpmsolver++", "sde-dpmsolver++"], tyro.conf.arg(metavar="{'',dpmsolver++,sde-dpmsolver++}")
    ] = ""
    """Of DPMSolverMultistepScheduler: without or with fresh noise at each step."""

    @property
    def class_name(self) -> str | None:
        """The sampler's diffusers name; '' keeps the model's, None is of none that we have."""
        if not self._class_name:
            return ""
        wanted = self._class_name.removeprefix("Flax").removesuffix("Scheduler").lower()
        for name in SCHEDULERS:
            short = name.removesuffix("Scheduler")
            if wanted in {short.lower(), short.replace("Discrete", "").lower(), short.replace("Multistep", "").lower()}:
                return name
        return None

    def changed(self) -> dict[str, Any]:
        """What is asked for, under the keys of diffusers' `scheduler_config.json`."""
        asked = {
            "_class_name": self.class_name,
            "prediction_type": self.prediction_type,
            "rescale_betas_zero_snr": self.rescale_zero_terminal_snr,
            "timestep_spacing": self.timestep_spacing,
            "use_karras_sigmas": self.use_karras_sigmas,
            "algorithm_type": self.algorithm_type,
        }
        return {key: value for key, value in asked.items() if value not in ("", None)}


@dataclass(frozen=True)
class MeshConfig:
    """How the devices share the work."""

    mesh_axes: Axes = MESH_AXES
    """Order of the mesh's axes, outermost first; neighbours on the last ones."""
    dcn_data_parallelism: int = -1
    """Slices of a TPU, or hosts of GPUs, that share the batch and hold all weights; one dcn_ -1 takes the rest."""
    dcn_fsdp_parallelism: int = 1
    """Slices or hosts that share batch, weights and optimizer state."""
    dcn_context_parallelism: int = 1
    """Slices or hosts that share the rows of each picture."""
    dcn_tensor_parallelism: int = 1
    """Slices or hosts that share attention heads and feed-forward."""
    ici_data_parallelism: int = -1
    """Devices that share the batch and hold all weights; one ici_ -1 takes the rest."""
    ici_fsdp_parallelism: int = 1
    """Devices that share batch, weights and optimizer state."""
    ici_context_parallelism: int = 1
    """Devices that share the rows of each picture."""
    ici_tensor_parallelism: int = 1
    """Devices that share attention heads and feed-forward."""
    allow_split_physical_axes: bool = False
    """Let an axis of the mesh take part of a physical axis of a TPU."""
    logical_axis_rules: AxisRules = AXIS_RULES
    """Which axes of the mesh share a dimension of weights or activations, as [[NAME, AXIS or [AXES]], ...]; what is
    given replaces the default of the names in it."""


@dataclass(frozen=True)
class PromptConfig:
    """What is drawn, and how closely it follows the prompt."""

    prompt: str = "A magical castle in the middle of a forest, artistic drawing"
    """Prompt of every sample; '' takes the first captions of the data set, one a picture."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from."""
    do_classifier_free_guidance: bool = True
    """Guide the sampler by the difference between prompt and negative prompt."""
    guidance_scale: float = 9.0
    """Strength of guidance; 1 is none."""
    num_inference_steps: int = 20
    """Sampler steps."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that gets the spread of the unguided one back (Lin et al. 2023, section 3.4),
    against pictures that are burnt out."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRAs for drawing: lists of one length, or one value for all."""

    lora_model_name_or_path: Texts = None
    """Files, folders or Hub ids (owner/name, or owner/name/file.safetensors); kohya, PEFT and old diffusers keys."""
    weight_name: Texts = None
    """File of each inside its folder or repository; '' where it is the only one."""
    adapter_name: Texts = None
    """What each is called in the picture's parameters."""
    scale: Floats = None
    """Strength of each; 1 by default."""
    from_pt: Bools = None
    """Published; safetensors are read in any case, and pickles never."""


@dataclass(frozen=True)
class LoadedConfig:
    """Other people's work that drawing uses beside the model."""

    lightning_repo: str = ""
    """SDXL Lightning or Hyper-SD on the Hub, or a folder."""
    lightning_ckpt: str = ""
    """Its file: a UNet, or a LoRA, which is merged."""
    lightning_from_pt: bool = True
    """Published; safetensors are read in any case, and pickles never."""
    controlnet_model_name_or_path: Texts = None
    """ControlNets: folders, files or Hub ids."""
    controlnet_from_pt: bool = True
    """Read PyTorch-layout files (safetensors); otherwise Flax ones (.msgpack) where there are any."""
    controlnet_conditioning_scale: Floats = None
    """Strength of each; 0.5 by default."""
    controlnet_image: Texts = None
    """The picture that each is conditioned on: path or URL."""

"""What a training run is: frozen dataclasses, one a room, and the check of the whole. No file, no device is touched."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml

from sdxl_eqx.arrays import DtypeName

Flat = tyro.conf.OmitArgPrefixes
"""A group whose fields are flags of their own, without the group's name before them."""

TINY = "configs/tiny.yaml"


@dataclass(frozen=True)
class RunConfig:
    """The run and where it lies."""

    run_name: str = ""
    """Names the run's folder. A name that exists is resumed; '' makes a readable, unique one and starts anew."""
    base_output_directory: str = ""
    """Where runs go, if set; else output_dir."""
    output_dir: str = "outputs"
    """Where runs go; the run's folder is OUTPUT_DIR/RUN_NAME and holds everything of the run."""
    seed: int = 0
    """Every random draw of the run follows from it."""
    hardware: Literal["auto", "tpu", "gpu", "cpu"] = "auto"
    """Where to run; auto takes what JAX finds, the others are an error where there is none."""
    jax_cache_dir: str = ""
    """Persistent compile cache; '' is the user's cache folder, `none` turns it off."""

    @property
    def root(self) -> str:
        """The folder that holds the runs."""
        return self.base_output_directory or self.output_dir


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained."""

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
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored parameters; the optimizer's moments and the moving average are float32."""
    activations_dtype: DtypeName = "bfloat16"
    """Dtype of the computation; norms, softmax and loss are float32 all the same."""
    precision: Literal["DEFAULT", "HIGH", "HIGHEST"] = "DEFAULT"
    """Precision of every matrix product and convolution."""
    train_new_unet: bool = False
    """Start from a random UNet instead of the model's."""
    new_text_encoders: bool = False
    """Random, frozen text encoders made from the seed, where the model folder has none (the tiny configuration)."""
    remat_policy: Literal["auto", "none", "dots", "full"] = "auto"
    """What the backward pass computes again to save memory: nothing, all but matrix products, or everything.
    auto is none on CPU, else full."""
    scan_unroll: int = 1
    """How many transformer blocks are unrolled in a scan: more compile time, the same result."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and how long it runs."""

    learning_rate: float = 4e-7
    """Peak learning rate."""
    scale_lr: bool = False
    """Multiply learning_rate by the global batch size."""
    max_train_steps: int = 200
    """Optimizer updates; -1 takes epochs x samples."""
    num_train_epochs: int = 1
    """Passes over the data where max_train_steps is -1, which giving this flag alone means."""
    per_device_batch_size: float = 2.0
    """Samples a device and step; the product with the devices must be whole and divide over them."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: the peak for ever, or a fall to zero at the end of the schedule."""
    warmup_steps_fraction: float = 0.0
    """Linear warm-up over this fraction of the schedule."""
    learning_rate_schedule_steps: int = -1
    """Length of the schedule in updates; -1 is all steps."""
    adam_b1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_b2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon, outside the root."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay, of matrices and convolutions."""
    decay_all: bool = False
    """Weight decay on norms and biases too."""
    opt_enable_grad_clipping: bool = False
    """Clip each gradient entry to [-max_grad_value, max_grad_value]; before the norm."""
    max_grad_value: float = 1.0
    """Bound of opt_enable_grad_clipping."""
    opt_enable_grad_global_norm_clipping: bool = False
    """Scale the gradients so that their global norm is at most max_grad_norm."""
    max_grad_norm: float = 1.0
    """Bound of opt_enable_grad_global_norm_clipping."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of what is trained; 0 is off. Samples and export use it."""
    ema_every: int = 1
    """Update the average every so many steps."""


@dataclass(frozen=True)
class DiffusionSchedulerConfig:
    """What is changed of the model folder's scheduler, for training and sampling alike; '' keeps the folder's."""

    prediction_type: Annotated[
        Literal["", "epsilon", "v_prediction"], tyro.conf.arg(metavar="{'',epsilon,v_prediction}")
    ] = ""
    """What the UNet predicts."""
    timestep_spacing: Annotated[Literal["", "leading", "trailing"], tyro.conf.arg(metavar="{'',leading,trailing}")] = ""
    """How sampling steps are spread over the schedule."""


@dataclass(frozen=True)
class DataConfig:
    """Pictures and captions."""

    train_data_dir: str = ""
    """Folder of pictures with metadata.jsonl; `asset:emoji` is the one that comes with the package."""
    image_column: str = "file_name"
    """Field of metadata.jsonl that names the picture."""
    caption_column: str = "text"
    """Field of metadata.jsonl that holds the caption."""
    resolution: int = 1024
    """Side of the square that pictures are resized and cropped to; a multiple of 8."""
    center_crop: bool = False
    """Crop the middle instead of a random place; either is recorded in time_ids."""
    random_flip: bool = False
    """Mirror half of the pictures; the recorded crop is mirrored with them."""
    enable_data_shuffling: bool = True
    """Another seeded order each epoch, the same on every host."""
    max_train_samples: int = -1
    """Only the first so many samples; -1 is all."""
    cache_latents_text_encoder_outputs: bool = True
    """Encode pictures and captions once, before training; the encoders then need no accelerator memory."""
    dataset_save_location: str = ""
    """Where that cache lies; '' is the run's folder."""
    transform_images_num_proc: int = 4
    """Threads that read and transform pictures."""
    caption_dropout: float = 0.0
    """Share of samples that train with the encoded empty prompt, for classifier-free guidance; the export then says
    that an absent negative prompt is to be encoded, not zeroed."""
    max_bad_fraction: float = 0.01
    """The run stops when unreadable pictures exceed max(10, this share of all), or are all."""
    hf_access_token: str = field(default="", repr=False)
    """Token for the Hub; '' takes HF_TOKEN from the environment. Never logged or saved."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work."""

    ici_data_parallelism: int = -1
    """Devices that share the batch and hold all weights; one -1 takes the rest."""
    ici_fsdp_parallelism: int = 1
    """Devices that share batch, weights and optimizer state."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    checkpoint_every: int = -1
    """Save at the first step at or past each multiple of so many samples; -1 only at the end."""
    checkpoints_to_keep: int = 2
    """Older ones go."""
    export_dtype: DtypeName = "float16"
    """Dtype of the diffusers folder written at the end."""


@dataclass(frozen=True)
class MetricsConfig:
    """What is reported."""

    write_metrics: bool = True
    """Write TensorBoard events and metrics.jsonl into the run's folder."""
    metrics_file: str = ""
    """One more copy of metrics.jsonl."""
    log_period: int = 100
    """Steps between flushes of TensorBoard, and between lines where there is no terminal for a progress bar."""


@dataclass(frozen=True)
class SampleConfig:
    """Pictures made while training."""

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
    sample_every: int = -1
    """Draw a grid of samples each so many training samples; -1 only at the end."""
    samples_per_grid: int = 4
    """Pictures in a grid; 0 draws none."""
    caption_retrieval: int = 0
    """At the end, draw the first so many captions; report for which share the nearest training picture is their own."""


@dataclass(frozen=True)
class TrainConfig:
    """Train Stable Diffusion XL."""

    run: Annotated[RunConfig, Flat] = RunConfig()
    model: Annotated[ModelConfig, Flat] = ModelConfig()
    optim: Annotated[OptimConfig, Flat] = OptimConfig()
    diffusion_scheduler_config: DiffusionSchedulerConfig = DiffusionSchedulerConfig()
    data: Annotated[DataConfig, Flat] = DataConfig()
    parallel: Annotated[ParallelConfig, Flat] = ParallelConfig()
    checkpoint: Annotated[CheckpointConfig, Flat] = CheckpointConfig()
    metrics: Annotated[MetricsConfig, Flat] = MetricsConfig()
    sample: Annotated[SampleConfig, Flat] = SampleConfig()

    def check(self) -> None:
        """Check everything that needs neither file nor device.

        Raises:
            ValueError: with the flag, its value, the rule and what to do.
        """
        for name, rule, holds in _rules(self):
            if not holds:
                raise ValueError(f"--{name.replace('_', '-')} {flat(self)[name]!r}: {rule}")


def _rules(config: TrainConfig) -> list[tuple[str, str, bool]]:
    """(field, what must hold and the remedy, whether it holds), in the order of the flags."""
    model, optim, data = config.model, config.optim, config.data
    parallel, checkpoint, metrics, sample = config.parallel, config.checkpoint, config.metrics, config.sample

    def whole(n: int) -> bool:
        return n == -1 or n > 0

    name = config.run.run_name
    return [
        ("run_name", "must be a folder name: letters, digits, '.', '_' and '-'", not name or _is_name(name)),
        ("base_output_directory", "must be a local folder", "://" not in config.run.base_output_directory),
        ("output_dir", "must be a local folder", "://" not in config.run.output_dir),
        ("seed", "must be 0 or more and below 2**32", 0 <= config.run.seed < 2**32),
        ("scan_unroll", "must be 1 or more", model.scan_unroll >= 1),
        ("learning_rate", "must be a finite number above 0", 0 < optim.learning_rate < math.inf),
        ("max_train_steps", "must be -1 (from epochs) or above 0", whole(optim.max_train_steps)),
        ("num_train_epochs", "must be above 0", optim.num_train_epochs > 0),
        ("per_device_batch_size", "must be a finite number above 0", 0 < optim.per_device_batch_size < math.inf),
        ("warmup_steps_fraction", "must be from 0 to 1", 0 <= optim.warmup_steps_fraction <= 1),
        (
            "learning_rate_schedule_steps",
            "must be -1 (all steps) or above 0",
            whole(optim.learning_rate_schedule_steps),
        ),
        ("adam_b1", "must be at least 0 and below 1", 0 <= optim.adam_b1 < 1),
        ("adam_b2", "must be at least 0 and below 1", 0 <= optim.adam_b2 < 1),
        ("adam_eps", "must be a finite number above 0", 0 < optim.adam_eps < math.inf),
        ("adam_weight_decay", "must be a finite number, 0 or more", 0 <= optim.adam_weight_decay < math.inf),
        ("max_grad_value", "must be a finite number above 0", 0 < optim.max_grad_value < math.inf),
        ("max_grad_norm", "must be a finite number above 0", 0 < optim.max_grad_norm < math.inf),
        ("ema_decay", "must be at least 0 and below 1", 0 <= optim.ema_decay < 1),
        ("ema_every", "must be 1 or more", optim.ema_every >= 1),
        (
            "train_data_dir",
            "name a folder of pictures with metadata.jsonl, "
            f"or try the bundled one first: python scripts/train.py --config {TINY}",
            bool(data.train_data_dir),
        ),
        ("resolution", "must be a multiple of 8, at least 8", data.resolution >= 8 and data.resolution % 8 == 0),
        ("max_train_samples", "must be -1 (all) or above 0", whole(data.max_train_samples)),
        ("transform_images_num_proc", "must be 1 or more", data.transform_images_num_proc >= 1),
        ("caption_dropout", "must be from 0 to 1", 0 <= data.caption_dropout <= 1),
        ("max_bad_fraction", "must be from 0 to 1", 0 <= data.max_bad_fraction <= 1),
        ("ici_data_parallelism", "must be -1 (the rest) or above 0", whole(parallel.ici_data_parallelism)),
        (
            "ici_fsdp_parallelism",
            "must be -1 (the rest) or above 0, and only one of the ici_ flags may be -1",
            whole(parallel.ici_fsdp_parallelism)
            and not parallel.ici_fsdp_parallelism == parallel.ici_data_parallelism == -1,
        ),
        ("checkpoint_every", "must be -1 (at the end) or above 0, in samples", whole(checkpoint.checkpoint_every)),
        ("checkpoints_to_keep", "must be 1 or more", checkpoint.checkpoints_to_keep >= 1),
        ("log_period", "must be 1 or more", metrics.log_period >= 1),
        ("guidance_scale", "must be a finite number, 0 or more", 0 <= sample.guidance_scale < math.inf),
        ("num_inference_steps", "must be from 1 to 1000", 1 <= sample.num_inference_steps <= 1000),
        ("sample_every", "must be -1 (at the end) or above 0, in samples", whole(sample.sample_every)),
        ("samples_per_grid", "must be 0 or more", sample.samples_per_grid >= 0),
        ("caption_retrieval", "must be 0 or more", sample.caption_retrieval >= 0),
    ]


def _is_name(name: str) -> bool:
    return name == Path(name).name and name not in (".", "..") and all(c.isalnum() or c in "._-" for c in name)


def groups(config: Any) -> dict[str, Any]:
    """The groups of a config by field name."""
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}


def is_flat(group: str) -> bool:
    """Whether the fields of a group are flags of their own (the others keep the group's name before them)."""
    return group != "diffusion_scheduler_config"


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every published name with its value; mappings stay dictionaries. The form of `--config` files.

    The Hub token is left out: it is never saved.
    """
    values: dict[str, Any] = {}
    for name, group in groups(config).items():
        fields = dataclasses.asdict(group)
        values.update(fields if is_flat(name) else {name: fields})
    del values["hf_access_token"]
    return values


def to_yaml(config: TrainConfig) -> str:
    """The resolved config as a file that `--config` reads back."""
    values = flat(config)
    plain = all(value.isprintable() for value in values.values() if isinstance(value, str))
    return yaml.safe_dump(
        values, sort_keys=False, allow_unicode=plain
    )  # unescaped, a control character may read as a space

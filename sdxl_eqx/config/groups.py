"""The groups of a training run's config, one a room: frozen dataclasses whose docstrings `--help` shows."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

import tyro

from sdxl_eqx.arrays import DtypeName

Axes = tuple[str, ...]
"""Axes of the mesh."""

DatasetType = Literal[
    "auto", "hf", "imagefolder", "parquet", "webdataset", "arrayrecord", "tfrecord", "synthetic"
]  # fmt: skip

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
    skip_jax_distributed_system: bool = False
    """Do not start jax.distributed, whatever the environment says."""

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
    """Dtype of the stored parameters; the moving average is float32, the optimizer's moments are of moments_dtype."""
    activations_dtype: DtypeName = "bfloat16"
    """Dtype of the computation; norms, softmax and loss are float32 all the same."""
    precision: Literal["DEFAULT", "HIGH", "HIGHEST"] = "DEFAULT"
    """Precision of every matrix product and convolution."""
    train_new_unet: bool = False
    """Start from a random UNet instead of the model's."""
    new_text_encoders: bool = False
    """Random, frozen text encoders made from the seed, where the model folder has none (the tiny configuration)."""


@dataclass(frozen=True)
class AttentionConfig:
    """How the blocks of the UNet are computed."""

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
    remat_policy: Literal["auto", "none", "dots", "attention", "full", "offload"] = "auto"
    """What the backward pass computes again to save memory: nothing; all but matrix products and convolutions (dots);
    all but attention; everything of each block (full); as dots, but kept in the host's memory (offload). auto takes the
    least that fits the device."""
    scan_unroll: int = 1
    """How many transformer blocks are unrolled in a scan: more compile time, the same result."""


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
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the optimizer keeps its moments; bfloat16 halves their memory, and the second is rounded
    stochastically so that it does not stand still."""
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

    dataset_name: str = ""
    """Data set of the Hub, as NAME or NAME@REVISION."""
    dataset_config_name: str = ""
    """Configuration of that data set, where it has several."""
    train_split: str = "train"
    """Its split, such as train or train[:1000]."""
    hf_data_dir: str = ""
    """Folder inside the Hub's data set."""
    hf_train_files: str = ""
    """Files inside the Hub's data set; * stands for any name."""
    train_data_dir: str = ""
    """Folder (local, gs://, s3://, hf://) of pictures, parquet or arrow files, webdataset tars, ArrayRecord or TFRecord
    files; `asset:emoji` is the one that comes with the package."""
    dataset_type: DatasetType = "auto"
    """auto takes what it finds. tfrecord: latents and text embeddings as MaxDiffusion writes them. synthetic: noise."""
    image_column: str = "image"
    """Column or field of the picture; in metadata.jsonl and metadata.csv `file_name` will do."""
    caption_column: str = "text"
    """Column or field of the caption: a string, a list of which each visit picks one, or either as JSON."""
    resolution: int = 1024
    """Side of the square that pictures are resized and cropped to, a multiple of 8; with buckets the side of the square
    whose area they have about."""
    aspect_ratio_buckets: bool = False
    """Batches of one shape each, as near as may be to their pictures' own: about resolution squared pixels, sides
    multiples of 64."""
    bucket_count: int = 9
    """At most so many shapes; each is compiled once."""
    bucket_upscale: bool = False
    """Enlarge pictures that are smaller than their bucket; otherwise they get smaller buckets."""
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
    caption_shuffle: bool = False
    """Shuffle the comma-separated tags of a caption at each visit; text is then encoded in the step, only latents are
    cached."""
    keep_tokens: int = 0
    """So many first tags stay in their place."""
    caption_chunks: int = 1
    """A prompt may have so many times 75 tokens, encoded in chunks; what is longer is cut."""
    max_bad_fraction: float = 0.01
    """The run stops when unusable samples exceed max(10, this share of all), or are all."""
    reuse_example_batch: bool = False
    """The first batch again and again, to time the step alone."""
    hf_access_token: str = field(default="", repr=False)
    """Token for the Hub; '' takes HF_TOKEN from the environment. Never logged or saved."""


@dataclass(frozen=True)
class ParallelConfig:
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
    data_sharding: Axes = MESH_AXES
    """Axes of the mesh over which a batch is spread as it is read; axes that do not divide it are left out from the
    last one."""
    compile_topology: str = ""
    """Compile the step for devices that are not here (v5p:2x2x1, v5e:16x16, h100x8), report what it needs, and exit."""
    compile_topology_num_slices: int = -1
    """Slices of that topology, for the dcn_ sizes (TPUs); -1 is one."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept."""

    checkpoint_every: int = -1
    """Save at the first step at or past each multiple of so many samples; -1 only at the end."""
    checkpoints_to_keep: int = 2
    """Older ones go."""
    export_dtype: DtypeName = "float16"
    """Dtype of the diffusers folder written at the end."""
    enable_single_replica_ckpt_restoring: bool = False
    """When resuming, one replica reads the checkpoint and broadcasts it to the others along the data axis, instead of
    each reading it."""


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

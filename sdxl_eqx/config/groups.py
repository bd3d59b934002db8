"""The groups of a training run's config, one a room: frozen dataclasses whose docstrings `--help` shows."""

from dataclasses import dataclass, field
from typing import Literal

from sdxl_eqx.arrays import DtypeName
from sdxl_eqx.config.shared import (
    MESH_AXES,
    AttentionKernelConfig,
    Axes,
    MachineConfig,
    MeshConfig,
    ModelSourceConfig,
    PromptConfig,
)

DatasetType = Literal[
    "auto", "hf", "imagefolder", "parquet", "webdataset", "arrayrecord", "tfrecord", "synthetic"
]  # fmt: skip


@dataclass(frozen=True)
class RunConfig(MachineConfig):
    """The run and where it lies."""

    run_name: str = ""
    """Names the run's folder. A name that exists is resumed; '' makes a readable, unique one and starts anew."""
    base_output_directory: str = ""
    """Where runs go, if set; else output_dir."""
    output_dir: str = "outputs"
    """Where runs go; the run's folder is OUTPUT_DIR/RUN_NAME and holds everything of the run."""

    @property
    def root(self) -> str:
        """The folder that holds the runs."""
        return self.base_output_directory or self.output_dir


@dataclass(frozen=True)
class ModelConfig(ModelSourceConfig):
    """The model that is trained."""

    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the stored parameters; the moving average is float32, the optimizer's moments are of moments_dtype."""
    train_new_unet: bool = False
    """Start from a random UNet instead of the model's."""
    norm_num_groups: int = -1
    """Groups of a random UNet's GroupNorms; -1 is what the model's unet/config.json says (SDXL: 32)."""
    new_text_encoders: bool = False
    """Random, frozen text encoders made from the seed, where the model folder has none (the tiny configuration)."""


@dataclass(frozen=True)
class AttentionConfig(AttentionKernelConfig):
    """How the blocks of the UNet are computed."""

    remat_policy: Literal["auto", "none", "dots", "attention", "full", "offload"] = "auto"
    """What the backward pass computes again to save memory: nothing; all but matrix products and convolutions (dots);
    all but attention; everything of each block (full); as dots, but kept in the host's memory (offload). auto takes the
    least that fits the device."""
    scan_unroll: int = 1
    """How many transformer blocks are unrolled in a scan: more compile time, the same result."""


@dataclass(frozen=True)
class QuantizationConfig:
    """Matrix products in 8 bits."""

    quantization: Literal["", "int8", "int8_weights", "fp8"] = ""
    """Multiply in the UNet's transformer stages with so few bits, forward and backward, by qwix; int8_weights rounds
    the weights alone. What is stored and trained keeps weights_dtype."""
    quantization_local_shard_count: int = -1
    """A weight's gradient is summed from so many parts of the batch, each rounded by itself; -1 is one for each slice
    of the devices, 0 does not round for it."""
    use_qwix_quantization: bool = False
    """The same as --quantization int8, where that is not given. It is always by qwix."""

    @property
    def how(self) -> Literal["", "int8", "int8_weights", "fp8"]:
        """What is asked for by either name."""
        return self.quantization or ("int8" if self.use_qwix_quantization else "")

    def shards(self, slices: int) -> int:
        """Parts of the batch on so many slices of devices."""
        return slices if self.quantization_local_shard_count == -1 else self.quantization_local_shard_count


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
    gradient_accumulation_steps: int = 1
    """An update takes so many times as many samples, one part after the other, in the memory of one."""
    optimizer: Literal["adamw", "adafactor", "lion", "prodigy", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's moments in 8 bits; prodigy finds the learning rate, of which learning_rate, best 1, is a
    factor."""
    lr_schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "rex", "piecewise"] = "constant"
    """What follows the warm-up: the peak for ever; a fall to zero at the end of the schedule, straight, as a cosine,
    as lr_num_cycles of them, or slow at first and fast at the end (rex); or the steps of lr_step_rules."""
    lr_num_cycles: int = 1
    """Cycles of cosine_with_restarts."""
    lr_step_rules: str = ""
    """Of piecewise, as diffusers writes them: 1:1000,0.1:2000,0.01 is the peak up to update 1000, a tenth of it up to
    2000, then a hundredth."""
    warmup_steps_fraction: float = 0.0
    """Linear warm-up over this fraction of the schedule."""
    learning_rate_schedule_steps: int = -1
    """Length of the schedule in updates; -1 is all steps."""
    adam_b1: float = 0.9
    """Decay of the first moment (adamw, adamw8bit, lion, prodigy)."""
    adam_b2: float = 0.999
    """Decay of the second moment (adamw, adamw8bit, prodigy); lion's decay of its only one."""
    adam_eps: float = 1e-8
    """Epsilon outside the root (adamw, adamw8bit, prodigy)."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay, of matrices and convolutions, of any optimizer."""
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
    max_nonfinite_steps: int = 10
    """A step whose loss or gradient is not finite changes nothing and is counted; more of them in a row end the run."""


@dataclass(frozen=True)
class LossConfig:
    """The loss, and the noise that it is taken at."""

    snr_gamma: float = -1.0
    """Weigh each timestep by min(SNR, gamma) / SNR (Hang et al. 2023; of velocities by min(SNR, gamma) / (SNR + 1)); 5
    is usual, -1 is off."""
    loss_type: Literal["l2", "huber", "smooth_l1"] = "l2"
    """Of the difference: its square, or one that far outliers pull less on."""
    huber_c: float = 0.1
    """Where huber and smooth_l1 turn from a square into a line, at the noisiest timestep."""
    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    """How that place goes to 1 as the noise goes to nothing (kohya's names)."""
    noise_offset: float = 0.0
    """Noise that is the same for all of a picture's channel, in parts of the usual (Guttenberg 2023); 0.05 is usual."""
    input_perturbation: float = 0.0
    """More noise in the input than the target says (Ning et al. 2023), in parts of the usual; 0.1 is usual."""


@dataclass(frozen=True)
class TimestepBiasConfig:
    """Some timesteps drawn more often than others."""

    strategy: Literal["none", "earlier", "later", "range"] = "none"
    """earlier: the first portion of timesteps, which have least noise; later: the last one; range: begin to end."""
    multiplier: float = 1.0
    """How many times as often."""
    begin: int = 0
    """First timestep of a range."""
    end: int = 1000
    """Last timestep of a range; 1000 is the end."""
    portion: float = 0.25
    """Share of the timesteps of earlier and later."""


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
class ControlNetTrainingConfig:
    """A ControlNet that is trained, and what it sees."""

    train_controlnet: bool = False
    """Train a ControlNet beside the frozen UNet."""
    conditioning_image_column: str = "conditioning_image"
    """Column or field of what the ControlNet sees, a map of any size; in metadata.jsonl and metadata.csv a path, also
    as `conditioning_image_file_name`; in tars a member such as `conditioning_image.png`."""
    controlnet_conditioning_dropout: float = 0.0
    """Share of samples whose map is black."""


@dataclass(frozen=True)
class DreamBoothConfig:
    """A subject learned from a few pictures, beside others of its class (Ruiz et al. 2023)."""

    instance_prompt: str = ""
    """Caption of every picture that has none, such as `a photo of sks dog`; with it a folder needs no captions."""
    class_data_dir: str = ""
    """Folder of pictures of the class, trained on as often as the others, so that the class is not forgotten."""
    class_prompt: str = ""
    """Caption of every picture of class_data_dir that has none, and what is drawn there, such as `a photo of a dog`."""
    prior_loss_weight: float = 1.0
    """Weight of the loss of those pictures; that of the others is 1."""
    num_class_images: int = 100
    """So many pictures of class_data_dir are read; where it holds fewer, the model draws the rest before training."""


@dataclass(frozen=True)
class ParallelConfig(MeshConfig):
    """How the devices share the work."""

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
    tracker: Literal["tensorboard", "wandb"] = "tensorboard"
    """wandb reports to Weights & Biases besides (the extra wandb installs it)."""
    gcs_metrics: bool = False
    """Where the run's folder is on gs://, write a file metrics/metrics_step_000001_to_step_000100.txt of each
    log_period besides, as MaxDiffusion does."""
    save_config_to_gcs: bool = False
    """Where the run's folder is on gs://, write the resolved config as config.yml too, MaxDiffusion's name of it."""
    write_timing_metrics: bool = False
    """Write how long loading, compiling and the first step took."""
    timing_metrics_file: str = ""
    """File of write_timing_metrics; '' is timing.json in the run's folder."""
    enable_profiler: bool = False
    """Record a profile for TensorBoard and xprof."""
    skip_first_n_steps_for_profiler: int = 5
    """Steps before it, counted from where the run starts or resumes."""
    profiler_steps: int = 10
    """Steps that it takes."""


@dataclass(frozen=True)
class SampleConfig(PromptConfig):
    """Pictures made while training."""

    sample_every: int = -1
    """Draw a grid of samples each so many training samples; -1 only at the end."""
    eval_every: int = -1
    """Measure the loss on held-out samples each so many training samples; -1 only at the end."""
    eval_split: str = ""
    """Split of a Hub's data set, or a fraction of the samples below 1, that is held out; '' holds nothing out."""
    samples_per_grid: int = 4
    """Pictures in a grid; 0 draws none."""
    caption_retrieval: int = 0
    """At the end, draw the first so many captions; report for which share the nearest training picture is their own."""

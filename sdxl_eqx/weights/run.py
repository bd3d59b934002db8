"""The checkpoints of a run: what stands beside their arrays, and the UNet in them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

FORMAT = 2
"""Version of the layout of checkpoints."""

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them, one folder a step."""

PARTS = (
    "unet",
    "text_encoder",
    "text_encoder_2",
    "controlnet",
    "unet_lora",
    "text_encoder_lora",
    "text_encoder_2_lora",
)
"""What may train, as a checkpoint has it: a part of the model, or a LoRA of one."""

ITEMS = ("loop", "optimizer", *PARTS, "ema", *(f"ema_{part}" for part in PARTS[1:]))
"""The parts of a state as a checkpoint has them; ema is the UNet's average."""

READ = (1, FORMAT)
"""The versions of checkpoints whose weights are read. With 2, the optimizer's arrays have other names."""


@dataclass(frozen=True)
class Saved:
    """What stands beside the arrays of a checkpoint."""

    unet: dict[str, Any]
    """The UNet's config, as diffusers writes it."""
    ema: bool
    config: dict[str, Any]
    """The run's config, flat."""
    data: dict[str, int]
    """Position in the data: next_batch and batch_size."""
    trains: str = "unet"
    """unet, lora or controlnet."""
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The configs of text encoders that trained beside the UNet, as transformers writes them."""
    frozen: str = ""
    """The fingerprint of the UNet that does not train; empty where it trains, or was new."""
    format: int = FORMAT
    """Version of the layout."""


@dataclass(frozen=True)
class Found:
    """A whole checkpoint of a run."""

    folder: Path
    step: int
    saved: Saved

    def item(self, *, ema: bool) -> Path:
        """The folder of the UNet's arrays: the average's if it has one and `ema`, else the weights'.

        Raises:
            ValueError: where something else trained.
        """
        if self.saved.trains != "unet":
            raise ValueError(
                f"{self.folder}: is of a run that trained a {'LoRA' if self.saved.trains == 'lora' else 'ControlNet'}, "
                "and has no UNet of its own; use what lies in the run's export/."
            )
        return self.folder / ("ema" if ema and self.saved.ema else "unet")

    def beside(self, *, ema: bool) -> dict[str, Path]:
        """The folders of the arrays of what trained beside the UNet, by part; averages as of `item`."""
        start = "ema_" if ema and self.saved.ema else ""
        return {part: self.folder / f"{start}{part}" for part in self.saved.beside}


def find_checkpoint(run: str | Path, *, step: int | None = None) -> Found:
    """The newest whole checkpoint of a run, or that of `step`.

    Raises:
        ValueError: where there is none, naming those that there are.
    """
    folder = (Path(run) / CHECKPOINTS).absolute()
    if not folder.is_dir():
        raise ValueError(f"{run}: has no {CHECKPOINTS}/; give the folder of a run.")
    # Named, or Orbax neither reads the arrays' dtypes nor keeps quiet about the items that are not wanted here.
    handlers = {"meta": ocp.JsonCheckpointHandler(), **{name: ocp.StandardCheckpointHandler() for name in ITEMS}}
    options = ocp.CheckpointManagerOptions(create=False)
    with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
        step = manager.latest_step() if step is None else step
        if step is None or step not in manager.all_steps():
            raise ValueError(f"{folder}: has no checkpoint of step {step}; it has {sorted(manager.all_steps())}.")
        return Found(folder / str(step), step, read_meta(manager, step, folder))


def read_meta(manager: ocp.CheckpointManager, step: int, folder: Path) -> Saved:
    """What stands beside the arrays of a checkpoint.

    Raises:
        ValueError: where it is no checkpoint of this project, or of another version.
    """
    try:
        meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{folder / str(step)}: is no checkpoint of this project ({str(error)[:200]}).") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{folder / str(step)}: is no checkpoint of this project (its meta is no JSON object).")
    if meta.get("format") not in READ:
        raise ValueError(
            f"{folder / str(step)}: has checkpoint format {meta.get('format')}, this version reads {FORMAT}; "
            "use the version that wrote it, or start another --run-name."
        )
    absent = {"unet", "ema", "config", "data"} - meta.keys()
    if absent or not isinstance(meta["unet"], dict) or not isinstance(meta["config"], dict):
        raise ValueError(f"{folder / str(step)}: its meta is damaged; take the checkpoint before it.")
    # Until buckets came, there was a position for each process; a batch a step was read then too.
    data = meta["data"] if isinstance(meta["data"], dict) else {}
    return Saved(
        meta["unet"],
        meta["ema"],
        meta["config"],
        data,
        meta.get("trains", "unet"),
        meta.get("beside", {}),
        meta.get("frozen", ""),
        meta["format"],
    )

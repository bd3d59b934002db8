"""Where a model is written: it appears under its name when it is whole, and what was there stays until then."""

import contextlib
import glob
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

NATIVE = "sdxl_eqx.json"
"""What marks a folder in this project's own layout."""

WRITTEN = (
    "model_index.json", NATIVE, "config.json", "diffusion_pytorch_model.safetensors", "scheduler", "tokenizer",
    "tokenizer_2", "unet", "vae", "text_encoder", "text_encoder_2", "controlnet",
)  # fmt: skip
"""All that a conversion may leave in a folder."""


@contextlib.contextmanager
def appearing(folder: Path, *, overwrite: bool, files: Collection[str] = ()) -> Iterator[Path]:
    """A folder to write into, which takes its name when the block ends well; else nothing of it is left.

    With `overwrite` a model that was there, or `files` of these names, are replaced then, and until then stay.

    Raises:
        ValueError: where something else than a model is to be replaced.
    """
    clear_remains(folder)
    replaced = overwrite and folder.exists()
    stranger = _stranger(folder, files) if replaced else None
    if stranger is not None:
        raise ValueError(
            f"{folder}: holds {stranger.name}, which no conversion wrote, so it is not replaced; give another name, or "
            "take away what is to stay."
        )
    building = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
        if replaced:
            folder.rename(old)
        try:
            building.rename(folder)
        except OSError:
            if replaced:
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _stranger(folder: Path, files: Collection[str]) -> Path | None:
    """Something in a folder that no conversion wrote; None where all of it is a model's, or has one of these names."""
    if not folder.is_dir():
        return folder
    for path in folder.iterdir():
        inside = {inner.name for inner in path.iterdir()} if path.is_dir() else set()
        # A part has its config, or is an item of Orbax; the others have files of their own.
        part = not inside or bool(inside & {"config.json", "_METADATA", "scheduler_config.json"})
        if path.is_file() and path.name in files:
            continue
        if path.name not in WRITTEN or (path.is_dir() and not path.name.startswith("tokenizer") and not part):
            return path
    return None


def clear_remains(path: Path) -> None:
    """Take away what a process that was killed left beside `path`; give back a model that it was just replacing."""
    for remains in path.parent.glob(f".{glob.escape(path.name)}.*.*"):
        pid, _, kind = remains.name.removeprefix(f".{path.name}.").partition(".")
        if kind not in ("part", "old") or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if kind == "old" and not path.exists():
            remains.rename(path)
        elif remains.is_dir() and not remains.is_symlink():
            shutil.rmtree(remains, ignore_errors=True)
        else:
            remains.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True

"""A whole training run in seconds: a small model folder, small pictures, and the means to run, stop and read runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
from sdxl_eqx.diffusion.schedule import ScheduleConfig
from sdxl_eqx.models.clip import CLIPText, CLIPTextConfig
from sdxl_eqx.models.sdxl import SDXL, Encoders
from sdxl_eqx.models.unet import UNet, UNetConfig
from sdxl_eqx.models.vae import VAE, VAEConfig
from sdxl_eqx.weights.folder import write_folder
from sdxl_eqx.weights.names import is_stacked
from sdxl_eqx.weights.run import ITEMS
from sdxl_eqx.weights.write import model_of

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = 12
BROKEN = 5
"""The place of the picture that cannot be read."""

UNET = dataclasses.replace(
    UNetConfig.tiny(),
    block_out_channels=(8, 16),
    heads=(1, 2),
    cross_attention_dim=32,
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=16 + 6 * 4,
    norm_num_groups=2,
)
VAE_CONFIG = dataclasses.replace(VAEConfig.tiny(), block_out_channels=(8, 8), norm_num_groups=2, sample_size=16)
TEXT = dataclasses.replace(CLIPTextConfig.tiny(), hidden_size=16, intermediate_size=32)
TEXT_2 = dataclasses.replace(TEXT, hidden_act="gelu", projection_dim=16)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of a very small SDXL with the real tokenizers; read only."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


def write_model(folder: Path, *, unet: UNetConfig = UNET, vae: VAEConfig = VAE_CONFIG) -> Path:
    """Write such a folder, with another UNet or VAE if it is given."""

    def make(key: Any) -> SDXL:
        encoders = Encoders(CLIPText(TEXT, key=key), CLIPText(TEXT_2, key=key), VAE(vae, key=key))
        return SDXL(UNet(unet, key=key), encoders)

    rng = np.random.default_rng(0)

    def fill(path: Any, x: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if x.ndim - is_stacked(name.replace("[", ".").replace("]", "")) < 2:
            return np.full(x.shape, "norm" in name and name.endswith("weight"), np.float32)
        fan_in = np.prod(x.shape[:3]) if x.ndim == 4 else x.shape[-1]
        return (rng.standard_normal(x.shape) / np.sqrt(fan_in)).astype(np.float32)

    # Filled by NumPy: to compile what draws the weights would take longer than all that the tests do with them.
    shapes = eqx.filter_eval_shape(make, jr.key(0))
    whole = jax.tree_util.tree_map_with_path(fill, shapes)
    tokenizers = partial(save_tokenizers, bundled_tokenizers())
    write_folder(model_of(whole, ScheduleConfig().to_json(), dtype=np.float32), folder, save_tokenizers=tokenizers)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of several sizes, none square, of which one picture is truncated; read only."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(PICTURES):
        size = (20 + 3 * i, 44 - 2 * i)
        coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
        file = folder / f"{i:02d}.png"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file)
        if i == BROKEN:
            file.write_bytes(file.read_bytes()[:100])
        text = f"pattern number {i} of colors"
        lines.append(json.dumps({"file_name": file.name, "text": text, "mask": file.name}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class Ended:
    """A run that came to its end."""

    code: int
    output: str
    folder: Path


@dataclass(frozen=True)
class Trainer:
    """Runs scripts/train.py in a process of its own, on one device."""

    root: Path
    """Of the runs."""
    cache: Path
    """Of what is compiled."""
    home: Path

    def arguments(self, name: str, *more: str) -> list[str]:
        """The flags that say where a run lies and how fast it compiles, and more."""
        return ["--run-name", name, "--output-dir", str(self.root), "--jax-cache-dir", str(self.cache), *more]

    def begin(self, arguments: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        """Start a process that writes all it says into `log`."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(("XLA_", "HF_", "JAX_"))}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles twice as fast
            "HF_HUB_OFFLINE": "1",
            "HOME": str(self.home),
        }
        words = [sys.executable, "scripts/train.py", *arguments]
        with log.open("wb") as file:
            return subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)

    def __call__(self, *arguments: str) -> Ended:
        """Run to the end."""
        log = self.root / f"{time.monotonic_ns()}.log"
        before = self.folders()
        with self.begin(arguments, log) as process:
            code = process.wait(timeout=240)
        return self._ended(code, log, before, arguments)

    def stop(self, number: signal.Signals, after: int, *arguments: str) -> Ended:
        """Send a signal as soon as this process's metrics are past step `after` and a whole checkpoint is there."""
        log = self.root / f"{time.monotonic_ns()}.log"
        before = self.folders()
        folder = self._folder(before, arguments)
        old = _inode(folder)
        with self.begin(arguments, log) as process:
            deadline = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < deadline:
                folder = self._folder(before, arguments)
                # A run that resumes writes a new file, with what is past the checkpoint cut.
                if _inode(folder) != old and folder is not None and last_step(folder) > after and checkpoints(folder):
                    process.send_signal(number)
                    break
                time.sleep(0.002)
            code = process.wait(timeout=240)
        return self._ended(code, log, before, arguments)

    def folders(self) -> set[Path]:
        """The runs that are there."""
        return {path for path in self.root.iterdir() if path.is_dir()}

    def _folder(self, before: set[Path], arguments: Sequence[str]) -> Path | None:
        name = arguments[arguments.index("--run-name") + 1] if "--run-name" in arguments else ""
        if not name and "--config" in arguments and "--run-name" not in arguments:
            name = Path(arguments[arguments.index("--config") + 1]).parent.name
        new = sorted(self.folders() - before)
        return self.root / name if name else new[0] if new else None

    def _ended(self, code: int, log: Path, before: set[Path], arguments: Sequence[str]) -> Ended:
        return Ended(code, log.read_text(), self._folder(before, arguments) or self.root)


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Runs the training script; what one run compiled serves the next."""
    return Trainer(*(tmp_path_factory.mktemp(name) for name in ("runs", "compiled", "home")))


@pytest.fixture(scope="session")
def small(model: Path, pictures: Path) -> tuple[str, ...]:
    """The flags of a small run that uses every part of the state and every random draw of the data."""
    return (
        "--pretrained-model-name-or-path", str(model), "--train-data-dir", str(pictures), "--resolution", "16",
        "--max-train-steps", "100", "--per-device-batch-size", "2", "--checkpoint-every", "50", "--log-period", "20",
        "--learning-rate", "1e-3", "--lr-schedule", "cosine", "--warmup-steps-fraction", "0.1",
        "--opt-enable-grad-global-norm-clipping", "--ema-decay", "0.9", "--ema-every", "2",
        "--random-flip", "--caption-dropout", "0.3", "--activations-dtype", "float32",
        "--samples-per-grid", "0",
    )  # fmt: skip


def last_step(folder: Path) -> int:
    """The newest step of a run's metrics, which a process may be writing."""
    file = folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def checkpoints(folder: Path) -> list[int]:
    """The steps of a run's whole checkpoints."""
    found = (folder / "checkpoints").iterdir() if (folder / "checkpoints").is_dir() else ()
    return sorted(int(path.name) for path in found if path.name.isdigit())


def _inode(folder: Path | None) -> int:
    file = None if folder is None else folder / "metrics.jsonl"
    return file.stat().st_ino if file is not None and file.exists() else 0


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's training steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "learning/loss" in record]


def learning(folder: Path) -> list[dict[str, float]]:
    """What of the metrics follows from the seed."""
    return [{k: v for k, v in record.items() if k == "step" or k.startswith("learning/")} for record in metrics(folder)]


def arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, as it lies on disk."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    handlers = {item: ocp.StandardCheckpointHandler() for item in ITEMS} | {"meta": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder / "checkpoints", options=options, item_handlers=handlers) as manager:
        assert step in manager.all_steps()
        found = {}
        metadata = manager.item_metadata(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        for item in (item for item in ITEMS if (folder / "checkpoints" / str(step) / item).is_dir()):
            like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in dict(metadata[item]).items()}
            read = manager.restore(step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(like)}))[item]
            found |= {f"{item}/{name}": np.asarray(value) for name, value in read.items()}
    return found


def position(folder: Path, step: int) -> Any:
    """The data iterator's position in a checkpoint."""
    with ocp.CheckpointManager(folder / "checkpoints", options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]["data"]

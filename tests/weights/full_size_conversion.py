"""Full-size SDXL through every pair of formats: sha256 of every tensor, peak memory, and seconds beside `cp`.

    python tests/weights/full_size_conversion.py FOLDER [--rounds 3]

needs PyTorch and diffusers (`pip install -e '.[dev]'`), 35 GB of disk in FOLDER and 12 GB of memory. The model is made
by diffusers and transformers with random half-precision weights (7 GB) and stays in FOLDER for the next time.

Memory is RssAnon, sampled: mapped pages do not count. Its limit is 1.5 times the largest tensor of what is read and
written, plus 300 MB, over what the same interpreter takes for its imports. Time is that of the whole process, beside a
copy of the same bytes (`cp --reflink=never` and a sync) just before: the median ratio of all rounds may be 2, or 4
where one side is the native format.
"""

import argparse
import hashlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = {"diffusers": "diffusers", "single-file": "single.safetensors", "native": "native"}
MB = 1e6


@dataclass(frozen=True)
class Ran:
    """A process that ended well."""

    seconds: float
    anonymous: float
    """Most of RssAnon, in bytes."""
    said: str


def run(*words: str, env: dict[str, str] | None = None) -> Ran:
    """Run to the end, and sample the memory on the way.

    Raises:
        RuntimeError: where it fails.
    """
    with tempfile.TemporaryFile("w+") as said:
        began = time.perf_counter()
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT)
        most = 0
        while process.poll() is None:
            most = max(most, anonymous(process.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - began
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {process.returncode}: {text}")
    return Ran(seconds, most, text)


def anonymous(pid: int) -> int:
    """RssAnon of a process, in bytes; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def make(folder: Path) -> None:
    """SDXL base as diffusers and transformers save it, with random weights in half precision."""
    sys.path.insert(0, str(ROOT / "tests"))
    import diffusers
    import parity_published as published
    import torch
    import transformers

    from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
    from sdxl_eqx.diffusion.schedule import ScheduleConfig
    from sdxl_eqx.weights.folder import write_json
    from sdxl_eqx.weights.index import INDEX

    lazy: Any = diffusers
    text: Any = transformers
    torch.manual_seed(0)
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    for part, kind, config in (
        ("unet", lazy.UNet2DConditionModel, published.UNET),
        ("vae", lazy.AutoencoderKL, published.VAE),
        ("text_encoder", text.CLIPTextModel, text.CLIPTextConfig(**published.TEXT)),
        ("text_encoder_2", text.CLIPTextModelWithProjection, text.CLIPTextConfig(**published.TEXT_2)),
    ):
        with torch.device("meta"):
            module = kind(**config) if isinstance(config, dict) else kind(config)
        module = module.to(torch.float16).to_empty(device="cpu")
        for value in module.state_dict().values():
            if value.dtype == torch.float16:
                # Every bit of 16 but a large exponent, so that nothing compresses and nothing is alike.
                bits = torch.randint(-(2**15), 2**15, value.shape, dtype=torch.int16)
                value.copy_((bits & ~0x4000).view(torch.float16))
        module.save_pretrained(building / part, safe_serialization=True, max_shard_size="100GB")
        del module
    write_json(ScheduleConfig().to_json(), building / "scheduler" / "scheduler_config.json")
    write_json(INDEX, building / "model_index.json")
    save_tokenizers(bundled_tokenizers(), building)
    building.rename(folder)


def sums(name: Path) -> dict[str, str]:
    """sha256 of dtype, shape and bytes of every tensor of a model in any format."""
    import numpy as np

    from sdxl_eqx.weights.open import Source, open_model

    found = {}
    for part, tensors in open_model(Source(str(name), "FOLDER")).parts.items():
        for key, tensor in tensors.items():
            x = np.ascontiguousarray(tensor.read())
            digest = hashlib.sha256(f"{x.dtype}{x.shape}".encode())
            digest.update(x.reshape(-1).view(np.uint8).data)
            found[f"{part}.{key}"] = digest.hexdigest()
    return found


def remove(path: Path) -> None:
    """A file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> Ran:
    """The time of a plain copy that is on the disk at its end."""
    return run("sh", "-c", f"cp --reflink=never -r '{source}' '{target}' && sync -f '{target}'")


def conversions(folder: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """Every format to every other, beside a copy of what it read."""
    script = str(ROOT / "scripts" / "convert_weights.py")
    own = run(sys.executable, script, "--help").anonymous
    places = {name: folder / file for name, file in NAMES.items()}
    wanted = sums(places["diffusers"])
    alone, stacked = largest_bytes(places["diffusers"])
    for source, target in sorted(itertools.permutations(NAMES, 2), key=lambda pair: pair[0] != "diffusers"):
        ratios, over, equal = [], 0.0, True
        seconds, copied = [], []
        for i in range(rounds):
            first = i == 0 and not places[target].exists()
            to = places[target] if first else folder / f"again-{NAMES[target]}"
            copied.append(copy(places[source], folder / "copy").seconds)
            remove(folder / "copy")
            ran = run(sys.executable, script, str(places[source]), str(to), "--to", target)
            seconds.append(ran.seconds)
            ratios.append(ran.seconds / copied[-1])
            over = max(over, ran.anonymous - own)
            equal = equal and sums(to) == wanted
            if not first:
                remove(to)
        yield {
            "conversion": f"{source} to {target}",
            "tensors": len(wanted),
            "equal": equal,
            "seconds": [round(x, 1) for x in seconds],
            "cp_seconds": [round(x, 1) for x in copied],
            "times_cp": round(statistics.median(ratios), 2),
            "limit_times_cp": 4 if "native" in (source, target) else 2,
            "peak_anonymous_mb_over_imports": round(over / MB),
            "limit_mb": round((1.5 * (stacked if "native" in (source, target) else alone) + 300e6) / MB),
        }


def largest_bytes(model: Path) -> tuple[int, int]:
    """(largest tensor of a file, largest array of the native format, which has the blocks of a stage in one)."""
    from sdxl_eqx.weights.open import Source, open_model
    from sdxl_eqx.weights.skeletons import skeleton_places

    opened = open_model(Source(str(model), "FOLDER"))
    alone = max(tensor.nbytes for tensors in opened.parts.values() for tensor in tensors.values())
    stacked = max(
        sum(opened.parts[part][key].nbytes for key in place.keys)
        for part in opened.parts
        for place in skeleton_places(part, opened.configs[part])
    )
    return alone, stacked


IMPORTS = """
import sys
import jax
import jax.random as jr
from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig, ParallelConfig
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.parallel.mesh import make_mesh
from sdxl_eqx.parallel.specs import Layout
layout = Layout(make_mesh(ParallelConfig(ici_fsdp_parallelism=8), jax.devices()))
"""
LOAD = """
config = ModelConfig(pretrained_model_name_or_path=sys.argv[1], weights_dtype="bfloat16")
unet = ModelParts.read(config, DiffusionSchedulerConfig(), token="").new_unet(config, layout, key=jr.key(0))
jax.block_until_ready(unet)
print(sum(shard.data.nbytes for x in jax.tree.leaves(unet) for shard in x.addressable_shards))
"""


def loading(folder: Path) -> Iterator[dict[str, Any]]:
    """The UNet onto 8 devices that share it, from each format: memory beside what the devices hold."""
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    own = run(sys.executable, "-c", IMPORTS, env=env).anonymous
    for name, file in NAMES.items():
        ran = run(sys.executable, "-c", IMPORTS + LOAD, str(folder / file), env=env)
        held = int(ran.said.split()[-1])
        yield {
            "loading": f"{name} onto 8 devices, bfloat16",
            "seconds": round(ran.seconds, 1),
            "devices_hold_mb": round(held / MB),
            "peak_anonymous_mb_over_that_and_imports": round((ran.anonymous - own - held) / MB),
        }


def main() -> int:
    """Make the model if it is not there, convert, compare; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("single-file", "native"):
        remove(folder / NAMES[name])
    if not (folder / NAMES["diffusers"]).exists():
        make(folder / NAMES["diffusers"])
    broken = []
    for row in conversions(folder, arguments.rounds):
        print(json.dumps(row), flush=True)
        slow = row["times_cp"] > row["limit_times_cp"]
        if slow or not row["equal"] or row["peak_anonymous_mb_over_imports"] > row["limit_mb"]:
            broken.append(row["conversion"])
    for row in loading(folder):
        print(json.dumps(row), flush=True)
    print(f"broken: {', '.join(broken)}" if broken else "every limit holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

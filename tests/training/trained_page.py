"""What each kind of training draws after a short run on real pictures, on one page to look at.

    python tests/training/trained_page.py FOLDER OUTPUT

FOLDER is that of `tests/data/real_sets.py`, which fetches the 1,852 emoji and writes them as an image folder. A small
model is trained on the bundled pictures first (the README's main job), and the others go on from its export: adapters,
text encoders and 8 bits on animals that it has not seen, DreamBooth on one of them beside a class that it draws itself,
a ControlNet on the Canny edges of the bundled pictures. Each is the command that a user would give, on the CPU; what
was run before is not run again. The runs, their logs and trained.png lie in OUTPUT. It ends with exit code 1 where a
run fails.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLED = ROOT / "sdxl_eqx" / "assets" / "emoji"
GRID, GAP = 280, 24
"""Pixels: the side of a grid on the page, and what lies between two."""

LORA = ("--lora-rank", "16", "--lora-targets", "attention", "feed_forward", "convolution", "--learning-rate", "2e-3")


@dataclass(frozen=True)
class Kind:
    """A run: its data set's folder and its flags."""

    name: str
    data: str
    flags: tuple[str, ...]


KINDS = (
    Kind("whole UNet", "animals", ("--learning-rate", "1e-3")),
    Kind("int8", "animals", ("--learning-rate", "1e-3", "--quantization", "int8")),
    Kind("text encoders", "animals",
         ("--learning-rate", "1e-3", "--train-text-encoder", "--text-encoder-learning-rate", "1e-4")),
    Kind("LoRA", "animals", LORA),
    Kind("LoRA of text encoders too", "animals",
         (*LORA, "--train-text-encoder", "--text-encoder-learning-rate", "1e-3")),
    Kind("DoRA", "animals", (*LORA, "--use-dora", "--use-rslora", "--lora-alpha", "4")),
    Kind("LoRA of an int8 base", "animals", (*LORA, "--int8-base")),
    Kind("DreamBooth", "subject",
         (*LORA, "--instance-prompt", "a 3d emoji of sks", "--class-prompt", "a 3d emoji", "--num-class-images", "8",
          "--prompt", "a 3d emoji of sks")),
    Kind("ControlNet", "edges", ("--train-controlnet", "--learning-rate", "1e-3")),
)  # fmt: skip


def make_animals(pictures: Path, folder: Path, count: int = 16) -> None:
    """An image folder of so many animals."""
    lines = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    write_folder(folder, [(pictures / line["file_name"], line["text"][0], None) for line in lines
                          if "animals & nature" in line["text"][0]][:count])  # fmt: skip


def make_subject(animals: Path, folder: Path) -> None:
    """An image folder of one animal."""
    (first, *_) = sorted(path for path in animals.iterdir() if path.suffix != ".jsonl")
    folder.mkdir(parents=True)
    (folder / first.name).write_bytes(first.read_bytes())


def make_edges(folder: Path) -> None:
    """The bundled pictures and their edges."""
    items = []
    for line in (BUNDLED / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        text = entry["text"] if isinstance(entry["text"], str) else entry["text"][0]
        picture = Image.open(BUNDLED / entry["file_name"]).convert("RGBA")
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
        items.append((BUNDLED / entry["file_name"], text, cv2.Canny(np.asarray(white), 100, 200)))
    write_folder(folder, items)


def write_folder(folder: Path, items: Sequence[tuple[Path, str, np.ndarray | None]]) -> None:
    """Pictures, captions and maps as `--train-data-dir` reads them."""
    (folder / "maps").mkdir(parents=True)
    lines = []
    for picture, text, edges in items:
        (folder / picture.name).write_bytes(picture.read_bytes())
        line = {"file_name": picture.name, "text": text}
        if edges is not None:
            line["conditioning_image_file_name"] = f"maps/{picture.stem}.png"
            Image.fromarray(edges).convert("RGB").save(folder / "maps" / f"{picture.stem}.png")
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train(name: str, words: Sequence[str], output: Path) -> Path:
    """Run to the end and return the newest grid that the run drew.

    Raises:
        RuntimeError: the run fails.
    """
    log = output / f"{name}.log"
    command = [sys.executable, "scripts/train.py", "--run-name", name, "--output-dir", str(output), *words]
    with log.open("a") as file:
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=file, stderr=file, check=False
        ).returncode
    if code:
        raise RuntimeError(f"{name}: exit code {code}; see {log}")
    return max((output / name / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)


def main() -> int:
    """All runs, and the page of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, help="to go on from, in place of one that is trained for it")
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    pictures, output = asked.folder.absolute() / "emoji-imagefolder", asked.output.absolute()
    if not pictures.is_dir():
        parser.error(f"{pictures}: not there; python tests/data/real_sets.py {asked.folder} makes it")
    data = output / "data"
    if not data.is_dir():
        make_animals(pictures, data / "animals")
        make_subject(data / "animals", data / "subject")
        make_edges(data / "edges")
    grids = [] if asked.model else [("base", train("base", ["--config", "configs/tiny.yaml"], output))]
    model = asked.model.absolute() if asked.model else output / "base" / "export"
    shared = [
        "--pretrained-model-name-or-path", str(model), "--resolution", "64",
        "--activations-dtype", "float32", "--per-device-batch-size", "16", "--max-train-steps", str(asked.steps),
        "--warmup-steps-fraction", "0.05", "--opt-enable-grad-global-norm-clipping", "--samples-per-grid", "16",
        "--no-do-classifier-free-guidance", "--num-inference-steps", "25", "--jax-cache-dir", str(output / "compiled"),
    ]  # fmt: skip
    for kind in KINDS:
        flags = ["--class-data-dir", str(output / "class")] if kind.name == "DreamBooth" else ["--prompt", ""]
        words = [*shared, "--train-data-dir", str(data / kind.data), *kind.flags, *flags]
        grids.append((kind.name, train(kind.name.replace(" ", "-"), words, output)))
        print(kind.name, grids[-1][1], flush=True)
    draw(grids, output / "trained.png")
    return 0


def draw(grids: Sequence[tuple[str, Path]], file: Path, columns: int = 5) -> None:
    """All grids with their names."""
    rows = -(-len(grids) // columns)
    page = Image.new("RGB", (columns * (GRID + GAP) + GAP, rows * (GRID + 2 * GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(15)
    for i, (name, path) in enumerate(grids):
        x, y = GAP + i % columns * (GRID + GAP), GAP + i // columns * (GRID + 2 * GAP)
        pen.text((x, y), name, fill="black", font=font)
        page.paste(Image.open(path).convert("RGB").resize((GRID, GRID), Image.Resampling.LANCZOS), (x, y + GAP))
    page.save(file)


if __name__ == "__main__":
    sys.exit(main())

"""Real pictures with captions, fetched from the registries of npm and Debian into a folder, once."""

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from sources.written_sets import Sample

PACKAGES = {"@lobehub/fluent-emoji-3d": "1.1.0", "unicode-emoji-json": "0.9.0"}
STAMPS = "tuxpaint-stamps-default"


def shell(folder: Path, *words: str) -> None:
    """Run in a folder.

    Raises:
        RuntimeError: it fails, or is not there.
    """
    if shutil.which(words[0]) is None:
        raise RuntimeError(f"{words[0]} is not there, which {' '.join(words)} needs")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr}")


def unpacked(folder: Path, package: str) -> Path:
    """The folder of a package of npm, fetched if it is not there."""
    place = folder / package.rpartition("/")[2]
    if not place.exists():
        shell(folder, "npm", "pack", f"{package}@{PACKAGES[package]}")
        name = f"{package.removeprefix('@').replace('/', '-')}-{PACKAGES[package]}.tgz"
        with tarfile.open(folder / name) as tar:
            tar.extractall(place.with_name(f".{place.name}"), filter="data")
        place.with_name(f".{place.name}").rename(place)
    return place / "package"


def without_selectors(codes: Sequence[str]) -> str:
    """Code points in hexadecimal as a key, less the one that asks for the coloured form."""
    return "-".join(code for code in codes if code != "fe0f")


def emoji(folder: Path) -> list[Sample]:
    """The emoji that have a picture, over white, with their names as captions."""
    pictures = unpacked(folder, "@lobehub/fluent-emoji-3d") / "assets"
    files = {without_selectors(path.stem.split("-")): path for path in pictures.glob("*.webp")}
    names = json.loads((unpacked(folder, "unicode-emoji-json") / "data-by-emoji.json").read_text(encoding="utf-8"))
    found: list[Sample] = []
    for letters, about in names.items():
        key = without_selectors([f"{ord(letter):04x}" for letter in letters])
        if key in files:
            file = io.BytesIO()
            over_white(Image.open(files[key])).resize((256, 256)).save(file, "JPEG", quality=90)
            caption = f"a 3d emoji of {about['name']}, {about['group'].lower()}"
            found.append(Sample(f"{key}.jpg", file.getvalue(), (caption,)))
    return found


def over_white(image: Image.Image) -> Image.Image:
    """RGB, transparency over white."""
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def stamps(folder: Path) -> Path:
    """The pictures that have a text, each with it, in the folders that they come in."""
    place, building = folder / "stamps", folder / ".stamps"
    if not place.exists():
        (folder / "debian").mkdir(exist_ok=True)
        if not list((folder / "debian").glob("*.deb")):
            shell(folder / "debian", "apt-get", "download", STAMPS)
        (package,) = (folder / "debian").glob("*.deb")
        shell(folder, "dpkg-deb", "-x", str(package), str(folder / "debian"))
        shutil.rmtree(building, ignore_errors=True)
        root = folder / "debian" / "usr" / "share" / "tuxpaint" / "stamps"
        for picture in root.rglob("*.png"):
            text = picture.with_suffix(".txt")
            if text.exists():
                target = building / picture.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(picture, target)
                shutil.copy(text, target.with_suffix(".txt"))
        building.rename(place)
    return place

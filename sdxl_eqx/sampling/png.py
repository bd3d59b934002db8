"""Pictures as PNG files that say how they were made, and the names of those files."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from sdxl_eqx.data.pictures import MAX_PIXELS
from sdxl_eqx.data.sources.files import whole_file
from sdxl_eqx.sampling.parameters import Parameters, parse_parameters, write_parameters

PARAMETERS = "parameters"
"""The keyword of the text that A1111, Forge, Civitai and others read."""

SETTINGS = "sdxl_eqx"
"""The keyword of our own settings, in JSON."""

_SECRET = re.compile(r"(^|[_-])(token|password|secret|api[_-]?key|authorization|cookie)s?$", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s\"'<>]+", re.IGNORECASE)


def save_png(
    picture: UInt8[np.ndarray, "H W 3"], file: Path, parameters: Parameters | None, settings: Mapping[str, Any]
) -> None:
    """Write a picture; it appears under its name when it is whole. `parameters` is None for a sheet of several.

    `settings` are kept as JSON beside A1111's text, without tokens and passwords (by their keys) and without what a
    URL holds besides its host and path.
    """
    info = PngInfo()
    if parameters is not None:
        info.add_text(PARAMETERS, _encodable(write_parameters(parameters)))  # iTXt where Latin-1 has no such letters
    info.add_text(SETTINGS, json.dumps(_public(settings)))
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as partial:
        Image.fromarray(picture).save(partial, "PNG", pnginfo=info)


def read_parameters(file: Path) -> Parameters:
    """How a picture was made, by its file: ours, or one of another program that writes A1111's text.

    Raises:
        ValueError: it is no PNG, or holds no such text.
    """
    text = _text(file, PARAMETERS)
    try:
        return parse_parameters(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def read_settings(file: Path) -> dict[str, Any]:
    """The settings that `save_png` kept.

    Raises:
        ValueError: it is no PNG, or not one of ours.
    """
    try:
        return json.loads(_text(file, SETTINGS))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its text {SETTINGS!r} is no JSON ({error})") from error


def next_number(folder: Path, prefix: str = "") -> int:
    """One more than the highest number in names `{prefix}NNNNN-...` or `{prefix}NNNNN.*` of a folder; 0 in a new one
    (A1111's `get_next_sequence_number`)."""
    pattern = re.compile(re.escape(prefix) + r"([0-9]+)[-.]")
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1) + 1


def picture_file(folder: Path, number: int, seed: int) -> Path:
    """`NNNNN-SEED.png`."""
    return folder / f"{number:05d}-{seed}.png"


def grid_file(folder: Path) -> Path:
    """`grid-NNNN.png`, after the highest that is there."""
    return folder / f"grid-{next_number(folder, 'grid-'):04d}.png"


def _encodable(text: str) -> str:
    """Text that UTF-8 can hold: a lone half of a surrogate pair becomes `?`, and NUL, which ends a PNG's text, goes."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def _public(value: Any) -> Any:
    """Settings as JSON can hold them, without what nobody else may see."""
    if isinstance(value, Mapping):
        kept = {str(key): inner for key, inner in value.items()}
        # A number under such a key counts tokens of a text.
        return {k: _public(v) for k, v in kept.items() if isinstance(v, int) or not _SECRET.search(k)}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    if isinstance(value, str):
        return _URL.sub(lambda url: bare_url(url[0]), value)
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def bare_url(url: str) -> str:
    """A URL without user, password, query and fragment, any of which can let somebody in."""
    scheme, _, rest = url.partition("://")
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _text(file: Path, keyword: str) -> str:
    """A text chunk of a PNG."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} must be at most {MAX_PIXELS} pixels")
            text = image.info.get(keyword)
            # Texts may also follow the pixels, which then have to be read.
            if text is None and isinstance(image, PngImageFile):
                text = image.text.get(keyword)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{file}: cannot be read as a PNG ({error})") from error
    if not isinstance(text, str):
        raise ValueError(f"{file}: holds no text {keyword!r}; give a picture that was saved with how it was made")
    return str(text)

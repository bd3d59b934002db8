"""Pictures that steer a picture: fetched with care, read as data is, and sized as diffusers sizes them."""

import string
import time
import urllib.error
import urllib.request
from functools import partial
from http.client import HTTPException, HTTPResponse
from urllib.parse import quote, urljoin, urlsplit

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from sdxl_eqx import __version__
from sdxl_eqx.data.bad import BadSample
from sdxl_eqx.data.pictures import MAX_PIXELS, Size, picture_size, read_picture
from sdxl_eqx.data.sources.files import Files
from sdxl_eqx.sampling.png import bare_url

MAX_BYTES = 64 << 20
"""Of a picture's file."""

MAX_REDIRECTS = 5

_BLOCK = 1 << 16


def open_image(
    where: str,
    *,
    what: str = "--controlnet-image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    timeout: float = 30.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """sRGB pixels of a picture, upright by its EXIF orientation, transparency over white.

    Args:
        where: a path, local, gs://, s3:// or hf://, or an http(s) URL. Nobody's credentials are sent to a URL, and
            messages show none and no query.
        what: the flag that names it, for errors.
        timeout: seconds that a server may take for an answer, and again for all of the picture.

    Raises:
        ValueError: it cannot be had, is larger than `max_bytes` or `max_pixels`, or is no picture.
    """
    if where.lower().startswith(("http://", "https://")):
        shown = bare_url(where)
        data, kind = _download(where, f"{what} {shown}", max_bytes, timeout)
    else:
        shown = where[:200]
        data, kind = _contents(where, f"{what} {shown}", max_bytes), ""
    try:
        h, w = picture_size(lambda n: data if n < 0 else data[:n], shown)
        if h * w > max_pixels:
            raise ValueError(f"{what} {shown}: {w}x{h} is more than {max_pixels} pixels; scale it down")
        return read_picture(data, shown).pixels
    except BadSample as error:
        # Servers send pages where they have no picture.
        said = f" (the server calls it {kind})" if kind else ""
        raise ValueError(f"{what} {shown}: is no picture that can be read{said}: {error.reason}") from error


def open_mask(
    where: str,
    *,
    what: str = "--mask-image",
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    timeout: float = 30.0,
) -> UInt8[np.ndarray, "H W"]:
    """A mask in levels of grey, of which white is to be painted anew; arguments and errors as `open_image` has them."""
    picture = open_image(where, what=what, max_bytes=max_bytes, max_pixels=max_pixels, timeout=timeout)
    return np.array(Image.fromarray(picture).convert("L"))


def canny(picture: UInt8[np.ndarray, "H W 3"], low: int = 100, high: int = 200) -> UInt8[np.ndarray, "H W 3"]:
    """White edges on black, as diffusers' ControlNet examples make them with OpenCV.

    Raises:
        ValueError: the thresholds are not in order.
    """
    if not 0 <= low <= high:
        raise ValueError(f"thresholds of Canny edges must be 0 <= low <= high, not {low} and {high}")
    edges = cv2.Canny(np.ascontiguousarray(picture), low, high)
    return np.repeat(edges[:, :, None], 3, axis=2)


def fit(picture: UInt8[np.ndarray, "h w *c"], size: Size) -> UInt8[np.ndarray, "H W *c"]:
    """A picture or mask at (height, width), whatever its ratio (diffusers' `VaeImageProcessor.resize`, Lanczos)."""
    height, width = size
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def control_pixels(picture: UInt8[np.ndarray, "h w 3"], size: Size) -> Float32[np.ndarray, "H W 3"]:
    """What a ControlNet sees: [0, 1] (diffusers' `VaeImageProcessor.preprocess` with do_normalize=False)."""
    return fit(picture, size).astype(np.float32) / 255.0


def init_pixels(picture: UInt8[np.ndarray, "h w 3"], size: Size) -> Float32[np.ndarray, "H W 3"]:
    """What the autoencoder encodes: [-1, 1] (diffusers' `VaeImageProcessor.preprocess`)."""
    return 2.0 * control_pixels(picture, size) - 1.0


def mask_pixels(mask: UInt8[np.ndarray, "h w"], size: Size) -> Float32[np.ndarray, "H W 1"]:
    """1 where half or more of white is, to be painted anew, else 0 (diffusers' `preprocess` with do_binarize)."""
    return (fit(mask, size).astype(np.float32) / 255.0 >= 0.5).astype(np.float32)[:, :, None]


def _contents(path: str, name: str, max_bytes: int) -> bytes:
    """A file's bytes."""
    try:
        data = Files().read(path, 0, max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "strerror", None) or error)[:300]
        raise ValueError(f"{name}: cannot be read ({reason}); give a path or an http(s) URL") from error
    if len(data) > max_bytes:
        raise ValueError(f"{name}: {_too_big(max_bytes)}")
    return data


def _too_big(max_bytes: int) -> str:
    return f"is larger than {max_bytes} bytes; give a smaller file"


def _check(url: str) -> None:
    """Raises ValueError where a URL is none that is asked."""
    parts = urlsplit(url)
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise ValueError(f"leads to {bare_url(url)[:200]}, which is no URL of http(s); give another")
    if "@" in parts.netloc:
        raise ValueError("leads to a URL with a user or password in it, which are not sent; give another")


def _opener() -> urllib.request.OpenerDirector:
    """What opens http(s), and neither files nor FTP, through the proxy of the environment; no cookies, no .netrc."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    opener.addheaders = [("User-Agent", f"sdxl_eqx/{__version__}"), ("Accept", "image/*")]
    return opener


def _download(url: str, name: str, max_bytes: int, timeout: float) -> tuple[bytes, str]:
    """(bytes, content type) of a URL."""
    opener = _opener()
    try:
        url = quote(url, safe=string.punctuation)
        for _ in range(MAX_REDIRECTS + 1):
            _check(url)
            try:
                with opener.open(url, timeout=timeout) as response:
                    kind = response.headers.get_content_type() if response.headers.get("Content-Type") else ""
                    return _body(response, max_bytes, timeout), kind
            except urllib.error.HTTPError as error:
                with error:  # it holds the connection, of which no more is read
                    target = error.headers.get("Location") if error.code in (301, 302, 303, 307, 308) else None
                if target is None:
                    raise ValueError(f"the server answers {error.code}; give another URL or a path") from None
                url = urljoin(url, quote(target, safe=string.punctuation, encoding="latin-1"))
        raise ValueError(f"leads on more than {MAX_REDIRECTS} times; give the URL of the picture itself")
    except (OSError, HTTPException) as error:
        # From None: what urllib says can hold the whole URL.
        reason = getattr(error, "reason", None) or error
        kind = f"took longer than {timeout} s" if isinstance(reason, TimeoutError) else type(reason).__name__
        raise ValueError(f"{name}: cannot be fetched ({kind}); check the connection, or give a path") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _body(response: HTTPResponse, max_bytes: int, timeout: float) -> bytes:
    """All of an answer, whatever length it claims."""
    if response.length is not None and response.length > max_bytes:
        raise ValueError(_too_big(max_bytes))
    data = bytearray()
    end = time.monotonic() + timeout
    # One read of the socket at a time, so that a server that drips is seen to be late.
    for block in iter(partial(response.read1, _BLOCK), b""):
        data += block
        if len(data) > max_bytes:
            raise ValueError(_too_big(max_bytes))
        if time.monotonic() > end:
            raise TimeoutError
    if response.length:
        raise ValueError(f"only {len(data)} of {len(data) + response.length} bytes came; start again")
    return bytes(data)

"""Pictures that steer: fetched within bounds from a server that misbehaves, and made ready as diffusers does."""

import http.server
import io
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_eqx.sampling.control_image import (
    canny,
    control_pixels,
    fit,
    init_pixels,
    mask_pixels,
    open_image,
    open_mask,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


PICTURE = encoded(PIXELS)

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


def reply(body: bytes, kind: str = "image/png", status: int = 200, **headers: str) -> Answer:
    """An answer with that body; a header given as '' is left out."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        said = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in {**said, **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            if value:
                handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def endless(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Claims no length and sends until nobody listens."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def dripping(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Sends a byte so often that no single wait is long."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.05)


def silent(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Says nothing for a while."""
    time.sleep(1)


class Server:
    """What it answers, and what it was asked."""

    def __init__(self) -> None:
        self.answer: Answer = reply(PICTURE)
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.url = ""


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            try:
                server.answer(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the other side has heard enough

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listening.server_address[1]}"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running.answer, running.asked = reply(PICTURE), []
    return running


def failure(where: str, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        open_image(where, **options)
    assert caught.value.__cause__ is None or "s3cret" not in str(caught.value.__cause__)
    return str(caught.value)


def test_a_file_is_read_upright_and_over_white(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "turned.png").write_bytes(encoded(PIXELS, exif=exif))
    np.testing.assert_array_equal(open_image(str(tmp_path / "turned.png")), np.rot90(PIXELS, -1))
    clear = np.dstack([PIXELS, np.zeros((6, 10, 1), np.uint8)])
    (tmp_path / "clear.png").write_bytes(encoded(clear))
    assert (open_image(str(tmp_path / "clear.png")) == 255).all()


def test_a_path_of_fsspec_is_read():
    import fsspec

    with fsspec.open("memory://control/one.png", "wb") as file:
        file.write(PICTURE)  # pyright: ignore[reportAttributeAccessIssue]  it is a file
    np.testing.assert_array_equal(open_image("memory://control/one.png"), PIXELS)


def test_a_url_is_fetched_and_nothing_is_told_to_the_server(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    np.testing.assert_array_equal(open_image(f"{server.url}/a.png?sig=1"), PIXELS)
    ((path, headers),) = server.asked
    assert path == "/a.png?sig=1"
    assert headers.keys() == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert "s3cret" not in str(headers)


def test_a_redirect_is_followed(server: Server):
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        at_end = handler.path == "/5"
        n = int(handler.path[1:])
        (reply(PICTURE) if at_end else reply(b"", status=302, Location=f"/{n + 1}"))(handler)

    server.answer = answer
    np.testing.assert_array_equal(open_image(f"{server.url}/0"), PIXELS)
    assert len(server.asked) == 6


def test_redirects_come_to_an_end(server: Server):
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        reply(b"", status=302, Location=f"/{len(server.asked)}?s3cret")(handler)

    server.answer = answer
    assert "leads on more than 5 times" in failure(f"{server.url}/a.png")
    assert len(server.asked) == 6


def test_what_comes_with_a_redirect_is_not_read(server: Server):
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        if handler.path == "/b":
            return reply(PICTURE)(handler)
        handler.send_response(302)
        handler.send_header("Location", "/b")
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(1 << 16))

    server.answer = answer
    np.testing.assert_array_equal(open_image(f"{server.url}/a"), PIXELS)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/a.png", "data:image/png;base64,AA=="])
def test_a_redirect_leads_to_nothing_but_http(server: Server, target: str):
    server.answer = reply(b"", status=302, Location=target)
    assert "is no URL of http(s)" in failure(f"{server.url}/a.png")
    assert len(server.asked) == 1


def test_a_redirect_with_a_password_is_not_followed(server: Server):
    server.answer = reply(b"", status=302, Location=f"http://me:s3cret@{server.url[7:]}/b")
    said = failure(f"{server.url}/a.png")
    assert "user or password" in said
    assert "s3cret" not in said
    assert len(server.asked) == 1


def test_a_url_with_a_password_is_refused_and_not_shown(server: Server):
    said = failure(f"http://me:s3cret@{server.url[7:]}/a.png?s3cret", what="--init-image")
    assert said.startswith(f"--init-image {server.url}/a.png: ")
    assert "user or password" in said
    assert "s3cret" not in said
    assert not server.asked


@pytest.mark.parametrize("length", [str(len(PICTURE) + 1000), "", "10"], ids=["honest", "missing", "lying"])
def test_a_file_that_is_too_large_is_not_taken(server: Server, length: str):
    server.answer = reply(PICTURE + bytes(1000), Content_Length=length)
    said = failure(f"{server.url}/a.png", max_bytes=len(PICTURE) + 100)
    # Where ten bytes are announced, no more are read.
    assert ("is no picture" if length == "10" else "is larger than") in said


def test_a_file_that_is_announced_as_too_large_is_not_waited_for(server: Server):
    server.answer = reply(PICTURE, Content_Length="1000000000")
    assert "is larger than" in failure(f"{server.url}/a.png")


def test_a_server_that_never_ends_is_left(server: Server):
    server.answer = endless
    assert "is larger than 1000000 bytes" in failure(f"{server.url}/a.png", max_bytes=1_000_000)


@pytest.mark.parametrize("answer", [dripping, silent])
def test_a_server_that_takes_its_time_is_left(server: Server, answer: Answer):
    server.answer = answer
    start = time.monotonic()
    assert "cannot be fetched (took longer than 0.3 s)" in failure(f"{server.url}/a.png", timeout=0.3)
    assert time.monotonic() - start < 5


def test_a_file_that_was_cut_off_is_named(server: Server):
    server.answer = reply(PICTURE[:-50], Content_Length=str(len(PICTURE)))
    assert f"only {len(PICTURE) - 50} of {len(PICTURE)} bytes came" in failure(f"{server.url}/a.png")


@pytest.mark.parametrize("status", [403, 404, 500])
def test_what_a_server_refuses_is_named_without_its_query(server: Server, status: int):
    server.answer = reply(b"no", status=status)
    said = failure(f"{server.url}/a.png?sig=s3cret#s3cret")
    assert said.startswith(f"--controlnet-image {server.url}/a.png: the server answers {status}")
    assert "s3cret" not in said


def test_a_page_is_no_picture(server: Server):
    server.answer = reply(b"<html>s3cret</html>", kind="text/html; charset=utf-8")
    said = failure(f"{server.url}/a.png")
    assert "no picture" in said
    assert "the server calls it text/html" in said


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a b.png?s3cret", "http://127.0.0.1:x/?s3cret", "http://[/?s3cret"])
def test_a_url_where_nobody_answers_is_named(url: str):
    said = failure(url)
    assert said.startswith(f"--controlnet-image {url.partition('?')[0]}: ")
    assert "s3cret" not in said


def test_nothing_is_logged_of_a_query(server: Server, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.DEBUG):
        open_image(f"{server.url}/a.png?sig=s3cret")
        server.answer = reply(b"x")
        failure(f"{server.url}/a.png?sig=s3cret")
    assert "s3cret" not in caplog.text


def test_files_that_are_missing_too_large_or_no_pictures_are_named(tmp_path: Path):
    file = tmp_path / "one.png"
    assert "one.png: cannot be read (" in failure(str(file))
    file.write_bytes(b"some text")
    assert "one.png: is no picture that can be read: " in failure(str(file))
    file.write_bytes(PICTURE)
    assert "is larger than 20 bytes" in failure(str(file), max_bytes=20)
    assert "10x6 is more than 59 pixels" in failure(str(file), max_pixels=59)
    assert open_image(str(file), max_bytes=len(PICTURE), max_pixels=60).shape == (6, 10, 3)
    assert "nothing reads nosuch://" in failure("nosuch://one.png")
    assert len(failure("data:image/png;base64," + "A" * 9999)) < 600


def test_a_mask_is_grey(tmp_path: Path):
    (tmp_path / "mask.png").write_bytes(encoded(PIXELS))
    mask = open_mask(str(tmp_path / "mask.png"))
    np.testing.assert_array_equal(mask, np.array(Image.fromarray(PIXELS).convert("L")))
    with pytest.raises(ValueError, match=r"--mask-image .*none\.png"):
        open_mask(str(tmp_path / "none.png"))


def test_edges_are_where_levels_jump():
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, 8:] = 200
    edges = canny(picture)
    assert edges.shape == (16, 16, 3)
    assert (edges[2:-2, 7:9].max(axis=(1, 2)) == 255).all()
    assert not edges[:, :6].any()
    assert not edges[:, 10:].any()
    assert not canny(picture // 20).any()
    assert canny(picture // 20, 10, 20).any()


@pytest.mark.parametrize("low, high", [(-1, 5), (6, 5)])
def test_thresholds_have_an_order(low: int, high: int):
    with pytest.raises(ValueError, match="0 <= low <= high"):
        canny(PIXELS, low, high)


def test_ranges_and_sizes():
    picture = np.full((8, 8, 3), 255, np.uint8)
    picture[:4] = 0
    for function, lowest in ((control_pixels, 0), (init_pixels, -1)):
        made = function(picture, (16, 24))
        assert made.shape == (16, 24, 3)
        assert (made.min(), made.max()) == (lowest, 1)
    mask = mask_pixels(np.array([[0, 127, 128, 255]], np.uint8), (1, 4))
    assert mask[0, :, 0].tolist() == [0, 0, 1, 1]
    assert fit(picture[:, :, 0], (3, 5)).shape == (3, 5)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(16, 24), (40, 8)])
def test_preprocessing_is_diffusers(size: tuple[int, int]):
    import parity_torch as theirs

    pixels = np.random.default_rng(1).integers(0, 256, (23, 31, 3), np.uint8)
    grey = pixels[:, :, 0]
    height, width = size
    for function, source, options in (
        (control_pixels, pixels, {"do_convert_rgb": True, "do_normalize": False}),
        (init_pixels, pixels, {}),
        (mask_pixels, grey, {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}),
    ):
        processor = theirs.lazy.image_processor.VaeImageProcessor(vae_scale_factor=8, **options)
        wanted = theirs.to_numpy(processor.preprocess(Image.fromarray(source), height, width))[0]
        np.testing.assert_array_equal(function(source, size), wanted)

"""Names of models: what is here, what is on the Hub, and what is neither.

The Hub is a server on this machine that answers as the Hub does; the library that asks it is the real one.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.numpy import load_file, save_file
from stub_hub import Repository, StubHub, serve

from sdxl_eqx.config import DiffusionSchedulerConfig, ModelConfig
from sdxl_eqx.conversion import ConvertConfig, convert
from sdxl_eqx.data.assets import ASSETS
from sdxl_eqx.data.tokenizer import bundled_tokenizers, save_tokenizers
from sdxl_eqx.loading import ModelParts
from sdxl_eqx.weights.hub import FLAX, find
from sdxl_eqx.weights.model import PARTS
from sdxl_eqx.weights.open import Source, open_model
from sdxl_eqx.weights.skeletons import skeleton_places

ROOT = Path(__file__).resolve().parent.parent.parent
SECRET = "hf_doNotTell"
FIRST, SECOND = "a" * 40, "b" * 40
SMALL: dict[str, dict[str, Any]] = {
    "text_encoder": {"vocab_size": 8},
    "text_encoder_2": {"vocab_size": 8},
    "vae": {"block_out_channels": [4, 4, 4, 8], "norm_num_groups": 2},
}
"""What of the bundled model's configs is made smaller."""

Arrays = dict[str, np.ndarray]


def halves(arrays: Arrays) -> Arrays:
    return {key: array.astype(np.float16) for key, array in arrays.items()}


def save_shards(arrays: Arrays, files: Sequence[Path], index: Path) -> None:
    """Shards and their index, as diffusers saves what is large."""
    where = {key: files[i % len(files)] for i, key in enumerate(arrays)}
    for file in files:
        save_file({key: array for key, array in arrays.items() if where[key] == file}, file)
    index.write_text(json.dumps({"metadata": {}, "weight_map": {key: file.name for key, file in where.items()}}))


def publish(folder: Path) -> dict[str, Arrays]:
    """Write a repository as SDXL base is published, very small; returns its weights by part."""
    shutil.copytree(ASSETS / "tiny-sdxl", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_tokenizers(bundled_tokenizers(), folder)
    rng = np.random.default_rng(0)
    weights: dict[str, Arrays] = {}
    for part in PARTS:
        file = folder / part / "config.json"
        config = {**json.loads(file.read_text()), **SMALL.get(part, {})}
        file.write_text(json.dumps(config))
        weights[part] = {
            key: rng.standard_normal(place.shape, np.float32)
            for place in skeleton_places(part, config)
            for key in place.keys
        }
    unet, vae, text, text_2 = (folder / part for part in PARTS)
    save_file(weights["unet"], unet / "diffusion_pytorch_model.safetensors")
    save_file(weights["vae"], vae / "diffusion_pytorch_model.safetensors")
    save_file(halves(weights["vae"]), vae / "diffusion_pytorch_model.fp16.safetensors")
    save_file(weights["text_encoder"], text / "model.safetensors")
    save_file(halves(weights["text_encoder"]), text / "model.fp16.safetensors")
    # Shards: of the variant as diffusers names them now and as it did, and of what has no variant.
    numbers = [f"{i:05d}-of-00002" for i in (1, 2)]
    save_shards(
        halves(weights["unet"]),
        [unet / f"diffusion_pytorch_model.fp16-{number}.safetensors" for number in numbers],
        unet / "diffusion_pytorch_model.safetensors.index.fp16.json",
    )
    save_shards(
        halves(weights["text_encoder_2"]),
        [text_2 / f"model-{number}.fp16.safetensors" for number in numbers],
        text_2 / "model.safetensors.index.fp16.json",
    )
    save_shards(
        weights["text_encoder_2"],
        [text_2 / f"model-{number}.safetensors" for number in numbers],
        text_2 / "model.safetensors.index.json",
    )
    for file in OTHERS:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(file.encode())
    return weights


OTHERS = (
    ".gitattributes", "README.md", "01.png", "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors",
    "sd_xl_offset_example-lora_1.0.safetensors", "model.ckpt", "text_encoder/flax_model.msgpack",
    "text_encoder/model.onnx", "text_encoder/openvino_model.bin", "text_encoder/openvino_model.xml",
    "text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.bin", "unet/diffusion_pytorch_model.non_ema.safetensors", "unet/model.onnx",
    "unet/model.onnx_data", "unet/openvino_model.bin", "unet/openvino_model.xml", "vae_1_0/config.json",
    "vae_1_0/diffusion_pytorch_model.safetensors", "vae_decoder/config.json", "vae_decoder/model.onnx",
)  # fmt: skip
"""What else such a repository holds."""

DESCRIBED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/config.json" for part in PARTS),
}
"""What says what the model is, beside the tokenizers' files."""

VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
OTHER_WEIGHTS = {
    VAE_FILE, "text_encoder/model.safetensors", "text_encoder_2/model.safetensors.index.json",
    "text_encoder_2/model-00001-of-00002.safetensors", "text_encoder_2/model-00002-of-00002.safetensors",
}  # fmt: skip
"""The weights beside the UNet's, in no variant."""

HALVES = {
    "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
    "unet/diffusion_pytorch_model.fp16-00002-of-00002.safetensors",
    "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors",
    "text_encoder_2/model-00001-of-00002.fp16.safetensors", "text_encoder_2/model-00002-of-00002.fp16.safetensors",
}  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Arrays]]:
    """The folder of a repository like SDXL base's, and its weights; read only."""
    folder = tmp_path_factory.mktemp("published") / "sdxl"
    return folder, publish(folder)


@pytest.fixture(scope="module")
def server(published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubHub]:
    """A hub with a few repositories."""
    root = tmp_path_factory.mktemp("repositories")
    folder, weights = published
    other = root / "other"
    (other / "unet").mkdir(parents=True)
    (other / "vae").mkdir()
    (other / "unet" / "config.json").write_text('{"second": true}')
    shutil.copy(folder / VAE_FILE, other / VAE_FILE)
    flax = root / "flax"
    for part in PARTS:
        (flax / part).mkdir(parents=True)
        (flax / part / "config.json").write_text("{}")
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        (flax / part / f"{name}.safetensors").write_bytes(b"x")
        if part != "vae":
            (flax / part / FLAX[part]).write_bytes(b"x")
    lightning = root / "lightning"
    (lightning / "folder").mkdir(parents=True)
    turned = {key: -array for key, array in weights["unet"].items()}
    save_file(turned, lightning / "lightning_4step_unet.safetensors")
    save_file(turned, lightning / "folder" / "lightning_8step_unet.safetensors")
    (lightning / "lightning_4step_unet.ckpt").write_bytes(b"\x80")
    alone = root / "alone"
    alone.mkdir()
    shutil.copy(folder / "unet" / "config.json", alone)
    names = [alone / f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    save_shards(weights["unet"], names, alone / "diffusion_pytorch_model.safetensors.index.json")
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        # The library's client, which lasts from test to test, reads this once.
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        close_session()
        main = {"main": FIRST}
        hub.repositories |= {
            "owner/sdxl": Repository({FIRST: folder}, main),
            "owner/history": Repository(
                {FIRST: folder, SECOND: other}, {**main, "dev": SECOND, "v1.0": SECOND, "refs/pr/1": SECOND}
            ),
            "owner/flax": Repository({FIRST: flax}, main),
            "owner/lightning": Repository({FIRST: lightning}, main),
            "owner/alone": Repository({FIRST: alone}, main),
            "owner/gated": Repository({FIRST: other}, main, token=SECRET),
        }
        yield hub
        close_session()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """What HF_HOME is: nothing yet."""
    return tmp_path / "home"


@pytest.fixture
def hub(server: StubHub, home: Path, monkeypatch: pytest.MonkeyPatch) -> StubHub:
    """The stub in the place of the Hub, and an empty cache in the place of the user's."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    for name, value in {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / "agents"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    # What is tried again is tried again at once.
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    ask(server.url, monkeypatch)
    server.reset()
    return server


def ask(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library ask at another address."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def offline(hub: StubHub, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the Hub out of reach: told by the environment, or for lack of a server."""

    def put(why: str) -> None:
        hub.requests.clear()
        if why == "told":
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
            return
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            ask(f"http://127.0.0.1:{unused.getsockname()[1]}", monkeypatch)

    return put


def files(folder: Path) -> set[str]:
    """Every file of a folder but the tokenizers'."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if not path.startswith("tokenizer")}


def refused(name: str, **arguments: Any) -> str:
    """What is said where a name cannot be had: one line with the flag, the name and the revision."""
    with pytest.raises(ValueError) as caught:
        find(name, flag="--model", **arguments)
    said = str(caught.value)
    assert said.startswith(f"--model {name!r}, --revision {arguments.get('revision', 'main')!r}: ")
    assert "\n" not in said
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return said


def assert_holds(model: Any, expected: dict[str, Arrays]) -> None:
    assert model.parts.keys() == expected.keys()
    for part, arrays in expected.items():
        assert model.parts[part].keys() == arrays.keys()
        for key, array in arrays.items():
            read = model.parts[part][key].read()
            assert read.dtype == array.dtype and np.array_equal(read, array)


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "./nowhere", "plain", "a//b.safetensors", "~/x"])
def test_a_name_that_is_neither_here_nor_a_hub_id_is_refused_without_a_look_at_the_hub(name: str, hub: StubHub):
    with pytest.raises(ValueError, match=r"--model.*no such file or folder; give .* a Hub id"):
        find(name, flag="--model", token="secret")
    assert not hub.requests


def test_of_a_repository_what_describes_the_model_and_its_weights_are_fetched_and_nothing_else(hub: StubHub):
    folder = find("owner/sdxl", flag="--model")
    assert files(folder) == DESCRIBED | {UNET_FILE} | OTHER_WEIGHTS
    tokenizers = {path for path in hub.fetched() if path.startswith("tokenizer")}
    assert {path.split("/")[0] for path in tokenizers} == {"tokenizer", "tokenizer_2"}
    assert hub.fetched() - tokenizers == files(folder)


def test_of_a_part_that_is_not_asked_for_only_the_config_is_fetched(hub: StubHub):
    folder = find("owner/sdxl", flag="--model", parts=["vae", "text_encoder", "text_encoder_2"])
    assert files(folder) == DESCRIBED | OTHER_WEIGHTS


def test_what_was_fetched_is_not_fetched_again(hub: StubHub):
    find("owner/sdxl", flag="--model", parts=["vae"])
    hub.requests.clear()
    folder = find("owner/sdxl", flag="--model")
    assert hub.fetched() == {UNET_FILE} | (OTHER_WEIGHTS - {VAE_FILE})
    hub.requests.clear()
    assert find("owner/sdxl", flag="--model") == folder
    assert not hub.fetched()


def test_a_variant_alone_is_fetched_and_read_whole_and_in_shards_of_either_name(hub: StubHub, published):
    model = open_model(Source("owner/sdxl", "--model", variant="fp16"))
    assert {path for path in hub.fetched() if path.endswith(".safetensors")} == HALVES
    assert hub.fetched() > DESCRIBED
    assert_holds(model, {part: halves(arrays) for part, arrays in published[1].items()})


def test_what_has_no_variant_is_read_whole_and_in_shards(hub: StubHub, published):
    assert_holds(open_model(Source("owner/sdxl", "--model")), published[1])


def test_a_unet_alone_is_fetched_and_read_in_shards(hub: StubHub, published):
    model = open_model(Source("owner/alone", "--unet"), parts=("unet",))
    assert_holds(model, {"unet": published[1]["unet"]})


@pytest.mark.parametrize("revision", ["dev", "v1.0", "refs/pr/1", SECOND])
def test_a_revision_is_a_branch_or_a_tag_or_a_commit(revision: str, hub: StubHub):
    folder = find("owner/history", flag="--model", revision=revision)
    assert folder.name == SECOND
    assert files(folder) == {"unet/config.json", VAE_FILE}
    assert (folder / "unet" / "config.json").read_text() == '{"second": true}'
    file = find(f"owner/history/{VAE_FILE}", flag="--model", revision=revision)
    assert file == folder / VAE_FILE


@pytest.mark.parametrize("path", ["lightning_4step_unet.safetensors", "folder/lightning_8step_unet.safetensors"])
def test_a_file_of_a_repository_is_fetched_alone(path: str, hub: StubHub):
    file = find(f"owner/lightning/{path}", flag="--unet")
    assert file.is_file() and file.parts[-len(path.split("/")) :] == tuple(path.split("/"))
    assert hub.fetched() == {path}
    assert all("/api/" not in request.path for request in hub.requests)


@pytest.mark.parametrize("path", ["lightning_4step_unet.ckpt", "unet/diffusion_pytorch_model.bin", "a.pt", "a.pth"])
def test_a_pickle_on_the_hub_is_refused_before_anything_is_asked(path: str, hub: StubHub):
    with pytest.raises(ValueError, match=r"--unet 'owner/.*': a PyTorch pickle, .* never loaded"):
        find(f"owner/lightning/{path}", flag="--unet")
    assert not hub.requests


def test_with_flax_its_files_are_fetched_and_safetensors_of_the_parts_that_have_none(hub: StubHub):
    folder = find("owner/flax", flag="--model", flax=True)
    configs = {f"{part}/config.json" for part in PARTS}
    assert files(folder) == configs | {f"{part}/{FLAX[part]}" for part in PARTS if part != "vae"} | {VAE_FILE}
    assert hub.fetched() == files(folder)


def test_without_flax_none_of_its_files_is_fetched(hub: StubHub):
    find("owner/flax", flag="--model")
    assert not [path for path in hub.fetched() if path.endswith(".msgpack")]


@pytest.mark.parametrize("given", ["argument", "environment", "with a line's end"])
@pytest.mark.parametrize("name", ["owner/gated", f"owner/gated/{VAE_FILE}"])
def test_the_token_is_sent_to_the_hub_and_not_where_it_keeps_big_files(
    name: str, given: str, hub: StubHub, home: Path, monkeypatch: pytest.MonkeyPatch
):
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", SECRET)
    token = {"argument": SECRET, "environment": "", "with a line's end": f"{SECRET}\n"}[given]
    find(name, flag="--model", token=token)
    blobs = [request for request in hub.requests if request.path.startswith("/blobs/")]
    assert blobs and not [request for request in blobs if request.authorization]
    assert {r.authorization for r in hub.requests if r not in blobs} == {f"Bearer {SECRET}"}
    assert not tells(home)


def test_nothing_is_sent_for_a_token_where_there_is_none(hub: StubHub):
    find("owner/flax", flag="--model")
    assert not [request for request in hub.requests if request.authorization]


def tells(home: Path) -> list[Path]:
    """The files that the secret stands in, in their names or in what they hold."""
    found = [path for path in home.rglob("*") if path.is_file()]
    assert found
    return [path for path in found if SECRET.encode() in path.read_bytes() or SECRET in str(path)]


@pytest.mark.parametrize("name", ["owner/gated", f"owner/gated/{VAE_FILE}"])
def test_a_token_that_is_refused_is_in_no_message_and_no_log(
    name: str, hub: StubHub, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, logger="huggingface_hub"):
        said = refused(name, token=f"{SECRET}-of-another")
    assert "HF_TOKEN" in said
    out, err = capfd.readouterr()
    assert caplog.records and SECRET not in said + caplog.text + out + err
    assert not [record for record in caplog.records if SECRET in repr(record.__dict__)]


@pytest.mark.parametrize("token", [f"{SECRET}\nand more", f"{SECRET}\u00e9", f"{SECRET}\x00"])
def test_what_can_be_no_token_is_refused_before_anything_is_asked(token: str, hub: StubHub):
    with pytest.raises(
        ValueError, match=r"--model 'owner/gated': the access token has characters .*; copy it"
    ) as caught:
        find("owner/gated", flag="--model", token=token)
    assert SECRET not in str(caught.value) and not hub.requests


@pytest.mark.parametrize("why", ["told", "no server"])
@pytest.mark.parametrize("name", ["owner/sdxl", "owner/lightning/lightning_4step_unet.safetensors"])
def test_what_was_fetched_serves_while_the_hub_is_out_of_reach(
    name: str, why: str, hub: StubHub, offline: Callable[[str], None]
):
    there = find(name, flag="--model", variant="fp16")
    offline(why)
    assert find(name, flag="--model", variant="fp16") == there
    assert not hub.requests


@pytest.mark.parametrize("why", ["told", "no server"])
@pytest.mark.parametrize("name", ["owner/flax", "owner/lightning/lightning_4step_unet.safetensors"])
def test_what_was_not_fetched_is_an_error_while_the_hub_is_out_of_reach(
    name: str, why: str, hub: StubHub, offline: Callable[[str], None]
):
    # Another part, and another file, are there.
    find("owner/flax", flag="--model", parts=["vae"])
    find("owner/lightning/folder/lightning_8step_unet.safetensors", flag="--model")
    offline(why)
    assert "connection" in refused(name)
    assert not hub.requests


def store(folder: Path, paths: Iterable[str], home: Path) -> None:
    """Put files of a folder into the cache as someone/model, as any program does: blobs, and snapshots of links."""
    repository = home / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FIRST)
    (repository / "blobs").mkdir()
    for i, path in enumerate(sorted(paths)):
        shutil.copy(folder / path, repository / "blobs" / f"{i:064x}")
        link = repository / "snapshots" / FIRST / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + path.count("/")), "blobs", f"{i:064x}"))


@pytest.mark.parametrize("revision", ["main", FIRST])
@pytest.mark.parametrize("why", ["told", "no server"])
def test_a_cache_that_another_program_made_is_read(
    why: str, revision: str, hub: StubHub, home: Path, offline: Callable[[str], None], published
):
    folder, weights = published
    store(folder, DESCRIBED | OTHER_WEIGHTS | {UNET_FILE}, home)
    offline(why)
    assert_holds(open_model(Source("someone/model", "--model", revision=revision)), weights)
    file = find(f"someone/model/{VAE_FILE}", flag="--vae", revision=revision)
    assert load_file(file).keys() == weights["vae"].keys()
    assert not hub.requests


def test_a_cache_that_another_program_made_without_weights_is_an_error(
    hub: StubHub, home: Path, offline: Callable[[str], None], published
):
    store(published[0], DESCRIBED, home)
    offline("told")
    assert "no safetensors of unet, vae, text_encoder, text_encoder_2 found" in refused("someone/model")


@pytest.mark.parametrize(
    ("name", "revision", "kind"),
    [
        ("owner/missing", "main", "RepositoryNotFoundError"),
        ("owner/missing/a.safetensors", "main", "RepositoryNotFoundError"),
        ("owner/sdxl", "missing", "RevisionNotFoundError"),
        (f"owner/sdxl/{VAE_FILE}", "missing", "RevisionNotFoundError"),
        ("owner/gated", "main", "GatedRepoError"),
        (f"owner/gated/{VAE_FILE}", "main", "GatedRepoError"),
        ("owner/sdxl/missing.safetensors", "main", "RemoteEntryNotFoundError"),
        ("owner/no such", "main", "HFValidationError"),
        ("owner/sdxl/../a.safetensors", "main", ""),
    ],
)
def test_what_the_hub_does_not_have_or_give_is_an_error_that_says_what(
    name: str, revision: str, kind: str, hub: StubHub
):
    said = refused(name, revision=revision)
    assert kind in said and "Check the name" in said and "HF_TOKEN" in said


@pytest.mark.parametrize("name", ["owner/sdxl", f"owner/sdxl/{VAE_FILE}"])
def test_a_hub_that_cannot_be_reached_is_an_error(name: str, hub: StubHub, offline: Callable[[str], None]):
    offline("no server")
    assert "connection" in refused(name)


GARBAGE = {
    "a web page": b"HTTP/1.1 200 OK\r\nContent-Length: 22\r\n\r\n<html>log in</html>\r\n\r\n",
    "a list": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    "no commit": b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"id": "x"}',
    "nothing": b"",
    "no HTTP": b"\x00\xff\x00 what?\r\n\r\n",
    "cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{",
    "round and round": b"HTTP/1.1 302 Found\r\nLocation: /api/models/a/b\r\nContent-Length: 0\r\n\r\n",
    "out of order": b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
    "elsewhere": b"HTTP/1.1 302 Found\r\nLocation: ftp://localhost/\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", ["owner/sdxl", f"owner/sdxl/{VAE_FILE}"])
def test_a_server_that_answers_nonsense_is_an_error(name: str, garbage: str, hub: StubHub):
    hub.garbage = GARBAGE[garbage]
    assert "connection" in refused(name)


def test_a_repository_that_is_no_diffusers_model_is_an_error_that_says_how_to_name_a_file(hub: StubHub):
    said = refused("owner/lightning")
    assert "owner/lightning/FILE.safetensors" in said


def test_a_variant_that_a_repository_does_not_have_is_an_error_that_names_it(hub: StubHub):
    assert "'fp8'" in refused("owner/sdxl", variant="fp8")


def test_training_takes_a_model_and_another_unet_from_the_hub(hub: StubHub, published):
    config = ModelConfig(
        pretrained_model_name_or_path="owner/sdxl",
        variant="fp16",
        unet_checkpoint="owner/lightning/lightning_4step_unet.safetensors",
    )
    parts = ModelParts.read(config, DiffusionSchedulerConfig(), token="")
    weights = {part: halves(arrays) for part, arrays in published[1].items()}
    assert_holds(parts.model, {**weights, "unet": {key: -array for key, array in published[1]["unet"].items()}})
    got = {path for path in hub.fetched() if path.endswith(".safetensors")}
    assert got == {path for path in HALVES if not path.startswith("unet/")} | {"lightning_4step_unet.safetensors"}
    assert parts.model.tokenizers is not None and parts.model.tokenizers.name == FIRST


def test_training_sends_its_token_for_both_and_takes_the_variant(hub: StubHub, published):
    config = ModelConfig(pretrained_model_name_or_path="owner/sdxl", variant="fp16")
    parts = ModelParts.read(config, DiffusionSchedulerConfig(), token=SECRET)
    assert_holds(parts.model, {part: halves(arrays) for part, arrays in published[1].items()})
    asked = [request for request in hub.requests if not request.path.startswith("/blobs/")]
    assert {request.authorization for request in asked} == {f"Bearer {SECRET}"}


def test_a_conversion_takes_a_model_and_another_unet_from_the_hub(hub: StubHub, published, tmp_path: Path):
    out = tmp_path / "out"
    unet = "owner/lightning/folder/lightning_8step_unet.safetensors"
    convert(ConvertConfig("owner/sdxl", str(out), variant="fp16", unet=unet))
    weights = {part: halves(arrays) for part, arrays in published[1].items()}
    turned = {key: -array for key, array in published[1]["unet"].items()}
    assert_holds(open_model(Source(str(out), "")), {**weights, "unet": turned})


def test_the_conversion_script_says_one_line_about_a_missing_repository_and_never_the_token(
    hub: StubHub, home: Path, tmp_path: Path
):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "HF_"))}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HOME": str(home), "HF_TOKEN": SECRET}
    ended = subprocess.run(
        [sys.executable, "scripts/convert_weights.py", "owner/missing", str(tmp_path / "out")],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: SRC 'owner/missing', --revision 'main': ") and not ended.stdout
    assert SECRET not in line
    asked = {request.authorization for request in hub.requests if "/models/" in request.path}
    assert asked == {f"Bearer {SECRET}"}
    assert not (tmp_path / "out").exists()
    assert not [path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

"""Names of models: a file or folder here, or what stands on the Hugging Face Hub and in its cache."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sdxl_eqx.weights.model import PARTS

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Suffixes of PyTorch pickles, which are never loaded."""

STEMS = ("diffusion_pytorch_model", "model")
"""Names of weight files: those of diffusers, those of transformers."""

FLAX = {
    "unet": "diffusion_flax_model.msgpack",
    "vae": "diffusion_flax_model.msgpack",
    "text_encoder": "flax_model.msgpack",
    "text_encoder_2": "flax_model.msgpack",
}
"""The Flax file of each part."""

DESCRIPTIONS = ("scheduler", "tokenizer", "tokenizer_2")
"""Folders whose JSON and text files say what the model is, beside each part's config."""


def find(
    name: str,
    *,
    flag: str,
    revision: str = "main",
    token: str = "",
    variant: str = "",
    parts: Sequence[str] = PARTS,
    flax: bool = False,
) -> Path:
    """The file or folder that `name` means: one here, else a snapshot of that Hub repository, or one file of it.

    A Hub id is `owner/name`, or `owner/name/path/of/a/file.safetensors`. Of a repository only what describes the model
    is fetched, and the weights of `parts` in that `variant`; with `flax`, Flax's of those parts that have them. Where
    the Hub is out of reach, or HF_HUB_OFFLINE is set, its cache serves. `flag` is named in errors, the token never.

    Raises:
        ValueError: where there is neither, with the remedy.
    """
    here = Path(name)
    if here.suffix in PICKLES and (here.is_file() or name.count("/") >= 2):
        raise ValueError(
            f"{flag} {name!r}: a PyTorch pickle, which can run code when read and is never loaded. Where you trust it: "
            'python -c "import torch, safetensors.torch as s; d = torch.load(IN, weights_only=True); '
            "s.save_file(d.get('state_dict', d), OUT)\""
        )
    if here.exists():
        return here
    words = name.split("/")
    one_file = len(words) > 2 and here.suffix == ".safetensors"
    if here.is_absolute() or name.startswith((".", "~")) or not all(words) or not (len(words) == 2 or one_file):
        raise ValueError(
            f"{flag} {name!r}: no such file or folder; give a diffusers folder, a .safetensors file, or a Hub id such "
            "as stabilityai/stable-diffusion-xl-base-1.0 or ByteDance/SDXL-Lightning/sdxl_lightning_4step_unet"
            ".safetensors."
        )
    # A token that was read from a file can end in a newline. What is no token is shown by the libraries' logs.
    token = token.strip()
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{flag} {name!r}: the access token has characters that no token has; copy it again.")
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, path = "/".join(words[:2]), "/".join(words[2:])
    try:
        if one_file:
            return Path(hf_hub_download(repo, path, revision=revision, token=token or None))
        fetch = partial(snapshot_download, repo, revision=revision, token=token or None)
        missing = list(parts)
        if flax:
            folder = Path(fetch(allow_patterns=[*_described(), *(f"{part}/{FLAX[part]}" for part in parts)]))
            missing = [part for part in parts if not (folder / part / FLAX[part]).is_file()]
            if not missing:
                return folder
        weights = [*_indices(missing, variant), *_weights(missing, variant)] if missing else []
        folder = Path(fetch(allow_patterns=[*_described(), *weights]))
    except Exception as error:
        # Whatever the library makes of what a server or proxy sends: more than it documents. From None, and without
        # the message: it can hold the request with its headers.
        raise ValueError(
            f"{flag} {name!r}, --revision {revision!r}: neither here, nor in the Hub's cache, nor could it be fetched "
            f"({type(error).__name__}). Check the name, the revision and the connection, set HF_TOKEN if it is gated, "
            "or give a local diffusers folder or .safetensors file."
        ) from None
    if parts and len(missing) == len(parts) and not any(any(folder.glob(file)) for file in _weights(missing, variant)):
        of = f" in variant {variant!r}" if variant else ""
        remedy = "leave the variant out" if variant else "give the variant that it has"
        raise ValueError(
            f"{flag} {name!r}, --revision {revision!r}: no safetensors of {', '.join(parts)}{of} found that are named "
            f"as diffusers names them; {remedy}, or name one file of it: {repo}/FILE.safetensors."
        )
    return folder


def _described() -> list[str]:
    """Patterns of the files that say what a model is, which match no index of shards: see `_indices`."""
    inside = [f"{folder}/*.{suffix}" for folder in DESCRIPTIONS for suffix in ("json", "txt")]
    return ["model_index.json", "config.json", *(f"{part}/config.json" for part in PARTS), *inside]


def _indices(parts: Sequence[str], variant: str) -> list[str]:
    """The files that name shards, of what is fetched alone: whoever reads an index wants the shards that it names."""
    mark = f".{variant}" if variant else ""
    return _inside(parts, [f"{stem}.safetensors.index{mark}.json" for stem in STEMS])


def _weights(parts: Sequence[str], variant: str) -> list[str]:
    """Patterns of weight files, which match no other variant: those would double the download."""
    names = []
    for stem in STEMS:
        # diffusers has written a variant's shards in both ways.
        mark = f".{variant}" if variant else ""
        number = "-?????-of-?????"
        names += [f"{stem}{mark}.safetensors", f"{stem}{mark}{number}.safetensors"]
        names += [f"{stem}{number}{mark}.safetensors"] if variant else []
    return _inside(parts, names)


def _inside(parts: Sequence[str], names: Sequence[str]) -> list[str]:
    """Files of parts: in their folders, or without one in a repository of one UNet or ControlNet."""
    return [f"{folder}{name}" for folder in ("", *(f"{part}/" for part in parts)) for name in names]

"""CLIP's byte-pair tokenizer, twice: SDXL's two text encoders share a vocabulary and differ in padding."""

import gzip
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from sdxl_eqx.data.assets import ASSETS

# transformers says at import that it cannot run models without PyTorch; only its tokenizers are used here.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())

from transformers import CLIPTokenizer  # noqa: E402  after the filter

Tokenizers = tuple[CLIPTokenizer, CLIPTokenizer]
"""Of the first and of the second text encoder."""

LENGTH = 77
WORDS = LENGTH - 2
"""Tokens of a chunk between its start and its end."""
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
START, END = "<|startoftext|>", "<|endoftext|>"
FOLDERS = ("tokenizer", "tokenizer_2")
PADS = (END, "!")
"""What each tokenizer pads with. As in the SDXL repository, that makes a literal "!" id 0 for the second one."""


def bundled_tokenizers() -> Tokenizers:
    """SDXL's two tokenizers from the vocabulary that comes with the package; equal to the published ones.

    Raises:
        ValueError: the vocabulary file is not the published one.
    """
    raw = (ASSETS / VOCABULARY).read_bytes()
    if (digest := hashlib.sha256(raw).hexdigest()) != VOCABULARY_SHA256:
        raise ValueError(f"{ASSETS / VOCABULARY} must have sha256 {VOCABULARY_SHA256}, not {digest}; install again")
    merges = [(a, b) for a, b in (line.split() for line in gzip.decompress(raw).decode().split("\n")[1:48895])]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(i) for i in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    first, second = (
        CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=LENGTH)  # pyright: ignore
        for pad in PADS
    )
    return first, second


def load_tokenizers(folder: Path) -> Tokenizers:
    """The tokenizers of a diffusers folder, from `tokenizer/` and `tokenizer_2/`; the bundled ones where it has none.

    Each may be vocab.json with merges.txt, or tokenizer.json.

    Raises:
        ValueError: only one of the two folders exists, or one cannot be read.
    """
    found = [name for name in FOLDERS if (folder / name).is_dir()]
    if not found:
        return bundled_tokenizers()
    if len(found) == 1:
        raise ValueError(f"{folder} has {found[0]}/ alone; SDXL needs {FOLDERS[0]}/ and {FOLDERS[1]}/, or neither")
    first, second = (_load(folder / name) for name in FOLDERS)
    return first, second


def _load(folder: Path) -> CLIPTokenizer:
    classic = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not classic and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer; it needs vocab.json with merges.txt, or tokenizer.json")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception for a damaged file
        raise ValueError(f"{folder} holds no readable CLIP tokenizer ({error}); fetch the model again") from error
    tokenizer.backend_tokenizer.no_truncation()  # set once here, so that threads only ever read it
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def save_tokenizers(tokenizers: Tokenizers, folder: Path) -> None:
    """Write `tokenizer/` and `tokenizer_2/` into a diffusers folder, in transformers' layout and in the classic one.

    The vocabulary and merges of SDXL come out byte for byte as Stability AI published them.
    """
    for tokenizer, name in zip(tokenizers, FOLDERS, strict=True):
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(target)
        bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        merges = "".join(f"{a} {b}\n" for a, b in bpe["merges"])
        marks = {
            f"{role}_token": _mark(str(getattr(tokenizer, f"{role}_token"))) for role in ("bos", "eos", "pad", "unk")
        }
        vocabulary = json.dumps(bpe["vocab"], ensure_ascii=False, indent=2, sort_keys=True)
        (target / "vocab.json").write_text(vocabulary + "\n", "utf-8")
        (target / "merges.txt").write_text("#version: 0.2\n" + merges, "utf-8")
        (target / "special_tokens_map.json").write_text(json.dumps(marks, indent=2) + "\n", "utf-8")


def _mark(token: str) -> str | dict[str, str | bool]:
    if token not in (START, END):
        return token
    return {"content": token, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def tokenize(
    tokenizer: CLIPTokenizer, captions: Sequence[str], chunks: int = 1
) -> tuple[Int32[np.ndarray, "b s"], int]:
    """Token ids in so many chunks of 77, and how many captions were longer and so were cut.

    Each chunk has a start token, up to 75 tokens of the caption, and an end token, as AUTOMATIC1111 and ComfyUI have
    them; the rest is padding.
    """
    ids = np.full((len(captions), chunks, LENGTH), tokenizer.pad_token_id, np.int32)
    number_cut = 0
    rows = tokenizer(list(captions), verbose=False)["input_ids"] if captions else []
    for i, (start, *words, end) in enumerate(rows):
        number_cut += len(words) > chunks * WORDS
        for j in range(chunks):
            chunk = [start, *words[j * WORDS : (j + 1) * WORDS], end]
            ids[i, j, : len(chunk)] = chunk
    return ids.reshape(len(captions), chunks * LENGTH), number_cut

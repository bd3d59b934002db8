import hashlib
import json
import shutil

import numpy as np
import pytest

from sdxl_eqx.data import tokenizer as module
from sdxl_eqx.data.tokenizer import bundled_tokenizers, load_tokenizers, save_tokenizers, tokenize

HARD = [
    "a photo of a cat",
    "",
    "wow! really!!! a!b",
    "Ünïcödé ﬁne 日本語 🐱 it's 1234",
    "<|startoftext|> literal <|endoftext|> marks",
    "word " * 100,
]
CAT = [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.fixture(scope="module")
def tokenizers():
    return bundled_tokenizers()


@pytest.fixture(scope="module")
def saved(tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_tokenizers(tokenizers, folder)
    return folder


def ids(tokenizers):
    return [tokenize(tokenizer, HARD)[0].tolist() for tokenizer in tokenizers]


def test_a_photo_of_a_cat_has_the_published_ids_and_pads(tokenizers):
    first, second = (tokenize(t, ["a photo of a cat"])[0] for t in tokenizers)
    assert first.dtype == np.int32
    assert first.tolist() == [CAT + [49407] * 70]
    assert second.tolist() == [CAT + [0] * 70]


def test_a_literal_exclamation_mark_is_the_second_pad_as_in_the_sdxl_repository(tokenizers):
    first, second = (tokenize(t, ["a !"])[0][0, :4].tolist() for t in tokenizers)
    assert first == [49406, 320, 256, 49407]
    assert second == [49406, 320, 0, 49407]


def test_long_captions_are_cut_keep_their_end_and_are_counted(tokenizers):
    captions = ["cat " * n for n in (1, 75, 76, 200)]
    rows, number_cut = tokenize(tokenizers[0], captions)
    assert number_cut == 2
    assert (rows[1:, 76] == 49407).all()
    assert (rows[1:, 1:76] == 2368).all()
    assert tokenize(tokenizers[0], []) [0].shape == (0, 77)  # fmt: skip


def test_ids_equal_those_of_transformers_own_truncation_and_padding(tokenizers):
    for tokenizer, rows in zip(bundled_tokenizers(), ids(tokenizers), strict=True):
        expected = tokenizer(HARD, truncation=True, padding="max_length", max_length=77)["input_ids"]
        assert rows == expected


def test_the_files_have_the_published_hashes(saved):
    def sha256(data):
        return hashlib.sha256(data).hexdigest()

    for name in ("tokenizer", "tokenizer_2"):
        vocabulary = (saved / name / "vocab.json").read_bytes()
        short = json.dumps(json.loads(vocabulary), ensure_ascii=False, separators=(",", ":"))
        by_id = dict(sorted(json.loads(short).items(), key=lambda item: item[1]))
        clip_form = json.dumps(by_id, ensure_ascii=False, separators=(",", ":")).encode()
        merges = (saved / name / "merges.txt").read_bytes()
        assert sha256(vocabulary) == "e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349"
        assert sha256(clip_form) == "5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363"
        assert sha256(merges) == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


@pytest.mark.parametrize(
    "without",
    [
        [],
        ["tokenizer.json"],
        ["tokenizer.json", "tokenizer_config.json"],
        ["vocab.json", "merges.txt", "special_tokens_map.json"],
    ],
)
def test_either_layout_loads_with_equal_ids_and_pads(tokenizers, saved, tmp_path, without):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        for file in without:
            (tmp_path / name / file).unlink()
    loaded = load_tokenizers(tmp_path)
    assert [t.pad_token_id for t in loaded] == [49407, 0]
    assert ids(loaded) == ids(tokenizers)


def test_truncation_stored_in_a_folder_does_not_hide_cut_captions(tmp_path):
    tokenizers = bundled_tokenizers()
    for tokenizer in tokenizers:
        tokenizer.backend_tokenizer.enable_truncation(10)
        tokenizer.backend_tokenizer.enable_padding(length=10)
    save_tokenizers(tokenizers, tmp_path)
    for tokenizer in load_tokenizers(tmp_path):
        assert tokenize(tokenizer, ["cat " * 100])[1] == 1


def test_a_folder_without_tokenizers_gets_the_bundled_ones(tokenizers, tmp_path):
    assert ids(load_tokenizers(tmp_path)) == ids(tokenizers)


def test_one_tokenizer_of_two_is_an_error(saved, tmp_path):
    shutil.copytree(saved / "tokenizer_2", tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="has tokenizer_2/ alone; SDXL needs"):
        load_tokenizers(tmp_path)


def test_a_tokenizer_folder_that_cannot_be_read_is_an_error(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="holds no readable CLIP tokenizer"):
        load_tokenizers(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    (tmp_path / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"it needs vocab.json with merges.txt, or tokenizer.json"):
        load_tokenizers(tmp_path)


def test_another_vocabulary_is_an_error(tmp_path, monkeypatch):
    (tmp_path / module.VOCABULARY).write_bytes(b"else")
    monkeypatch.setattr(module, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match="must have sha256 924691ac"):
        bundled_tokenizers()


def test_chunks_have_a_start_an_end_and_75_tokens_each(tokenizers):
    words = " ".join(["cat"] * 100)
    for tokenizer in tokenizers:
        (ids,), cut = tokenize(tokenizer, [words], 2)
        one, other = ids.reshape(2, 77)
        assert cut == 0 and one.tolist() == [49406, *[2368] * 75, 49407]
        assert other.tolist() == [49406, *[2368] * 25, 49407, *[tokenizer.pad_token_id] * 50]


def test_one_chunk_is_what_it_always_was_and_more_only_append_to_it(tokenizers):
    for tokenizer in tokenizers:
        one, cut = tokenize(tokenizer, HARD)
        three, still_cut = tokenize(tokenizer, HARD, 3)
        assert three.shape == (len(HARD), 231)
        np.testing.assert_array_equal(three[:, :77], one)
        assert (cut, still_cut) == (1, 0)
        empty = [49406, 49407, *[tokenizer.pad_token_id] * 75]
        assert three[0, 77:].tolist() == empty * 2

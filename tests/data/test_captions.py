import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdxl_eqx.config import DataConfig
from sdxl_eqx.data.captions import Visit, caption, shuffle_tags
from sdxl_eqx.data.sources import texts


def draws(config: DataConfig, n: int = 2000):
    return [Visit.draw(config, np.random.default_rng([0, i])) for i in range(n)]


def test_a_visit_draws_the_same_numbers_whatever_the_config_is():
    plain = [Visit.draw(DataConfig(), np.random.default_rng(i)) for i in range(50)]
    mixed = [Visit.draw(DataConfig(random_flip=True, caption_dropout=0.5), np.random.default_rng(i)) for i in range(50)]
    assert [visit.pick for visit in plain] == [visit.pick for visit in mixed]
    for config in (DataConfig(), DataConfig(random_flip=True, caption_dropout=0.5)):
        rng = np.random.default_rng(3)
        Visit.draw(config, rng)
        assert rng.random() == np.random.default_rng(3).random(4)[3]


def test_half_are_mirrored_and_the_wanted_share_is_empty_only_where_asked_for():
    visits = draws(DataConfig(random_flip=True, caption_dropout=0.1))
    assert 0.45 < np.mean([visit.flip for visit in visits]) < 0.55
    assert 0.08 < np.mean([visit.is_empty for visit in visits]) < 0.12
    assert not any(visit.flip or visit.is_empty for visit in draws(DataConfig()))
    assert all(visit.is_empty for visit in draws(DataConfig(caption_dropout=1.0)))


def test_every_caption_of_a_sample_is_picked_about_as_often():
    counts = np.bincount([visit.index(4) for visit in draws(DataConfig())], minlength=4)
    assert len(counts) == 4 and (counts > 400).all()
    assert {visit.index(1) for visit in draws(DataConfig())} == {0}


def test_a_dropped_caption_is_empty_and_others_stay_word_for_word():
    rng = np.random.default_rng(0)
    words = ("a, b , c", "d")
    assert caption(words, Visit(False, True, 0.0), DataConfig(), rng) == ""
    assert caption(words, Visit(False, False, 0.0), DataConfig(), rng) == "a, b , c"
    assert caption(words, Visit(False, False, 0.9), DataConfig(), rng) == "d"


def test_tags_are_shuffled_but_for_the_first_ones():
    config = DataConfig(caption_shuffle=True, keep_tokens=2)
    words = ("one, two,three , , four, five",)
    said = {caption(words, Visit(False, False, 0.0), config, np.random.default_rng(i)) for i in range(200)}
    assert len(said) == 6
    assert all(one.startswith("one, two, ") for one in said)
    assert {tuple(sorted(one.split(", "))) for one in said} == {("five", "four", "one", "three", "two")}


@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=4), max_size=6), st.integers(0, 9), st.integers(0, 99))
def test_no_tag_is_lost_or_made_up(tags, keep, seed):
    wanted = [tag.strip() for tag in tags if tag.strip()]
    said = shuffle_tags(",".join(tags), keep, np.random.default_rng(seed))
    assert sorted(said.split(", ")) == sorted(wanted) if wanted else said == ""
    assert said.split(", ")[: min(keep, len(wanted))] == wanted[:keep] or not wanted


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("a cat", ("a cat",)),
        ("", ("",)),
        (b"\xef\xbb\xbfa cat", ("a cat",)),
        (["a", "b"], ("a", "b")),
        ('["a", "b"]', ("a", "b")),
        ('{"short": "a", "long": "b", "n": 3}', ("a", "b")),
        ('"quoted"', ("quoted",)),
        ("[tag] a cat", ("[tag] a cat",)),
        ("{not json", ("{not json",)),
        ("[" * 10**5, ("[" * 10**5,)),
        ("[1, 2]", ("[1, 2]",)),
        ("{}", ("{}",)),
        ({"a": "x"}, ("x",)),
    ],
)
def test_the_value_of_a_caption_column_is_text_a_list_or_json(value, found):
    assert texts(value) == found


@pytest.mark.parametrize("value", [None, 3, [], {}, ["a", 3], [["a"]]])
def test_a_caption_of_another_kind_is_an_error_that_shows_it(value):
    with pytest.raises(ValueError, match="a caption must be"):
        texts(value)

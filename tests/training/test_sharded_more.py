"""The other half of the table of `test_sharded.py`, so that both are compiled at once; and all there is."""

import pytest
from sharded_cases import CASES, assert_is_that_of_one_device, product


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_loss_and_gradients_are_those_of_one_device(case, monkeypatch):
    assert_is_that_of_one_device(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(product()), ids=str)
def test_loss_and_gradients_of_every_case_are_those_of_one_device(case, monkeypatch):
    assert_is_that_of_one_device(case, monkeypatch)

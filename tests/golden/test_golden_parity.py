"""The golden files are what diffusers and transformers say today."""

import json

import numpy as np
import parity_models as tiny
import parity_torch as theirs
import pytest

pytestmark = pytest.mark.parity


def test_the_golden_files_come_out_again():
    files, tables = theirs.golden()
    assert {f.stem for f in tiny.GOLDEN.glob("*.safetensors")} == set(files)
    assert json.loads((tiny.GOLDEN / "keys.json").read_text(encoding="utf-8")) == tables
    for name, tensors in files.items():
        kept = tiny.read_golden(name)
        assert kept.keys() == tensors.keys()
        for key, value in tensors.items():
            # Other machines add in another order.
            scale = float(np.abs(value).max())
            np.testing.assert_allclose(kept[key], value, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{name}: {key}")


def test_the_golden_files_stay_small():
    assert sum(f.stat().st_size for f in tiny.GOLDEN.iterdir() if f.is_file()) < 1_500_000

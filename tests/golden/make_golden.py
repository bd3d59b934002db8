"""Write the golden files: what diffusers and transformers make of tiny models, for test runs without PyTorch.

Run as `python tests/golden/make_golden.py` where PyTorch is installed. Weights and inputs follow from names and seeds
(tests/parity_models.py), so that the files hold outputs alone. A parity test compares them with a fresh computation.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

TESTS = Path(__file__).resolve().parent.parent


def main() -> None:
    """Compute everything and write it beside this file."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import parity_torch

    files, tables = parity_torch.golden()
    for name, tensors in files.items():
        whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
        save_file(whole, TESTS / "golden" / f"{name}.safetensors")
    (TESTS / "golden" / "keys.json").write_text(json.dumps(tables, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

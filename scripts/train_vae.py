"""Train a small VAE; the bundled one is `python scripts/train_vae.py --output sdxl_eqx/assets/tiny-sdxl/vae`."""

import sys

import tyro

from sdxl_eqx.console import talk
from sdxl_eqx.training.vae import VAETrainConfig, train_vae


def main() -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(VAETrainConfig, description=VAETrainConfig.__doc__)
    log = talk()
    try:
        train_vae(config)
    except ValueError as error:
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Encode a data set once, before training: the flags of `scripts/train.py`, with --dataset-save-location."""

import sys

from sdxl_eqx.console import talk
from sdxl_eqx.flags import parse


def main() -> int:
    """Run the command line; returns the exit code."""
    log = talk()
    config = parse(sys.argv[1:])

    # Imported here, so that --help and wrong flags answer at once.
    from sdxl_eqx.parallel.begin import begin_jax
    from sdxl_eqx.training.caching import cache_dataset

    try:
        begin_jax(config.run)
        summary = cache_dataset(config)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    log.info("%s: %d samples are encoded, %d cannot be used. Train on them with the same flags.",
             summary.folder, summary.samples, summary.bad)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Convert SDXL weights between file formats: `python scripts/convert_weights.py --help`."""

import sys

import tyro

from sdxl_eqx.console import talk
from sdxl_eqx.conversion import ConvertConfig, convert


def main() -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(ConvertConfig, description=ConvertConfig.__doc__)
    log = talk()
    try:
        convert(config)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

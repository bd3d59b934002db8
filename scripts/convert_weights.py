"""Convert SDXL weights between file formats: `python scripts/convert_weights.py --help`."""

import signal
import sys

import tyro

from sdxl_eqx.console import talk
from sdxl_eqx.conversion import ConvertConfig, convert


def main() -> int:
    """Run the command line; returns the exit code."""
    config = tyro.cli(ConvertConfig, description=ConvertConfig.__doc__)
    log = talk()
    # What is half written is removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        convert(config)
    except KeyboardInterrupt:
        log.error("stopped; nothing was written")
        return 130
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a run would need of devices that are not here: `python scripts/compile.py --help`."""

import sys

import tyro

from sdxl_eqx.config import ReportConfig
from sdxl_eqx.console import talk
from sdxl_eqx.flags import parse


def main() -> int:
    """Run the command line; returns the exit code."""
    log = talk()
    asked, rest = tyro.cli(ReportConfig, return_unknown_args=True)
    config = parse(rest)
    if not config.parallel.compile_topology:
        log.error("error: --compile-topology: name the devices, as v5p:2x2x1, v5e:16x16 or h100x8.")
        return 2

    # Imported here, so that --help and wrong flags answer at once.
    from sdxl_eqx.training.report import answer

    return answer(config, asked)


if __name__ == "__main__":
    sys.exit(main())

"""Draw pictures: `python scripts/generate.py --prompt "a castle"`; --help lists all flags."""

import sys

from sdxl_eqx.console import talk
from sdxl_eqx.flags import parse_generate


def main() -> int:
    """Run the command line; returns the exit code."""
    log = talk()
    config = parse_generate(sys.argv[1:])

    # Imported here, so that --help and wrong flags answer at once.
    from sdxl_eqx.generation.memory import OutOfMemory
    from sdxl_eqx.generation.script import draw_pictures
    from sdxl_eqx.parallel.begin import begin_jax, configure_jax

    try:
        begin_jax(config.machine)
        configure_jax(config.machine, config.model.precision)
        files = draw_pictures(config)
    except (ValueError, OSError, OutOfMemory) as error:
        log.error("error: %s", error)
        return 2
    log.info("%d %s in %s", len(files), "file" if len(files) == 1 else "files", config.output.images_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train Stable Diffusion XL: `python scripts/train.py --help`."""

import sys

from sdxl_eqx.config import ReportConfig
from sdxl_eqx.console import talk
from sdxl_eqx.flags import parse


def main() -> int:
    """Run the command line; returns the exit code."""
    log = talk()
    config = parse(sys.argv[1:])

    # Imported here, so that --help and wrong flags answer at once.
    if config.parallel.compile_topology:
        from sdxl_eqx.training.report import answer

        return answer(config, ReportConfig())
    from sdxl_eqx.training.timings import Timings

    timings = Timings()
    with timings.of("import"):
        from sdxl_eqx.parallel.begin import begin_jax
        from sdxl_eqx.training.errors import RunError
        from sdxl_eqx.training.loop import fit
        from sdxl_eqx.training.setup import Finished, prepare
        from sdxl_eqx.training.showing import farewell

    try:
        begin_jax(config.run)
        run = prepare(config, timings)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    if isinstance(run, Finished):
        log.info("%s is finished (step %d). More: --max-train-steps, or another --run-name.", run.folder, run.step)
        return 0
    try:
        outcome = fit(run, timings)
    except (RunError, OSError) as error:
        log.error("error: %s", error)
        return 2
    finally:
        run.checkpoints.close()
        run.folder.close()
    log.info("%s", farewell(run, outcome.step, was_stopped=outcome.signal != 0))
    return 128 + outcome.signal if outcome.signal else 0


if __name__ == "__main__":
    sys.exit(main())

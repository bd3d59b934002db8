"""Measure this project beside what it is compared to: `python scripts/benchmark.py --help`."""

import sys

import tyro

from sdxl_eqx.benchmarks.config import AttentionBenchmark, DataBenchmark, GenerateBenchmark, StepBenchmark
from sdxl_eqx.console import talk

COMMANDS = {
    "data": DataBenchmark,
    "generate": GenerateBenchmark,
    "attention": AttentionBenchmark,
    "step": StepBenchmark,
}


def main() -> int:
    """Run the command line; returns the exit code."""
    config = tyro.extras.subcommand_cli_from_dict(COMMANDS, description=__doc__)
    log = talk()
    try:
        measure(config)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    return 0


def measure(config: DataBenchmark | GenerateBenchmark | AttentionBenchmark | StepBenchmark) -> None:
    """Run what a subcommand asks for. Each is imported here, so that --help and wrong flags answer at once."""
    import jax

    # Some need no accelerator, others leave it to their sides.
    jax.config.update("jax_platforms", "cpu")
    if isinstance(config, DataBenchmark):
        from sdxl_eqx.benchmarks import data

        data.measure(config)
    elif isinstance(config, GenerateBenchmark):
        from sdxl_eqx.benchmarks import drawing

        drawing.measure(config)
    elif isinstance(config, AttentionBenchmark):
        from sdxl_eqx.benchmarks import attention

        attention.measure(config)
    else:
        from sdxl_eqx.benchmarks import step

        step.measure(config)


if __name__ == "__main__":
    sys.exit(main())

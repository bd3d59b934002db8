"""Train Stable Diffusion XL: `python scripts/train.py --help`."""

import shlex
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
    from sdxl_eqx.parallel.begin import begin_jax
    from sdxl_eqx.training.errors import RunError
    from sdxl_eqx.training.loop import fit
    from sdxl_eqx.training.setup import Finished, prepare

    try:
        begin_jax(config.run)
        run = prepare(config)
    except (ValueError, OSError) as error:
        log.error("error: %s", error)
        return 2
    if isinstance(run, Finished):
        log.info("%s is finished (step %d). More: --max-train-steps, or another --run-name.", run.folder, run.step)
        return 0
    folder, dtype = run.folder.path, config.checkpoint.export_dtype
    again = f"python scripts/train.py --config {shlex.quote(str(run.folder.config))}"
    try:
        outcome = fit(run)
    except (RunError, OSError) as error:
        log.error("error: %s", error)
        return 2
    finally:
        run.checkpoints.close()
        run.folder.close()
    if outcome.signal:
        log.info("saved at step %d; continue with:\n%s", outcome.step, again)
        return 128 + outcome.signal
    log.info(
        "\ndone: %s\n  samples/     pictures drawn while training\n  checkpoints/ to resume or load with load_unet\n"
        "  export/      diffusers folder in %s\n  tensorboard/ tensorboard --logdir %s\n"
        "Load it: StableDiffusionXLPipeline.from_pretrained(%r, torch_dtype=torch.%s)\n"
        "Draw with it: python scripts/generate.py --pretrained-model-name-or-path %s --prompt ...\n"
        "Train on, with more --max-train-steps:\n%s",
        folder, dtype, folder / "tensorboard", str(folder / "export"), dtype, shlex.quote(str(folder)), again,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

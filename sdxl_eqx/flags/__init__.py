"""The flags of training and generation: every published name on the command line and in a YAML file."""

from sdxl_eqx.flags.command_line import parse, parse_generate
from sdxl_eqx.flags.files import read
from sdxl_eqx.flags.names import GENERATE_NAMES, NAMES, FlagError, merge
from sdxl_eqx.flags.switches import GENERATE_SWITCHES, SWITCHES

__all__ = [
    "GENERATE_NAMES", "GENERATE_SWITCHES", "NAMES", "SWITCHES", "FlagError", "merge", "parse", "parse_generate", "read"
]  # fmt: skip

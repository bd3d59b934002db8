"""The flags of training: every published name on the command line and in a YAML file."""

from sdxl_eqx.flags.command_line import parse
from sdxl_eqx.flags.files import read
from sdxl_eqx.flags.names import NAMES, FlagError, merge
from sdxl_eqx.flags.switches import SWITCHES

__all__ = ["NAMES", "SWITCHES", "FlagError", "merge", "parse", "read"]

"""Where a script's words go: plain lines, also while a progress bar stands there."""

import logging
import sys


class _Lines(logging.Handler):
    """News to standard output, warnings and errors to standard error.

    They are looked up for each line, since a progress bar replaces both while it is shown.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        stream.write(self.format(record) + "\n")
        stream.flush()


def talk() -> logging.Logger:
    """This project's logger, shown from INFO up; what libraries say is shown from WARNING up."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Lines()], force=True)
    log = logging.getLogger("sdxl_eqx")
    log.setLevel(logging.INFO)
    return log

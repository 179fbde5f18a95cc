"""The process of one command: `irkd`, `python -m irkd_dist`, and so `accelerate launch -m irkd_dist`."""

import atexit
import os
import sys
import traceback
from typing import NoReturn

from irkd_dist.cli import main
from irkd_dist.errors import place, say


def program() -> NoReturn:
    """Run the command of this process and end it.

    The interpreter's own way out takes torch's modules apart, object by object, which costs over a second, and lets
    C++ destructors meet threads that still wait in a collective, which aborts. What has registered to be called at
    the end is called; the rest is the operating system's.
    """
    try:
        code = main()
    except Exception as error:
        _say(error)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(error: Exception) -> None:
    """Print the traceback, each line with its rank and host if there are several; torchrun's summary gets it too."""
    for line in traceback.format_exc().splitlines():
        say(place() + line)
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    program()

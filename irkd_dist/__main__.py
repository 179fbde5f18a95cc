"""The process of one command: `irkd`, `python -m irkd_dist`, and so `accelerate launch -m irkd_dist`."""

import atexit
import contextlib
import io
import os
import sys
from typing import NoReturn

from irkd_dist.cli import main


def program() -> NoReturn:
    """Run the command of this process and end it.

    The interpreter's own way out takes torch's modules apart, object by object, which costs over a second, and lets
    C++ destructors meet threads that still wait in a collective, which aborts. What has registered to be called at
    the end is called; the rest is the operating system's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII gets what it cannot show as \\xb1
            stream.reconfigure(errors="backslashreplace")
    code = main()
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):  # whoever read has read enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    program()

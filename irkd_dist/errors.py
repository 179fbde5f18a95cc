"""How a command ends other than well: each is printed as a single line, once for all processes of a run."""

import errno
import os
import socket
import sys
import tempfile
import time
import traceback
import unicodedata
from pathlib import Path

EXIT_USER, EXIT_STOPPED = 2, 75  # 75: EX_TEMPFAIL, try again later
LONGEST = 2000  # characters of a message

_NO_TEXT = {"Cc", "Cs", "Zl", "Zp"}  # Unicode's categories of controls, surrogates, line and paragraph ends
# what a network file system answers while it is away, or a disk
AWAY = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EHOSTDOWN, errno.ENOTCONN, errno.ESHUTDOWN
}  # fmt: skip


class UserError(Exception):
    """Something in the input, the configuration or the machine is wrong; exit code 2.

    The message names the value, where it came from and what would be right. Here it becomes one line that any terminal
    can show, whatever the value holds.
    """

    # another process has printed it; None: not known, then one on each host prints it
    said: bool | None = None

    def __init__(self, message: str) -> None:
        super().__init__(_cut(printable(message)))


class Passing(UserError):
    """What the next start may not meet: processes that differ, a file system that does not answer. The run goes on."""


class Superseded(UserError):
    """Another start of the same run has taken over its folder."""


class Lost(Exception):
    """Another process of the run is gone; exit code 1. The message is what that one said, if it could."""


class Stopped(Exception):
    """A signal asked the run to stop, and its checkpoint is written; exit code 75. The same command goes on."""


def unreadable(file: Path, error: OSError) -> UserError:
    """The error of a file that is there and cannot be read: `Passing` if the file system may come back."""
    kind = Passing if error.errno in AWAY else UserError
    return kind(f"{file} cannot be read: {reason(error)}")


def printable(text: str) -> str:
    """Text that any terminal, page or picture can show: control characters and lone surrogates are escaped."""
    return "".join(ascii(c)[1:-1] if unicodedata.category(c) in _NO_TEXT else c for c in text)


def one_line(error: BaseException) -> str:
    """The text of an error of a library, which may have several lines or none."""
    return " ".join(str(error).split()) or type(error).__name__


def reason(error: BaseException) -> str:
    """Why a file cannot be read or written, without the file's name, which the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def _cut(text: str) -> str:
    """A text that is too long without its middle: what is wrong stands at its start, what is right at its end."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2 - 30
    return f"{text[:half]} ... ({len(text) - 2 * half} characters) ... {text[-half:]}"


def say(line: str) -> None:
    """Print an error as a whole: `print` writes the line's end by itself, and another process may come between."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def place() -> str:
    """`[rank 3 on node-b] ` in one of several processes, else nothing: who prints a line."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ""
    return f"[rank {os.environ.get('RANK')} on {socket.gethostname()}] "


def _temporary() -> Path | None:
    try:
        return Path(tempfile.gettempdir())
    except OSError:  # no folder can be written
        return None


def keep_traceback(error: BaseException, folder: Path | None) -> str:
    """Write an error's traceback to a new file, in a run folder or else the temporary one; returns where it is.

    Where nothing can be written it is printed.
    """
    text = "".join(traceback.format_exception(error))
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{socket.gethostname()}-{os.getpid()}.txt"
    for place_of_it in (folder, _temporary()):
        try:
            if place_of_it is not None and place_of_it.is_dir():
                with (place_of_it / name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"{' '.join(sys.argv)}\n{place()}\n{text}")
                return f"the traceback is in {place_of_it / name}"
        except OSError:
            continue
    for line in text.splitlines():
        say(place() + line)
    return "the traceback is above"

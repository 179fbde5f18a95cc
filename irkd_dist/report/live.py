"""A page that is kept current while its runs go on."""

from __future__ import annotations

import time
from pathlib import Path

from irkd_dist import runfolder, status
from irkd_dist.errors import UserError
from irkd_dist.report import page


def live(
    folders: list[Path], out: Path | None = None, *, price: float | None = None, every: float = 30.0
) -> int:
    """Write the report whenever a run has something new, until all are finished or failed, or Ctrl-C is pressed.

    The page loads itself again every `every` seconds, so that a browser shows the newest one. The last one, written
    when no run goes on, does not.

    Returns:
        0; 130 if it was interrupted.

    Raises:
        UserError: as `page.write`.
    """
    written, seen = Path(), None
    try:
        while True:
            over, now = all(_over(f) for f in folders), [_stamp(f) for f in folders]
            if now != seen or over:
                written = page.write(folders, out, price=price, reload_s=None if over else every)
                print(f"{time.strftime('%H:%M:%S')} {written}", flush=True)
                seen = now
            if over:
                return 0
            time.sleep(every)
    except KeyboardInterrupt:
        print(f"irkd report: {written} stays as it is; the runs go on without it")
        return 130


def _over(run: Path) -> bool:
    """Whether nothing more is to come: it has ended, or failed."""
    try:
        return status.read(run).state in ("finished", "failed")
    except UserError:
        return False  # not begun


def _stamp(run: Path) -> tuple[int, int]:
    """What changes whenever a run writes something down."""
    try:
        told = (run / runfolder.EVENTS).stat()
    except OSError:
        return 0, 0
    return told.st_size, told.st_mtime_ns

"""Runs targets on mutants, each in a process of its own, for so many seconds; prints inputs and findings by target.

python -m tests.fuzz.driver --minutes 60 [--target NAME]... [--out FOLDER]: the smallest input of
each place in the code that was found is written to FOLDER. Exit code 1 if there is one.

A process says what it is about to read before it reads it, so that a crash in native code leaves its input behind; one
that does not come back is killed. What ends an input as no input before is mutated further.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import mmap
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from irkd_dist.errors import UserError
from tests.fuzz import formats, targets

LIMIT = 2.0  # seconds of the processor that an input may take
KILL = 15.0  # seconds after which it is taken for hung, in native code or waiting
MEMORY = 4 << 30  # bytes that an input may ask for
LINES, LENGTH = 5, 4000  # of a message
ROOM = 2 << 20  # bytes for the present input
_HEAD = struct.Struct("<Qdq")  # inputs so far, when the present one began, its size


class TooLong(BaseException):
    """An input took more than LIMIT; nobody's `except Exception` is meant."""


@dataclass
class Finding:
    """Inputs that ended other than well or in one line, at one place in the code."""

    target: str
    where: str
    message: str
    data: bytes = field(repr=False)
    times: int = 1


@dataclass
class Result:
    """What a target's time brought."""

    target: str
    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)


def seeds(name: str) -> list[bytes]:
    """Small real files, and what was found before."""
    run = targets.CORPUS / "run"
    real = {
        "state": "checkpoints/step-00000004/state.json", "weights": "checkpoints/step-00000004/student.safetensors",
        "moments": "checkpoints/step-00000004/optimizer.safetensors", "events": "events.jsonl", "status": "status.json",
        "run_config": "config.yaml", "samples": "samples/rank-00000.jsonl", "evaluation": "evaluation.json",
        "panels": "panels/stage-01-epoch-001.npz",
    }  # fmt: skip
    files = [run / real[name]] if name in real else []
    folder = targets.CORPUS / name
    if name == "image":
        files += [
            f for other in ("png", "jpg", "webp", "npy") for f in sorted((targets.CORPUS / other).iterdir())
        ]
    return [f.read_bytes() for f in (*files, *(sorted(folder.iterdir()) if folder.is_dir() else ()))]


def attempt(name: str, data: bytes) -> tuple[str, str] | None:
    """Read one input; (place in the code, what happened) if it ended neither well nor in a few readable lines.

    Raises UserError with its message when that is how it ended.
    """
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    try:
        targets.TARGETS[name](data)
    except UserError as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        problem = unreadable(str(error))
        if problem is None:
            raise
        return _place(error), f"UserError {problem}: {str(error)[:300]!r}"
    except BaseException as error:
        signal.setitimer(signal.ITIMER_PROF, 0)
        return _place(error), f"{type(error).__name__}: {str(error)[:300]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return None


def unreadable(message: str) -> str | None:
    """Why a message is none for a person at a terminal."""
    lines = message.splitlines()
    if not message.strip():
        return "without a word"
    if len(lines) > LINES:
        return f"of {len(lines)} lines"
    if len(message) > LENGTH:
        return f"of {len(message):,} characters"
    if any(ord(c) < 32 and c != "\n" for c in message):
        return "with control characters"
    return None


def run(name: str, seconds: float, seed: int) -> Result:
    """Give one target so many seconds; its process is started again after each crash."""
    result, started = Result(name), time.monotonic()
    shared = mmap.mmap(-1, _HEAD.size + ROOM)
    turn = 0
    while (left := seconds - (time.monotonic() - started)) > 0.2 or not turn:
        ours, theirs = Pipe(duplex=False)
        shared[: _HEAD.size] = _HEAD.pack(0, 0.0, -1)
        child = os.fork()
        if child == 0:
            ours.close()
            _work(name, max(left, 0.2), f"{seed}-{name}-{turn}", shared, theirs)
        theirs.close()
        killed = _wait(child, ours, shared, result)
        inputs, _, size = _HEAD.unpack(shared[: _HEAD.size])
        result.inputs += inputs
        if killed and size >= 0:
            result.inputs += 1
            _note(result, Finding(name, killed, killed, bytes(shared[_HEAD.size : _HEAD.size + size])))
        turn += 1
    result.seconds = time.monotonic() - started
    return result


def _wait(child: int, ours: Connection, shared: mmap.mmap, result: Result) -> str | None:
    """Take what the process finds until it ends; how it ended, if not by itself."""
    hung, status = False, None
    while status is None:
        try:
            while ours.poll(0.2):
                message = ours.recv()
                if isinstance(message, int):
                    result.refused += message
                else:
                    _note(result, Finding(result.target, *message))
        except (EOFError, OSError):
            status = os.waitpid(child, 0)[1]
            break
        began = _HEAD.unpack(shared[: _HEAD.size])[1]
        if began and time.monotonic() - began > KILL:
            hung = True
            os.kill(child, signal.SIGKILL)
    if hung:
        return f"hangs, over {KILL:.0f} s"
    return f"killed by {signal.Signals(status & 127).name}" if status & 127 else None


def _note(result: Result, finding: Finding) -> None:
    known = result.findings.get(finding.where)
    if known is None:
        result.findings[finding.where] = finding
    else:
        known.times += 1
        if len(finding.data) < len(known.data):
            known.data, known.message = finding.data, finding.message


def _work(name: str, seconds: float, seed: str, shared: mmap.mmap, results: Connection) -> None:
    """The process: mutants until the time is over. Does not return."""
    os.setpgid(0, 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    faulthandler.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGPROF, _too_long)
    targets.scratch.cache_clear()
    rng, pool, seen, refused = random.Random(seed), seeds(name), set(), 0
    number, end = 0, time.monotonic() + seconds
    first = list(pool)
    found: dict[str, int] = {}
    while time.monotonic() < end:
        data = first.pop(0) if first else formats.mutants(name, rng.choice(pool), rng)
        shared[_HEAD.size : _HEAD.size + len(data)] = data
        shared[: _HEAD.size] = _HEAD.pack(number, time.monotonic(), len(data))
        number += 1
        try:
            problem = attempt(name, data)
            outcome = "well"
        except UserError as error:
            problem, outcome = None, re.sub(r"'[^']*'|\d+", "", str(error))[:60]
            refused += 1
        if problem is not None:
            where, what = problem
            found[where] = found.get(where, 0) + 1
            small = _smaller(name, data, where, end) if found[where] == 1 else data
            results.send((where, what, small))
            outcome = where
        if outcome not in seen and len(pool) < 300 and len(data) < 1 << 16:
            seen.add(outcome)
            pool.append(data)
    shared[: _HEAD.size] = _HEAD.pack(number, 0.0, -1)
    results.send(refused)
    results.close()
    shutil.rmtree(targets.scratch(), ignore_errors=True)
    os._exit(0)


def _smaller(name: str, data: bytes, where: str, end: float) -> bytes:
    """Cut out what the finding does not need, for two seconds at most."""
    end = min(end, time.monotonic() + 2.0)
    size = len(data) // 2
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            try:
                problem = attempt(name, shorter)
            except UserError:
                problem = None
            if problem is not None and problem[0] == where:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def _too_long(_number: int, _frame: FrameType | None) -> None:
    raise TooLong(f"over {LIMIT:.0f} s")


def _place(error: BaseException) -> str:
    """Kind of error, and the last line of the package on the way to it."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "irkd_dist" in f.filename]
    frame = own[-1] if own else None
    kind = type(error).__name__
    where = f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" if frame else "the target"
    return f"{kind} in {where}"


def table(results: list[Result]) -> str:
    """Inputs by target."""
    lines = [f"{'target':<12} {'inputs':>9} {'refused':>9} {'per s':>7} {'findings':>9}"]
    for r in results:
        rate = r.inputs / max(r.seconds, 1e-9)
        lines.append(f"{r.target:<12} {r.inputs:>9,} {r.refused:>9,} {rate:>7,.0f} {len(r.findings):>9}")
    total, refused = sum(r.inputs for r in results), sum(r.refused for r in results)
    found = sum(len(r.findings) for r in results)
    lines.append(f"{'all':<12} {total:>9,} {refused:>9,} {'':>7} {found:>9}")
    return "\n".join(lines)


def save(result: Result, out: Path) -> None:
    """Write each finding's input, and what it did beside it."""
    for finding in result.findings.values():
        digest = hashlib.sha256(finding.data).hexdigest()[:12]
        folder = out / finding.target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / digest).write_bytes(finding.data)
        (folder / f"{digest}.txt").write_text(
            f"{finding.where}\n{finding.message}\n{finding.times} times\n", errors="replace"
        )


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all targets together")
    parser.add_argument(
        "--target", action="append", choices=list(targets.TARGETS), help="only this one; may be given again"
    )
    parser.add_argument("--out", type=Path, help="folder for the inputs of findings")
    parser.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the mutations (default: the time)"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    names = arguments.target or list(targets.TARGETS)
    each = arguments.minutes * 60 / len(names)
    targets.prepare()
    results = []
    print(f"seed {arguments.seed}, {each:.1f} s a target", flush=True)
    for name in names:
        results.append(run(name, each, arguments.seed))
        last = results[-1]  # said at once: a night's run may be stopped
        print(
            f"{name}: {last.inputs:,} inputs, {last.refused:,} refused, {len(last.findings)} findings",
            flush=True,
        )
        for finding in results[-1].findings.values():
            print(
                f"{name}: {finding.where} ({finding.times} times): {finding.message}\n  {finding.data[:200]!r}",
                flush=True,
            )
        if arguments.out:
            save(results[-1], arguments.out)
    print(table(results))
    if arguments.json:
        plain = [
            {
                "target": r.target,
                "inputs": r.inputs,
                "findings": [{**asdict(f), "data": f.data.hex()} for f in r.findings.values()],
            }
            for r in results
        ]
        arguments.json.write_text(json.dumps(plain))
    return int(any(r.findings for r in results))


if __name__ == "__main__":
    sys.exit(main())

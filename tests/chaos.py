"""Faults injected into real runs, and what must hold afterwards: used by test_faults.py and by `make chaos`.

`python -m tests.chaos --faults 200 --seed 7` draws faults from the seed, lets several hit each run, gives the same
command again until the run ends, each time on one, two or four processes, and compares with the unbroken run of one
process: weights and moments bitwise, every step once, every sample once. Prints a table and a line of counts; exits
with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from irkd_dist import checkpoint
from irkd_dist.data import sampler
from irkd_dist.eventlog import read_events, read_samples
from tests.training.launch import REPOSITORY

IMAGES, BATCH, EPOCH_STEPS = 110, 32, 4
TRANSITION, STEPS = 8, 16
SETTINGS = [
    "track.samples=true", "track.log_every=1", "checkpoint.every_steps=3", "rank_timeout_s=3",
    "student.dropout=0.1", "augment.mixup=0.4", "optim.policy=reset",
]  # fmt: skip


VIRTUAL = [*SETTINGS, "data.virtual_ranks=4"]  # any of the soak's worlds ends with the same bits
WORLDS = (1, 2, 2, 4)


MARK = "IRKD_STARTED_AS"  # environment variable
_marks, _mark_of = itertools.count(), dict[int, str]()


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong: by IRKD_FAULT inside the run, or by what is done to it from outside."""

    name: str
    inject: str = ""  # IRKD_FAULT
    damage: str = ""  # of the newest checkpoint, before the next start: flip, truncate, remove
    kill_launcher_after: int | None = None  # step that the log has reached
    leaves_out: int | None = None  # step that no rank takes


@dataclass
class Outcome:
    code: int
    text: str
    seconds: float
    orphans: int = 0


def start(
    config: Path, name: str, world: int, *more: str, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a run as a user would: under torchrun, one thread a process."""
    train = ["-m", "irkd_dist", "train", str(config), f"name={name}", *SETTINGS, *more]
    launcher = [
        "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1", f"--nproc-per-node={world}",
    ]  # fmt: skip
    command = [sys.executable, *(launcher if world > 1 else []), *train]
    return launch(command, env or {})


def launch(command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a program whose processes `members` finds again, however deep and in whatever session."""
    mark = f"{os.getpid()}-{next(_marks)}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PET_SHUTDOWN_TIMEOUT": "3", **env, MARK: mark}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    _mark_of[process.pid] = mark
    return process


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Outcome:
    """Wait for the launcher, and count and kill the processes it leaves behind; at the time-out it is one of them."""
    began, text, late = time.monotonic(), "", ""
    try:
        text, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        late = f"\nno end after {timeout} s"
    orphans = members(process)
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if late:
        text, _ = process.communicate()
    return Outcome(process.returncode, text + late, time.monotonic() - began, len(orphans))


def members(process: subprocess.Popen[str]) -> list[int]:
    """Live processes that a launched program has started, itself included."""
    found, mark = [], f"{MARK}={_mark_of[process.pid]}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def strike(config: Path, name: str, world: int, fault: Fault, *more: str) -> Outcome:
    """One start of the run with one fault in it."""
    run = config.parent / name
    if fault.damage:
        damage_newest(run, fault.damage)
        return Outcome(0, "", 0.0)
    process = start(config, name, world, *more, env={"IRKD_FAULT": fault.inject})
    if fault.kill_launcher_after is None:
        return finish(process)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and reached(run) < fault.kill_launcher_after:
        time.sleep(0.02)
    process.kill()
    began = time.monotonic()
    while members(process) and time.monotonic() - began < 20:
        time.sleep(0.1)
    return finish(process)


def reached(run: Path) -> int:
    """The last step that the run has logged."""
    try:
        return max((e["step"] for e in read_events(run) if e["event"] == "train"), default=0)
    except Exception:
        return 0


def damage_newest(run: Path, how: str) -> None:
    folders = sorted((run / "checkpoints").glob("step-*"))
    if len(folders) < 2:
        return  # nothing older to fall back to is damage that no program can mend
    target = folders[-1] / (checkpoint.STUDENT if how != "remove" else checkpoint.OPTIMIZER)
    data = target.read_bytes()
    if how == "flip":
        target.write_bytes(data[:-9] + bytes([data[-9] ^ 4]) + data[-8:])
    elif how == "truncate":
        target.write_bytes(data[: len(data) // 2])
    else:
        target.unlink()


def final(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a finished run."""
    folder = run / "checkpoints" / checkpoint.name(STEPS)
    return load_file(folder / checkpoint.STUDENT) | load_file(folder / checkpoint.OPTIMIZER)


def losses_of(run: Path, reference: Path, left_out: set[int]) -> list[str]:
    """What was lost: nothing, if the run is as the unbroken reference."""
    wrong = []
    status = json.loads((run / "status.json").read_text())
    if status["state"] != "finished":
        return [f"state {status['state']}: {status['reason']}"]
    one, other = final(reference), final(run)
    if one.keys() != other.keys() or not all(torch.equal(one[k], other[k]) for k in one):
        wrong.append("other weights or moments")
    steps = [e["step"] for e in read_events(run) if e["event"] == "train"]
    if steps != [s + 1 for s in range(STEPS) if s not in left_out]:
        wrong.append(f"steps {steps}")
    samples = read_samples(run)
    for step in range(STEPS):
        epoch, within = divmod(step, EPOCH_STEPS)
        due = sorted(sampler.global_batch(0, epoch, within, IMAGES, BATCH).tolist())
        if step not in left_out and samples.get(step) != due:
            wrong.append(f"samples of step {step}")
        if step in left_out and step in samples:
            wrong.append(f"step {step} was trained on")
    return wrong


def draw(dice: random.Random, world: int, begin: int) -> Fault:
    """A random fault at or after step `begin`."""
    at, rank = dice.randrange(begin, STEPS), dice.randrange(world)
    write = min(-(-max(at, 1) // 3) * 3, STEPS)
    kinds = [
        Fault("SIGKILL of a rank", f"sigkill@step:{at}:{rank}"),
        Fault("SIGKILL in a checkpoint's write", f"sigkill@write:{write}:0"),
        Fault("SIGTERM to one rank", f"sigterm@step:{at}:{rank}"),
        Fault("SIGUSR1 to one rank", f"sigusr1@step:{at}:{rank}"),
        Fault(
            "SIGTERM twice, in a write", f"sigterm@write:{write}:0,sigterm@step:{min(write + 1, 15)}:{rank}"
        ),
        Fault("SIGSTOP of a rank", f"sigstop@step:{at}:{rank}"),
        Fault("launcher killed", kill_launcher_after=at),
        Fault("disk full in a write", f"nospace@write:{write}:0"),
        Fault("checkpoint: flipped byte", damage="flip"),
        Fault("checkpoint: truncated", damage="truncate"),
        Fault("checkpoint: file missing", damage="remove"),
    ]
    if begin <= TRANSITION:
        kinds += [
            Fault("SIGKILL in a transition", f"sigkill@transition:{TRANSITION}:{rank}"),
            Fault("SIGKILL in an optimizer reset", f"sigkill@reset:{TRANSITION}:{rank}"),
        ]
    if world == 1:
        kinds = [k for k in kinds if k.name not in ("launcher killed", "SIGSTOP of a rank")]
    return dice.choice(kinds)


def not_finite(dice: random.Random, world: int) -> Fault:
    step, kind, where = dice.choice((1, 6, 9)), dice.choice(("nan", "inf")), dice.choice(("loss", "gradient"))
    what = f"{kind} loss on one rank" if where == "loss" else f"{kind} in one element of one rank's gradient"
    return Fault(what, f"{kind}@{where}:{step}:{dice.randrange(world)}", leaves_out=step)


@dataclass
class Soak:
    """Counts of a soak."""

    folder: Path
    faults: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    references: dict[int | None, str] = field(default_factory=dict)
    changes: int = 0  # of the world, between two starts of a run

    def reference(self, left_out: int | None) -> Path:
        """The unbroken run of one process to compare with, made when first asked for."""
        if left_out not in self.references:
            self.references[left_out] = name = f"reference-{left_out}"
            more = [] if left_out is None else [f"data.leave_out=[{left_out}]"]
            done = finish(start(self.folder / "student.yaml", name, 1, *VIRTUAL, *more))
            assert done.code == 0, done.text[-3000:]
        return self.folder / self.references[left_out]

    def run(self, number: int, dice: random.Random, left: int) -> int:
        """One run and the faults that hit it; returns how many."""
        config, name = self.folder / "student.yaml", f"run-{number:04d}"
        planned: list[Fault] = []
        worlds = [dice.choice(WORLDS)]
        first = not_finite(dice, worlds[0]) if dice.random() < 0.25 else None
        done = Outcome(1, "", 0.0)
        for _ in range(min(left, dice.randrange(2, 5))):
            begin = min(reached(self.folder / name) + 1, STEPS - 1) if (self.folder / name).exists() else 0
            fault = first or draw(dice, worlds[-1], begin)
            first = None
            planned.append(fault)
            done = strike(config, name, worlds[-1], fault, *VIRTUAL)
            worlds.append(dice.choice(WORLDS))
            self.faults[fault.name] += 1
            self.seconds[fault.name] += round(done.seconds)
            if done.orphans:
                self.problems.append(f"{name}: {fault}: {done.orphans} orphans")
                self.lost[fault.name] += 1
            if fault.leaves_out is not None:
                break  # the step is left out in this start alone: nothing may repeat it
        left_out = {f.leaves_out for f in planned if f.leaves_out is not None}
        for _ in range(3):
            if ended(self.folder / name):
                break
            done = finish(start(config, name, worlds[-1], *VIRTUAL))
        self.changes += sum(a != b for a, b in itertools.pairwise(worlds))
        wrong = losses_of(self.folder / name, self.reference(next(iter(left_out), None)), left_out)
        if wrong:
            self.problems.append(f"{name} (worlds {worlds}): {planned}: {wrong}\n{done.text[-1500:]}")
            self.lost[planned[-1].name] += 1
        shutil.rmtree(self.folder / name)
        return len(planned)


def ended(run: Path) -> bool:
    """Whether the run is finished, and its last checkpoint undamaged."""
    if not (run / "status.json").exists() or status(run) != "finished":
        return False
    newest, _ = checkpoint.newest(run / "checkpoints")
    return newest is not None and newest.name == checkpoint.name(STEPS)


def status(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def prepare(folder: Path) -> Path:
    """Shards, a teacher and a student's configuration."""
    from irkd_dist.data import render
    from irkd_dist.data.sources import open_source
    from tests.training.conftest import STUDENT_YAML, TEACHER_YAML
    from tests.training.launch import irkd

    source = open_source("synthetic", None, samples={"train": 123, "test": 20}, size=16)
    render.render(
        source, folder / "shapes", render.Options((8, 12, 16), samples_per_shard=50, val_fraction=0.105)
    )
    (folder / "teacher.yaml").write_text(TEACHER_YAML.format(shards=folder / "shapes", out=folder))
    irkd("train", str(folder / "teacher.yaml"))
    config = folder / "student.yaml"
    teacher = folder / "teacher-seed0"
    config.write_text(STUDENT_YAML.format(shards=folder / "shapes", teacher=teacher, out=folder))
    return config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="irkd-chaos-") as made:
        soak, began = Soak(Path(made)), time.monotonic()
        prepare(soak.folder)
        count, dice = 0, random.Random(arguments.seed)
        for number in itertools.count():
            if count >= arguments.faults:
                break
            count += soak.run(number, dice, arguments.faults - count)
            print(
                f"{count:4d} faults, {sum(soak.lost.values())} lost, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    print("\n| fault | injected | lost | mean seconds to the end of that start |\n|---|---|---|---|")
    for name, injected in sorted(soak.faults.items()):
        seconds = f"{soak.seconds[name] / injected:.1f}" if soak.seconds[name] else "-"
        print(f"| {name} | {injected} | {soak.lost[name]} | {seconds} |")
    for problem in soak.problems:
        print(problem)
    lost = sum(soak.lost.values())
    print(
        f"\nchaos: seed {arguments.seed}, {count} faults in {number} runs, the world changed {soak.changes} times, "
        f"{lost} lost"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())

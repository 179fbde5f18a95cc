"""Images per second against the latency and bandwidth of the network between three hosts.

The hosts are network namespaces of this machine (root, Debian's iproute2), one process each, under torchrun; bandwidth
is set by `tc tbf` on each host's interface, latency (one way) by a wire in user space that delays each frame, since
not every kernel has `tc netem`. One run trains all the time while the network changes under it, in an order that
differs from round to round; so a figure is the median of the steps of its windows, and the spread is over rounds.
Linux's TCP sends slowly again after each pause, such as the compute of a step; two rows show it without
(net.ipv4.tcp_slow_start_after_idle=0).

What to read off is the time that a step takes longer: the compute of a step is this machine's, the communication is
nearly only the network's. It is compared with the ring's arithmetic: each host sends 2 (n-1)/n of the gradient, 4
bytes a parameter, in 2 (n-1) turns for each of DDP's buckets.

    PYTHONPATH=. python benchmarks/network.py [--rounds 3] [--seconds 12]
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from irkd_dist.data import render
from irkd_dist.data.sources import open_source
from tests.cluster.hosts import Host, Program, Wire, hosts, missing

HOSTS, BATCH, PORT = ("alpha", "beta", "gamma"), 24, 29500
Link = tuple[float, float | None, bool]  # one-way latency in ms, Mbit/s, TCP starts slowly after each pause
LINKS: list[Link] = [
    (0, None, True), (0.1, None, True), (1, None, True), (5, None, True), (20, None, True),
    (5, None, False), (20, None, False),
    (0.1, 1000, True), (0.1, 300, True), (0.1, 100, True), (5, 300, True),
]  # fmt: skip
CONFIG = """
data: {{batch: {batch}, shards: {shards}}}
student: {{name: vit_tiny, patch: 4}}
fixed: {{resolution: 32, epochs: 100000}}
precision: bf16
rank_timeout_s: 120
checkpoint: {{keep: 1}}
track: {{log_every: 1, panels: 0}}
out: {out}
"""


def prepare(folder: Path) -> Path:
    """Shards and a configuration: ViT-Tiny at 32 px, cross-entropy alone."""
    source = open_source("synthetic", None, samples={"train": 24000, "test": 24}, size=32)
    render.render(source, folder / "shards", render.Options((32,), val_fraction=0.001, workers=2))
    config = folder / "network.yaml"
    config.write_text(CONFIG.format(batch=BATCH, shards=folder / "shards", out=folder))
    return config


def start(made: list[Host], config: Path) -> list[Program]:
    """torchrun on each host, one process each."""
    return [
        host.start(
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(made)}", "--nproc-per-node=1",
            f"--node-rank={rank}", f"--master-addr={made[0].address}", f"--master-port={PORT}",
            "-m", "irkd_dist", "train", str(config),
        )
        for rank, host in enumerate(made)
    ]  # fmt: skip


def steps(run: Path) -> list[tuple[float, float]]:
    """Moment and seconds of each step so far."""
    lines = (run / "events.jsonl").read_text().splitlines() if (run / "events.jsonl").is_file() else []
    events = [json.loads(line) for line in lines if line.endswith("}")]
    return [(e["time"], e["seconds"]) for e in events if e["event"] == "train"]


def measure(made: list[Host], wire: Wire, run: Path, rounds: int, seconds: float) -> dict[Link, list[float]]:
    """Seconds per step at each link, one median a round."""
    found: dict[Link, list[float]] = {link: [] for link in LINKS}
    dice = random.Random(0)
    for _ in range(rounds):
        for link in dice.sample(LINKS, len(LINKS)):
            latency, mbit, slow = link
            wire.delay = latency / 1000
            for host in made:
                host.limit(mbit)
                host.slow_start(slow)
            time.sleep(2)  # a step that saw both
            begin = time.time()
            while (
                len(taken := [s for at, s in steps(run) if at > begin]) < 5 or time.time() < begin + seconds
            ):
                time.sleep(0.2)
            found[link].append(statistics.median(taken[1:]))
            print(f"  {link}: {found[link][-1]:.3f} s", file=sys.stderr)
    return found


def expected(latency: float, mbit: float | None, parameters: int, buckets: int) -> float:
    """Seconds that a ring all-reduce of the gradients takes at least."""
    ring = len(HOSTS) - 1
    bits = 2 * ring / len(HOSTS) * 32 * parameters
    return 2 * ring * buckets * latency / 1000 + (bits / (mbit * 1e6) if mbit else 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12, help="of a window")
    arguments = parser.parse_args()
    if lack := missing():
        raise SystemExit(lack)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wire = Wire()
    with tempfile.TemporaryDirectory(prefix="irkd-network-") as folder, hosts(HOSTS, wire) as made:
        config, run = prepare(Path(folder)), Path(folder) / "network-seed0"
        programs = start(made, config)
        while len(steps(run)) < 5:
            if any(program.process.poll() is not None for program in programs):
                raise SystemExit("\n".join(program.text() for program in programs))
            time.sleep(0.5)
        found = measure(made, wire, run, arguments.rounds, arguments.seconds)
        state = json.loads((run / "events.jsonl").read_text().splitlines()[0])
    millions = state["parameters"] / 1e6
    print(
        f"ViT-Tiny/4 at 32 px, {millions:.2f} M parameters, global batch {BATCH}, bf16, 3 hosts, 1 process each, "
        f"{os.cpu_count()} cores for all; torch {version('torch')}, Python {platform.python_version()}\n"
    )
    base = statistics.median(found[0, None, True])
    # DDP's buckets: one of 1 MiB, the others of 25 MiB
    buckets = 1 + -(-max(state["parameters"] * 4 - 2**20, 0) // (25 * 2**20))
    print(
        "| latency, one way | bandwidth | slow start after idle | images/s | step | longer by | the ring's arithmetic "
        "| rounds: step |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (latency, mbit, slow), medians in found.items():
        middle = statistics.median(medians)
        bandwidth = f"{mbit:.0f} Mbit/s" if mbit else "not limited"
        print(
            f"| {latency} ms | {bandwidth} | {'yes' if slow else 'no'} | {BATCH / middle:.1f} | {middle:.3f} s "
            f"| {middle - base:+.3f} s | {expected(latency, mbit, state['parameters'], buckets):.3f} s "
            f"| {min(medians):.3f} to {max(medians):.3f} s |"
        )


if __name__ == "__main__":
    main()

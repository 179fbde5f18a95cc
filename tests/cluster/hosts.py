"""Hosts with addresses of their own on one machine: network namespaces joined by veth pairs and a bridge.

Each has its own name, address and interfaces, and shares the file system, as nodes of a cluster do. Needs root and
Debian's iproute2. `Wire` joins them instead of the bridge where cables are to be long: it delays each frame, as `tc
netem` does, which not every kernel has; `Host.limit` sets a bandwidth, by `tc tbf`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("alpha", "beta", "gamma")


def missing() -> str | None:
    """What this machine lacks for such hosts, or None."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "no ip and tc: install iproute2"
    if os.geteuid() != 0:
        return "not root: namespaces cannot be made"
    probe = f"irkd-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return f"no network namespaces: {made.stderr.strip()}" if made.returncode else None


@dataclass(frozen=True)
class Host:
    """One host; `start` runs a program on it."""

    name: str
    address: str
    namespace: str
    switch: str  # the namespace that the other end of its cable is in
    logs: Path

    def start(self, *command: str, log: str = "log", **env: str) -> Program:
        """Start a program on this host, with its name as the host's name; stdout and stderr go to a file."""
        entered = [
            "ip", "netns", "exec", self.namespace, "unshare", "--uts",
            "sh", "-c", f'hostname {self.name}; exec "$@"', "sh", *command,
        ]  # fmt: skip
        output = self.logs / f"{self.name}-{log}.out"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PET_"))}
        with output.open("w") as file:
            process = subprocess.Popen(
                entered, cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1", **env},
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return Program(process, output)

    def cut(self) -> None:
        """Pull its cable: nothing answers any more, nobody is told."""
        _ip("-n", self.switch, "link", "set", self.name, "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self.switch, "link", "set", self.name, "up")

    def limit(self, mbit: float | None) -> None:
        """What its interface may send, in Mbit/s; None: as much as it can."""
        _ip("netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", "root", *(
            ["tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "50ms"] if mbit else ["noqueue"]
        ))  # fmt: skip

    def slow_start(self, on: bool) -> None:
        """Whether TCP sends slowly again after each pause, as Linux does unless told otherwise."""
        setting = f"echo {int(on)} > /proc/sys/net/ipv4/tcp_slow_start_after_idle"
        _ip("netns", "exec", self.namespace, "sh", "-c", setting)

    def processes(self) -> list[int]:
        """Process ids that run on this host."""
        shown = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        return [int(pid) for pid in shown.stdout.split()]

    def clear(self) -> None:
        """Kill whatever runs on this host."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Program:
    """A program started on a host."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text()

    def wait(self, seconds: float) -> int:
        """Its exit code, within so many seconds."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {seconds} s:\n{self.text()[-5000:]}") from None


class Wire(threading.Thread):
    """Carries frames between TAP interfaces, each `delay` seconds (one way) after it was sent."""

    def __init__(self) -> None:
        super().__init__(name="wire", daemon=True)
        self.delay = 0.0
        self._ends: dict[bytes, int] = {}  # hardware address -> TAP

    def plug(self, host: Host, number: int) -> None:
        """Give a host its interface `eth0`."""
        tap, name = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK), f"tap{os.getpid()}-{number}"
        tap_without_header = 0x0002 | 0x1000
        fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH", name.encode(), tap_without_header))  # TUNSETIFF
        address = bytes([2, 0, 0, 0, 0, number])
        _ip("link", "set", name, "netns", host.namespace, "name", "eth0")
        _ip("-n", host.namespace, "link", "set", "eth0", "mtu", "9000", "address", address.hex(":"))
        self._ends[address] = tap

    def run(self) -> None:
        taps, queue = list(self._ends.values()), deque[tuple[float, int, bytes]]()
        while True:
            wait = max(queue[0][0] - time.monotonic(), 0) if queue else None
            for tap in select.select(taps, [], [], wait)[0]:
                try:
                    for _ in range(64):
                        frame = os.read(tap, 16384)
                        to = self._ends.get(frame[:6])
                        for end in [to] if to is not None else [t for t in taps if t != tap]:
                            queue.append((time.monotonic() + self.delay, end, frame))
                except BlockingIOError:
                    pass  # nothing more for now
                except OSError:
                    return  # the host is gone
            while queue and queue[0][0] <= time.monotonic():
                _, end, frame = queue.popleft()
                with contextlib.suppress(BlockingIOError, OSError):  # full, or unplugged
                    os.write(end, frame)


@contextlib.contextmanager
def hosts(names: Sequence[str] = NAMES, wire: Wire | None = None) -> Iterator[list[Host]]:
    """Hosts 10.77.0.1, 10.77.0.2, ... on one switch, or on a `Wire`; what still runs on them at the end is killed."""
    prefix = f"irkd-{os.getpid()}"
    switch = f"{prefix}-switch"
    with tempfile.TemporaryDirectory(prefix="irkd-hosts-") as folder:
        made = [
            Host(name, f"10.77.0.{number}", f"{prefix}-{name}", switch, Path(folder))
            for number, name in enumerate(names, 1)
        ]
        table = "".join(f"{host.address} {host.name}\n" for host in made)
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for number, host in enumerate(made, 1):
                etc = Path("/etc/netns") / host.namespace  # `ip netns exec` puts these files over /etc
                etc.mkdir(parents=True)
                (etc / "hosts").write_text("127.0.0.1 localhost\n" + table)
                _ip("netns", "add", host.namespace)
                if wire is not None:
                    wire.plug(host, number)
                else:
                    pair = [host.name, "type", "veth", "peer", "eth0", "netns", host.namespace]
                    _ip("-n", switch, "link", "add", *pair)
                    _ip("-n", switch, "link", "set", host.name, "master", "bridge", "up")
                _ip("-n", host.namespace, "link", "set", "lo", "up")
                _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
                _ip("-n", host.namespace, "link", "set", "eth0", "up")
            if wire is not None:
                wire.start()
            yield made
        finally:
            for host in made:
                host.clear()
                subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)
                shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
            subprocess.run(["ip", "netns", "delete", switch], capture_output=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"

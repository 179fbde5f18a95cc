"""Real servers for shards behind URLs: HTTP with faults on purpose, and S3 by moto."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Faults:
    """What a server does wrong; each of the next requests for a name that holds `only` takes one fault."""

    statuses: list[int] = field(default_factory=list)  # these are answered first
    only: str = ".tar"
    cut: int = 0  # bodies that end in the middle
    wrong: int = 0  # bodies with one other byte
    ranges: bool = True
    bytes_per_s: float | None = None
    drop: int = 0  # connections closed without an answer
    alter: Callable[[str, bytes], bytes] | None = None  # what a file holds instead
    asked: list[tuple[str, str]] = field(default_factory=list)  # (path with query, Range header)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        """Whether one more of a kind of fault is due."""
        with self.lock:
            left = getattr(self, name)
            if left:
                setattr(self, name, left[1:] if isinstance(left, list) else left - 1)
            return bool(left)

    def names(self, part: str = ".tar") -> list[str]:
        """The files that were asked for, in order."""
        return [path.partition("?")[0] for path, _ in self.asked if part in path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        faults, path = self.server.faults, self.path.partition("?")[0]
        with faults.lock:
            faults.asked.append((self.path, self.headers.get("Range", "")))
        mine = faults.only in path
        status = faults.statuses[0] if faults.statuses else 0
        if mine and faults.take("drop"):
            self.close_connection = True
            return
        if mine and faults.take("statuses"):
            self.say(status, b"no")
            return
        try:
            data = (self.server.folder / path.lstrip("/")).read_bytes()
        except OSError:
            self.say(404, b"none")
            return
        data = faults.alter(path, data) if faults.alter else data
        start, end, ranged = 0, len(data), self.headers.get("Range", "")
        if ranged and faults.ranges:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)) + 1, len(data))
            if start >= len(data):
                self.say(416, b"")
                return
        content = data[start:end]
        if mine and faults.take("wrong"):
            content = bytes([content[0] ^ 1]) + content[1:]
        self.send_response(206 if ranged and faults.ranges else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mine and faults.take("cut"):
            content, self.close_connection = content[: len(content) // 2], True
        piece = 1 << 20 if not faults.bytes_per_s else 4096 if faults.bytes_per_s < 1e6 else 1 << 16
        for at in range(0, len(content), piece) if body else ():
            self.wfile.write(content[at : at + piece])
            if faults.bytes_per_s:
                time.sleep(piece / faults.bytes_per_s)

    def say(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    """A folder by HTTP; it can die, with all its connections, and come back on the same port."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.faults = folder, Faults()
        self.connections: list[Any] = []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def die(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(2)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Server]:
    """The folder by HTTP on this machine."""
    server = Server(folder)
    try:
        yield server
    finally:
        with contextlib.suppress(OSError):
            server.die()


@contextlib.contextmanager
def s3(bucket: str, folder: Path) -> Iterator[dict[str, str]]:
    """An S3-compatible server with a folder uploaded to a bucket; yields the environment that finds it."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        assert os.environ.get("CI") != "true", "CI must have moto[server] and s3fs: pip install '.[dev]'"
        pytest.skip("no S3 server: pip install 'moto[server]' s3fs")
    import botocore.session
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    try:
        client = botocore.session.get_session().create_client(
            "s3", endpoint_url=environment["AWS_ENDPOINT_URL"], aws_access_key_id="key",
            aws_secret_access_key="word", region_name="us-east-1",
        )  # fmt: skip
        client.create_bucket(Bucket=bucket)
        for file in (f for f in folder.rglob("*") if f.is_file()):
            client.put_object(Bucket=bucket, Key=str(file.relative_to(folder)), Body=file.read_bytes())
        yield environment
    finally:
        server.stop()

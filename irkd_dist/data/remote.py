"""Files behind a URL: names that show no secret, and reads that are tried again. The only import of fsspec.

https, http, s3, gs and hf are read. Credentials are what each library finds by itself (environment, files, the
machine's role); a URL may carry a query that is added to each file, or a password: neither is ever shown.
"""

from __future__ import annotations

import functools
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field

from irkd_dist.errors import Passing, UserError, one_line, say
from irkd_dist.keys import PATH

T = TypeVar("T")

PACKAGES = {
    "https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"
}  # fmt: skip
CHUNK = 8 << 20  # bytes of a request: what a broken download loses at most

_LONGEST_WAIT, _TOLD_AFTER = 10.0, 3  # seconds between two tries; tries until a user is told
_LIBRARIES = (
    "aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "httpx", "huggingface_hub", "requests",
    "s3fs", "urllib3",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Shards behind a URL on the disk of each node: whole, checked, shared by all processes and runs there."""

    # best on the node's own disk; null: ~/.cache/irkd/shards
    folder: Annotated[str | None, PATH] = None
    # of the whole folder; what was not used for longest goes first. null: no limit
    limit_gib: Annotated[float, Field(gt=0)] | None = None
    downloads: Annotated[int, Field(gt=0, le=256)] = 4  # of a process at once, ahead of what is needed
    retries: Annotated[int, Field(ge=0, le=1000)] = (
        6  # of a request that failed, after 0.5 s, 1 s, 2 s, ... 10 s
    )
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 30.0  # without a byte: a request has failed
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Url:
    """A file or folder behind a URL, with how it is read. As text it has neither password nor query.

    base: without the query, and no slash at its end.
    """

    base: str = field(repr=False)
    query: str = field(default="", repr=False)
    settings: Settings = Settings()

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.base}/{name}", self.query, self.settings)

    def __str__(self) -> str:
        return without_secrets(self.base) + ("?..." if self.query else "")

    @property
    def whole(self) -> str:
        """As a server is asked for it."""
        return self.base + (f"?{self.query}" if self.query else "")

    @property
    def protocol(self) -> str:
        return self.base.partition("://")[0]

    @property
    def name(self) -> str:
        return self.base.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.base.rpartition("/")[0], self.query, self.settings)


def is_url(text: str) -> bool:
    """Whether a text names a URL rather than a file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def place(text: str, settings: Settings = Settings()) -> Path | Url:
    """The folder that a text names: on this machine, or behind a URL.

    Raises:
        UserError: a protocol that is not read, or whose package is not installed.
    """
    if not is_url(text):
        return Path(text)
    base, _, query = text.partition("?")
    protocol, _, rest = base.partition("://")
    url = Url(f"{protocol.lower()}://{rest.rstrip('/')}", query, settings)
    if url.protocol not in PACKAGES:
        raise UserError(
            f"{url}: {protocol}:// is not read; use https, http, s3, gs or hf://datasets/..., or a folder"
        )
    if not rest.strip("/"):
        raise UserError(f"{url} names no server or bucket: write {url.protocol}://SERVER/FOLDER")
    _system(url)
    return url


def literal_secret(text: str) -> bool:
    """Whether a URL carries a password or a query that is written out, not by `${...}`."""
    base, _, query = text.partition("?")
    user, at, _ = base.partition("://")[2].partition("/")[0].rpartition("@")
    return is_url(text) and ((bool(at) and "${" not in user) or (bool(query) and "${" not in query))


def without_secrets(text: str) -> str:
    """A text, such as a library's message, with no password and no query in any URL of it."""
    text = re.sub(r"(\w+://)[^\s/@'\"]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?'\"]+)\?[^\s'\"]*", r"\1?...", text)


def read(
    url: Url, start: int | None = None, end: int | None = None, count: Callable[[], object] = lambda: None
) -> bytes:
    """The bytes of a file, or of a part of it; a server that ignores ranges gives the whole.

    Raises UserError as `_tried` does; `count` is called for each try that has to be repeated.
    """
    return _tried(url, lambda system: system.cat_file(url.whole, start=start, end=end), count)


def size(url: Url) -> int:
    """The bytes of a file. Raises UserError as `_tried` does, or when the server does not say."""
    found = _tried(url, lambda system: system.info(url.whole).get("size"))
    if found is None:
        raise UserError(f"{url}: the server does not say how large it is")
    return int(found)


def below(url: Url) -> list[str]:
    """The paths, relative to it, of all files below a folder in a store; https has no such list.

    Raises UserError as `_tried` does.
    """
    root = url.base.partition("://")[2].strip("/") + "/"
    return sorted(name.removeprefix(root) for name in _tried(url, lambda system: system.find(url.base)))


def _tried(url: Url, ask: Callable[[Any], T], count: Callable[[], object] = lambda: None) -> T:
    """What a server answers; it is asked again, with growing pauses, while the fault may pass.

    Raises:
        Passing: no answer after all retries.
        UserError: what another try would not change (404, 403, no such host, no credentials).
    """
    began, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return ask(_system(url))
        except Exception as error:
            if not _of_a_server(error):
                raise
            why, passes = _judged(error, url)
            if not passes:
                raise UserError(f"{url} cannot be read: {why}") from error
            if tries > url.settings.retries:
                seconds = time.monotonic() - began
                after = f"tried {tries} times in {seconds:.0f} s" if tries > 1 else "tried once"
                raise Passing(f"{url} cannot be read: {why}; {after} (data.shard_cache.retries)") from error
        count()
        if tries == _TOLD_AFTER:
            say(f"warning: {url}: {why}; it is tried again")
        pause = min(0.5 * 2.0 ** (tries - 1), _LONGEST_WAIT)
        time.sleep(pause * random.uniform(0.75, 1.0))  # not all at once


def download(url: Url, file: Path, size: int) -> None:
    """Write a file of `size` bytes, or what is there of it. Raises UserError as `read` does, and OSError."""
    with file.open("wb") as target:
        while target.tell() < size:
            start = target.tell()
            data = read(url, start, min(start + CHUNK, size))
            if len(data) > CHUNK:  # the server ignores ranges
                target.seek(0)
            target.write(data)
            if len(data) != min(CHUNK, size - start):
                return


@functools.cache
def _opened(protocol: str, timeout: float) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if protocol in ("https", "http"):
        import aiohttp

        waits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
        options = {"client_kwargs": {"timeout": waits, "trust_env": True}}
    if protocol == "s3":
        options = {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout}}
    return fsspec.filesystem(protocol, **options)


def _system(url: Url) -> Any:
    try:
        return _opened(url.protocol, url.settings.timeout_s)
    except ImportError as error:
        raise UserError(
            f"{url}: {url.protocol}:// needs a package that is not installed: pip install {PACKAGES[url.protocol]}"
        ) from error


def _of_a_server(error: BaseException) -> bool:
    """Whether an exception tells of a server or the way to it, not of a fault of ours."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES


def _judged(error: BaseException, url: Url) -> tuple[str, bool]:
    """Why a request failed, and whether the next one may not."""
    status, names = _status(error), {type(e).__name__ for e in _chain(error)}
    said = f"HTTP status {status}" if status else ""
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return f"there is no such file ({said or 'HTTP status 404'})", False
    if names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
        "ProfileNotFound",
    }:
        return f"no credentials for {url.protocol}:// were found; {_credentials(url.protocol)}", False
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access is denied ({said or one_line(error)}); {_credentials(url.protocol)}", False
    if any(isinstance(e, socket.gaierror) and e.errno == socket.EAI_NONAME for e in _chain(error)):
        return "there is no such host", False
    if status == 416:
        return "the file is shorter there than it should be (HTTP status 416)", False
    text = said or without_secrets(one_line(error)).replace(" ssl:default", "")
    return text, status is None or status >= 500 or status in (408, 425, 429)


def _credentials(protocol: str) -> str:
    match protocol:
        case "s3":
            own = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE)"
            return f"give {own}, or FSSPEC_S3_ANON=true for a public bucket"
        case "gs" | "gcs":
            return "give GOOGLE_APPLICATION_CREDENTIALS, or FSSPEC_GS_TOKEN=anon for a public bucket"
        case "hf":
            return "log in with `hf auth login`, or give HF_TOKEN"
    return "log in to it, or ask its owner"


def _status(error: BaseException) -> int | None:
    """The HTTP status in an error of aiohttp, botocore, gcsfs or huggingface_hub; None where no answer was whole."""
    if any(type(each).__module__ == "aiohttp.http_exceptions" for each in _chain(error)):
        return None  # aiohttp calls an answer that it cannot read a 400
    for each in _chain(error):
        response = getattr(each, "response", None)
        told = (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        )
        google = type(each).__module__.split(".")[0] in ("gcsfs", "google")
        others = (
            getattr(each, "status", None),
            getattr(response, "status_code", None),
            getattr(each, "code", None) if google else None,
        )
        for value in (told, *others):
            if isinstance(value, int) and 100 <= value < 600:
                return value
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

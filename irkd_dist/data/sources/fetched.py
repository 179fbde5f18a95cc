"""Plain tars behind a URL, as files on this machine: a render reads each of them once from end to end anyway."""

from __future__ import annotations

import fcntl
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from webdataset.shardlists import expand_urls

from irkd_dist import files
from irkd_dist.data import remote, store
from irkd_dist.data.remote import Settings, Url
from irkd_dist.errors import UserError, reason

_SETTINGS = Settings()


def fetched(text: str) -> Path:
    """A folder with the tars that a URL stands for, downloaded unless they are there from an earlier call.

    https://host/train-{000000..000099}.tar (as webdataset has it), one .tar, or (s3, gs, hf) a folder, all of whose
    tars are taken.

    Raises:
        UserError: there are none, one cannot be had, or there is no room for them.
    """
    url = remote.place(text, _SETTINGS)
    assert isinstance(url, Url)
    tars = _tars(url)
    name = re.sub(r"[^\w.-]+", "_", url.parent.name if url.name.endswith(".tar") else url.name) or "tars"
    folder = store.home() / "tars" / hashlib.sha256(url.base.encode()).hexdigest()[:16] / name
    try:
        with ThreadPoolExecutor(_SETTINGS.downloads) as pool:
            list(pool.map(lambda tar: _fetch(tar[1], folder / tar[0]), tars.items()))
        for extra in set(folder.rglob("*.tar")) - {folder / path for path in tars}:
            extra.unlink()  # it is not there any more
    except OSError as error:
        raise UserError(
            f"cannot write below {folder}: {reason(error)}{files.free_space(store.home())}"
        ) from error
    return folder


def _tars(url: Url) -> dict[str, Url]:
    """Each tar by its path below the folder that all are in."""
    if url.name.endswith(".tar"):
        bases = expand_urls(url.base)
        folders = [base.split("/")[:-1] for base in bases]
        alike = [len({*parts}) == 1 for parts in zip(*folders, strict=False)]
        shared = alike.index(False) if False in alike else len(alike)
        return {"/".join(base.split("/")[shared:]): Url(base, url.query, url.settings) for base in bases}
    if url.protocol in ("http", "https"):
        raise UserError(
            f"--path {url}: {url.protocol} has no list of files: name the tars, "
            f"{url.protocol}://host/train-{{000000..000099}}.tar"
        )
    found = [path for path in remote.below(url) if path.endswith(".tar")]
    if not found:
        raise UserError(f"--path {url} holds no *.tar")
    if any(".." in path.split("/") for path in found):
        raise UserError(f"--path {url} holds names with .., which are not read")
    return {path: url / path for path in found}


def _fetch(tar: Url, file: Path) -> None:
    """Download a tar unless it is there in its size; one process at a time, and the next goes on."""
    size = remote.size(tar)
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and file.stat().st_size == size:
        return
    part = file.with_name(f"{file.name}.part")
    with open(part, "ab") as target:
        fcntl.flock(target, fcntl.LOCK_EX)
        if file.is_file() and file.stat().st_size == size:
            part.unlink(missing_ok=True)
            return
        done = target.seek(0, 2)
        if done > size:
            target.truncate(done := 0)
        while done < size:
            end = min(done + remote.CHUNK, size)
            data = remote.read(tar, done, end)
            if len(data) > end - done:  # the server ignores ranges, and gave the whole
                target.truncate(done := 0)
            if not data or done + len(data) > size:
                raise UserError(f"{tar} has other bytes than the {size:,} that its server names")
            target.write(data)
            done += len(data)
        target.flush()
        part.replace(file)

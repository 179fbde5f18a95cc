"""What a model's name stands for: timm's own, a folder with its weights (`local-dir:`), or the Hugging Face hub's."""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

from irkd_dist import files, typed
from irkd_dist.errors import UserError, one_line

ANSWER_S = 4.0  # a server that has not answered by then counts as away
LOCAL, HUB = "local-dir:", "hf-hub:"


@dataclass(frozen=True)
class Named:
    """A model's name, looked up."""

    architecture: str  # as `models.create_model` takes it
    options: dict[str, Any] = field(default_factory=dict)  # its arguments, as its folder says
    cfg: dict[str, Any] = field(default_factory=dict)  # timm's word on its weights: mean, std, num_classes
    weights: Path | None = None  # file or folder of those that come with the name
    repository: str = ""  # of the hub, where its weights are still to be fetched


def look_up(name: str, key: str) -> Named:
    """Look a model's name up; `key` is the configuration key that has it.

    Raises:
        UserError: no such folder or repository, its config.json is not timm's, or the hub does not answer.
    """
    if name.startswith((HUB, "hf_hub:")):
        repository = name.partition(":")[2]
        config = fetch(repository, ("config.json",), f"{key}={name}")
        named = _described(config, f"{key}={name}")
        return Named(named.architecture, named.options, named.cfg, repository=repository)
    folder = Path(os.path.expanduser(name.removeprefix(LOCAL)))
    if name.startswith(LOCAL) or ("/" in name and (folder / "config.json").is_file()):
        named = _described(folder / "config.json", f"{key}={name}")
        return Named(named.architecture, named.options, named.cfg, weights=folder)
    if "/" in name:
        raise UserError(
            f"{key}={name}: a folder with config.json is {LOCAL}{name}, a model of the hub {HUB}{name}"
        )
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return Named(name, cfg=cfg.to_dict() if cfg is not None else {})


def _described(file: Path, where: str) -> Named:
    """config.json as timm writes it, today's form or the one before."""
    content: Any = None
    try:
        content = typed.parse(files.read(file))
        architecture = content["architecture"]
        cfg = dict(content.get("pretrained_cfg", content))
        options = dict(content.get("model_args") or {})
        cfg |= {"num_classes": content["num_classes"]} if "num_classes" in content else {}
        numbers = [float(v) for v in (*cfg.get("mean", ()), *cfg.get("std", ()))]
    except FileNotFoundError:
        raise UserError(f"{where}: there is no {file}") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{where}: {file} cannot be read as a description of a timm model: {error}"
        ) from error
    except KeyError:
        other = content.get("model_type") or content.get("architectures") or "none"
        raise UserError(
            f"{where}: config.json names no timm architecture (it has {other}); a model of transformers is not taken: "
            "use the timm name of the same network, and its weights"
        ) from None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise UserError(
            f"{where}: config.json has architecture={architecture!r}, which this timm does not know"
        )
    if len(numbers) not in (0, 6) or any(not 0 < abs(n) < 1e6 for n in numbers[3:]):
        raise UserError(
            f"{where}: config.json has mean={cfg.get('mean')}, std={cfg.get('std')}: three numbers each"
        )
    return Named(architecture, options, cfg)


def fetch(repository: str, files: tuple[str, ...], where: str) -> Path:
    """The first of some files of a repository (`ORG/NAME`, `@REVISION`) of the hub: from the cache, else downloaded.

    Raises:
        UserError: it is not in the cache, and the hub does not answer in time or has no such file.
    """
    repository, _, revision = repository.partition("@")
    rev, reasons = revision or None, []
    for file in files:
        cached = try_to_load_from_cache(repository, file, revision=rev) if "/" in repository else None
        if isinstance(cached, str):
            return Path(cached)
    require_answer(hf_hub_url(repository, files[0], revision=rev), where, repository) if repository else None
    for file in files:
        try:
            return Path(hf_hub_download(repository, file, revision=rev))
        except Exception as error:  # of requests, httpx or the hub's own: one line in any case
            reasons.append(next(iter(str(error).splitlines()), type(error).__name__))
    raise UserError(f"{where}: {repository} cannot be fetched from {constants.ENDPOINT}: {reasons[-1]}")


def require_answer(url: str, where: str, what: str) -> None:
    """Refuse at once to wait for a server that is away.

    Raises:
        UserError: no answer within `ANSWER_S`, or the hub is switched off by HF_HUB_OFFLINE.
    """
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _silence(url)
    if reason is not None:
        server = urllib.parse.urlsplit(url).netloc
        raise UserError(
            f"{where}: {what} is not on this machine, and {server} does not answer ({reason}). On one with a network "
            f"run: python -c \"import timm; timm.create_model('{timm_name(what)}', pretrained=True)\", and copy "
            f"{constants.HF_HUB_CACHE} (or $HF_HOME) here"
        )


def timm_name(what: str) -> str:
    """The name by which timm itself fetches a model."""
    return HUB + what if "/" in what else what


def _silence(url: str) -> str | None:
    """Why a server does not answer, None if it does; a look-up of its name may hang, so a thread asks."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S - 1).close()
            found.append(None)
        except urllib.error.HTTPError:
            found.append(None)  # an answer, if an unfriendly one
        except Exception as error:
            found.append(one_line(getattr(error, "reason", error)))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return found[0] if found else f"no answer in {ANSWER_S:.0f} s"


def local_copy(named: Named, where: str) -> dict[str, Any]:
    """What tells timm where the pretrained weights of its own model are on this machine; they are fetched if need be.

    Raises:
        UserError: it has none, or they are not here and their server does not answer.
    """
    cfg, name = named.cfg, named.architecture
    if cfg.get("hf_hub_id"):
        own = cfg.get("hf_hub_filename")
        files = (own,) if own else ("model.safetensors", "pytorch_model.bin")
        if cfg.get("custom_load") == "hf":  # timm fetches it in a way of its own
            require_answer(hf_hub_url(cfg["hf_hub_id"], files[0]), where, name)
            return {}
        return {"file": str(fetch(cfg["hf_hub_id"], files, where)), "custom_load": False}
    url = cfg.get("url")
    if not url:
        raise UserError(
            f"{where}: timm has no pretrained weights of {name}; names with a tag in timm.list_pretrained() do"
        )
    file = Path(urllib.parse.urlsplit(url).path).name
    fetched = Path(f"{torch.hub.get_dir()}/checkpoints/{file}")  # where torch.hub keeps it
    if not fetched.is_file():
        require_answer(url, where, name)
    return {}

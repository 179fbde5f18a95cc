"""The options of `irkd render` on the command line: which source has which, and how their texts are read."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from irkd_dist.errors import UserError

SOURCES = ("parquet", "cifar10", "idx", "folder", "wds", "synthetic")
_OPTIONS_OF = {  # options of `irkd render` that only some sources have
    "path": ("parquet", "cifar10", "idx", "folder", "wds"),
    "image_column": ("parquet",),
    "label_column": ("parquet",),
    "download": ("cifar10",),
    "samples": ("synthetic",),
}


def add_to(render: argparse.ArgumentParser) -> None:
    """Add the options of `irkd render` to its parser."""
    add = render.add_argument
    add("source", choices=SOURCES,
        help="`irkd render SOURCE --help` shows what it has; docs/data.md its layouts")  # fmt: skip
    add("--path", help="where the source's files are; of wds also a URL, see docs/streaming.md")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--resolutions", metavar="R,R,...", help="in pixels, e.g. 12,16,20,24,28,32")
    add("--crop-pct", type=float, default=1.0, metavar="P",
        help="as timm's: store each larger, floor(R / P), to crop from (0.875: 256 for 224; default 1)")  # fmt: skip
    add("--mode", choices=["resize", "crop"], default="resize",
        help="resize: antialiased, at every resolution; crop: the full-size image only, to crop from")  # fmt: skip
    add("--fit", choices=["crop", "squash", "pad"], default="crop",
        help="of images that are not square: their centre (default), squashed, or whole on black")  # fmt: skip
    add("--white", type=int, choices=[1, 255, 65535],
        help="value of white in float and 32-bit images (default: by their values, if all agree)")  # fmt: skip
    add("--encoding", choices=["png", "npy", "webp", "jpg"], default="png")
    add("--classes", metavar="NAMES",
        help="names or an order of the classes: a,b,c or a file with one a line")  # fmt: skip
    add("--samples-per-shard", type=int, default=2000, metavar="N")
    add("--shuffle", action="store_true",
        help="training samples to shards by chance (--seed), as data.order=shard needs them")  # fmt: skip
    add("--val-fraction", type=float, default=0.1, metavar="F", help="held out of train (default 0.1)")
    add("--seed", type=int, default=42, help="of the held-out choice, of --shuffle, and of synthetic images")
    add("--workers", type=int, default=1, metavar="N", help="processes; no influence on the result")
    add("--max-bad", type=int, default=0, metavar="N", help="unreadable images skipped before it stops")
    add("--limit", type=int, metavar="N", help="samples of each split at most")
    add("--dataset", help="name in the manifest")
    add("--overwrite", action="store_true", help="replace another render in --out")
    add("--part", metavar="I/N", help="render the I-th of N parts only (1-based), no manifest yet")
    add("--image-column", help="if there are several")
    add("--label-column", help="if there are several")
    add("--download", action="store_true", help="fetch CIFAR-10 into --path first")
    add("--samples", metavar="train=N,test=N", help="default train=4000,test=1000")
    add(
        "--size",
        type=int,
        help="one resolution, as --resolutions R; of synthetic images, their own in pixels",
    )
    add("-h", "--help", action=_HelpOfSource, help="of a source if one is named before")


class _HelpOfSource(argparse._HelpAction):
    """--help after a source: without the options of the others."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        source = getattr(namespace, "source", None)
        for action in parser._actions:
            if source is not None and source not in _OPTIONS_OF.get(action.dest, SOURCES):
                action.help = argparse.SUPPRESS
        super().__call__(parser, namespace, *rest)


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that the source does not have."""
    for option, sources in _OPTIONS_OF.items():
        if getattr(arguments, option) not in (None, False) and arguments.source not in sources:
            name, known = f"--{option.replace('_', '-')}", " or ".join(sources)
            raise UserError(f"{name} is for source {known}, not {arguments.source}; leave it out")
    if arguments.resolutions is None and arguments.size is None:
        raise UserError("no size is given: add --resolutions 96,160,224, or --size 224")
    if None not in (arguments.resolutions, arguments.size) and arguments.source != "synthetic":
        raise UserError(
            f"--size {arguments.size} with --resolutions {arguments.resolutions}: they say the same; leave one out"
        )


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between. Raises UserError."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r} is not a list of whole numbers such as 12,16,20") from None


def part(text: str | None) -> tuple[int, int] | None:
    """--part I/N as (I - 1, N). Raises UserError."""
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
        raise UserError(f"--part {text!r} is not of the form I/N with I from 1 to N")
    return int(number) - 1, int(count)


def samples(text: str | None) -> dict[str, int] | None:
    """--samples train=N,test=N. Raises UserError."""
    if text is None:
        return None
    result = {}
    for item in text.split(","):
        split, _, count = item.partition("=")
        if split not in ("train", "val", "test") or not count.isdecimal() or len(count) > 12:
            raise UserError(f"--samples {text!r} is not of the form train=4000,test=1000")
        result[split] = int(count)
    return result

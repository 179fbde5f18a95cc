"""Where images come from: each kind of source becomes one `Source`, read by (split, indices).

A source knows its labels up front and reads its images later, in the processes that render. Splits are called
train, val and test whatever the source calls them.

Each kind has a module, imported when such a source is opened or unpickled.
"""

from pathlib import Path
from typing import get_args

import numpy as np

from irkd_dist import files
from irkd_dist.data import remote
from irkd_dist.data.sources.base import Kind, Raw, Source
from irkd_dist.data.sources.common import reading
from irkd_dist.data.sources.naming import named
from irkd_dist.errors import UserError

__all__ = ["Kind", "Raw", "Source", "open_source"]


def open_source(
    kind: Kind,
    path: Path | str | None,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    download: bool = False,
    samples: dict[str, int] | None = None,
    size: int = 32,
    seed: int = 42,
    classes: tuple[str, ...] | None = None,
) -> Source:
    """Open a source of images.

    image_column and label_column are for parquet, download for cifar10, samples (per split), size (px) and
    seed for synthetic; classes: names or an order for the classes of any of them, see naming.py.
    path: of wds also a URL. Raises UserError: path missing or without images, labels that make no sense.
    """
    if download and kind != "cifar10":
        raise UserError(f"--download is for source cifar10, not {kind}; fetch the files, name them by --path")
    if kind == "synthetic":
        from irkd_dist.data.sources.synthetic import open_synthetic

        return named(open_synthetic(samples or {"train": 4000, "test": 1000}, size, seed), classes)
    if path is None:
        raise UserError(f"irkd render {kind} needs --path: where its files are")
    if isinstance(path, str) and remote.is_url(path):
        if kind != "wds":
            raise UserError(
                f"--path {remote.without_secrets(path)}: only source wds is read from a URL, not {kind}"
            )
        from irkd_dist.data.sources.fetched import fetched

        path = fetched(path)
    path = Path(path)
    if download:
        from irkd_dist.data.sources.cifar10 import download_cifar10

        download_cifar10(path)
    if not path.exists():
        raise UserError(f"--path {path} does not exist{_hint(kind)}")
    if not path.is_dir():
        with reading(path):
            files.regular(path)
    match kind:
        case "parquet":
            from irkd_dist.data.sources.parquet import open_parquet

            source = open_parquet(path, image_column, label_column)
        case "cifar10":
            from irkd_dist.data.sources.cifar10 import open_cifar10

            source = open_cifar10(path)
        case "idx":
            from irkd_dist.data.sources.idx import open_idx

            source = open_idx(path)
        case "folder":
            from irkd_dist.data.sources.folder import open_folder

            source = open_folder(path)
        case "wds":
            from irkd_dist.data.sources.wds import open_wds

            source = open_wds(path)
        case _:
            raise UserError(f"unknown source {kind!r}; one of {', '.join(get_args(Kind))}")
    source = named(source, classes)
    _check_labels(source, path)
    return source


def _hint(kind: Kind) -> str:
    return "; with --download it is fetched there" if kind == "cifar10" else ""


def _check_labels(source: Source, path: Path) -> None:
    for split, labels in source.labels.items():
        wrong = labels[(labels < 0) | (labels >= len(source.classes))]
        if wrong.size:
            raise UserError(
                f"{path}: split {split} has label {wrong[0]} ({wrong.size:,} such samples), "
                f"outside 0..{len(source.classes) - 1}; unlabelled or mislabelled samples cannot be rendered"
            )
    if not source.labels.get("train", np.empty(0)).size:
        have = ", ".join(source.labels) or "nothing"
        raise UserError(f"{path}: no images of a train split, found {have}; training needs one")

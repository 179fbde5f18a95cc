"""What `import irkd_dist` gives: training, trained networks, their maps, and the losses for somebody else's loop."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from irkd_dist import config as configuration
from irkd_dist import eventlog, networks
from irkd_dist.config import Config
from irkd_dist.data import images as pictures
from irkd_dist.data.geometry import CENTRAL, Geometry
from irkd_dist.data.sources.base import Raw
from irkd_dist.distill import losses, methods, models, places, saliency
from irkd_dist.distill import taps as tapped_at
from irkd_dist.distill.measure import TappedModel
from irkd_dist.distill.points import feature_info
from irkd_dist.distill.teacher import freeze
from irkd_dist.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

TAPS = ("first", "second", "last")  # the paper's, of a student


def train(
    config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str] = (), *, extend: bool = False
) -> dict[str, Any]:
    """Run an experiment to its end, or go on with it where its run folder stands.

    config: a YAML file, the same as a mapping, or a `Config`; overrides: `key=value`, as on the command line, for the
    first two. Signals, environment variables and process groups of the caller stay as they are. extend: more epochs or
    stages than the run was started with are trained.

    Returns:
        The summary: `run` (its folder), `steps`, `seconds`, `val_accuracy`, `test_accuracy`, ... in 0..1.

    Raises:
        irkd_dist.errors.UserError: configuration, shards, teacher or run folder do not fit together.
    """
    from irkd_dist.training.train import train as run

    return run(_config(config, overrides), extend=extend)


def _config(config: str | Path | Mapping[str, Any] | Config, overrides: Sequence[str]) -> Config:
    if isinstance(config, (str, Path)):
        return configuration.load(config, [*overrides])
    if isinstance(config, Config):
        if overrides:
            raise TypeError("overrides go with a file or a mapping; use dataclasses.replace on a Config")
        return config
    return configuration.from_values(config, [*overrides])


class Student(nn.Module):
    """A trained network with what it was trained for, in evaluation mode.

    Calling it with images (B, 3, r, r) as `transform` gives them returns logits (B, K). Attributes: `model`, `classes`
    (K names), `mean` and `std` of its input, `size` (pixels, of its last stage), `resolutions` (of all its stages),
    `taps` and `method` of its saliency, `config`, `folder` (its checkpoint), `geometry` (how its evaluation cuts
    pictures).
    """

    def __init__(
        self,
        model: nn.Module,
        classes: tuple[str, ...],
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        size: int,
        taps: tuple[str, ...],
        method: str,
        config: Config | None = None,
        folder: Path | None = None,
        geometry: Geometry = CENTRAL,
    ) -> None:
        super().__init__()
        self.model, self.classes, self.mean, self.std, self.size = model.eval(), classes, mean, std, size
        self.taps, self.method, self.config, self.folder, self.geometry = (
            taps,
            method,
            config,
            folder,
            geometry,
        )
        self.resolutions = [size] if config is None else configuration.resolutions(config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, r, r)."""
        return models.inference_logits(self.model(images))

    def transform(self, image: Image | np.ndarray | str | Path, size: int | None = None) -> Tensor:
        """An image of any kind and shape as evaluation saw those of the shards: (3, r, r), normalised.

        It is cut, squashed or padded as they were (`geometry`). size: r; None: that of its last stage.

        Raises:
            irkd_dist.errors.UserError: evaluation sees a window of the stored images, and they are smaller than `size`.
            OSError: and whatever else Pillow raises for a file that it cannot read.
        """
        if isinstance(image, (str, Path)):
            whole = pictures.load(Raw(str(image), Path(image))).image
        elif isinstance(image, np.ndarray):
            whole = pictures.from_array(image)
        else:
            whole = image
        square = self.geometry.square(pictures.rgb(whole), size or self.size)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def saliency_maps(self, images: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """Maps at the taps of its training: see `saliency_maps`."""
        return saliency_maps(self.model, images, labels, method=self.method, taps=self.taps)


def load(run: str | Path, which: str = "best") -> Student:
    """Load the student of a run folder (the best of its last stage, or its `last` checkpoint) or of a checkpoint.

    Warns where how its evaluation cut pictures is not known: `transform` then takes their central square.

    Raises:
        irkd_dist.errors.UserError: there is none, or it is damaged; the message names the file.
    """
    student, note = load_noted(Path(run), which)
    if note is not None:
        warnings.warn(note, stacklevel=2)
    return student


def load_noted(run: Path, which: str = "best") -> tuple[Student, str | None]:
    """`load`, and instead of a warning its line."""
    n = networks.load(run, which)
    config = configuration.from_dict(n.state["config"], str(n.folder))
    geometry, note = networks.geometry(n)
    own = (n.model, n.classes, n.mean, n.std, n.size, n.taps, n.method)
    return Student(*own, config, n.folder, geometry), note


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = "gradient",
    taps: str | Sequence[int | str] = "all",
) -> list[Tensor]:
    """Saliency maps of a timm model (or any whose modules give tokens or a grid), one a tap.

    images (B, 3, r, r), normalised as the model wants them; labels (B,), None: the classes that it predicts. method:
    `gradient`, `grad_cam`, `hirescam` or `attention`. taps: `all` (blocks of a transformer, stages of a convolutional
    network), or a list of block numbers, `first`, `second`, `last`, or module paths.

    Returns:
        Maps (B, h, w) in fp32 on the model's grid, detached and not normalised; `irkd_dist.normalize_map` does that.
        The model's mode and its parameters' gradients stay as they are.

    Raises:
        irkd_dist.errors.UserError: a tap is not there, gives no grid, or does not reach the class score.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}, not a torch.nn.Module")
    paths = _paths(model, taps, method)
    tapped = TappedModel(model, paths, method)
    if labels is None:
        training = model.training
        with torch.no_grad():
            labels = models.inference_logits(model.eval()(images)).argmax(1)
        model.train(training)
    return tapped.maps(images, labels)


def _paths(model: nn.Module, wanted: str | Sequence[int | str], method: str) -> list[str]:
    if wanted == "all":
        stages = [str(info["module"]) for info in feature_info(model) if info.get("module")]
        if not hasattr(model, "blocks") and stages:
            return stages
        wanted = [*range(len(places.places(model, "all", "model")))]
        found = [tapped_at.resolve_tap(model, name, method, "model") for name in wanted]
        return [tap.path for tap in found if not tap.void]  # after the last attention there is nothing to see
    if isinstance(wanted, str):
        wanted = [wanted]
    return [tapped_at.resolve_tap(model, name, method, "model").path for name in wanted]


def normalize_map(maps: Tensor, kind: str = "minmax") -> Tensor:
    """Each sample's map (B, h, w) by its own range (`minmax`) or length (`l2`); one without a shape becomes zeros."""
    return saliency.normalize_map(maps, kind)[0]


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(teacher || student) of logits (B, K), summed over classes, mean over the batch (Hinton et al. 2015)."""
    return losses.soft_distillation(student, teacher.detach(), temperature).mean()


class SaliencyLoss(nn.Module):
    """Alignment of a student's saliency maps with a frozen teacher's, for a training loop of your own.

    `output, teacher_logits, loss = SaliencyLoss(student, teacher)(images, labels)`: the student's output (as the model
    gives it), what the teacher says, and the term, a scalar, mean over the batch. Its backward is a second derivative,
    so the student's fused attention, which has none, is switched off in place. The teacher is frozen in place, and is
    no part of this module's parameters. Under DistributedDataParallel wrap this module, not the student.

    Args:
        student: a timm model, or another with modules that give tokens or a grid.
        teacher: another of these.
        taps: `all`, or a list of names, block numbers or pairs [student's, teacher's].
        method: see `saliency_maps`.
        normalization: of the maps, `minmax` or `l2`.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        taps: str | Sequence[Any] = TAPS,
        method: str = "gradient",
        normalization: str = "minmax",
    ) -> None:
        super().__init__()
        self.student, self.method, self.normalization = student, method, normalization
        spec = taps if isinstance(taps, str) else [[*t] if isinstance(t, tuple) else t for t in taps]
        pairs = _pairs(student, teacher, spec, method)
        self.paths, self.teacher_paths = [s for s, _ in pairs], [t for _, t in pairs]
        models.without_fused_attention(student)
        device = next(teacher.parameters()).device
        # a plain object: neither its parameters nor its mode are this module's
        self._teacher = (freeze(teacher, None, methods.inner_gradient(method), device),)

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Any, Tensor, Tensor]:
        """images (B, 3, r, r), labels (B,) or probabilities (B, K)."""
        said, theirs = tapped_at.forward_with_maps(
            self._teacher[0], images, self.teacher_paths, self.method, labels, frozen=True
        )
        output, ours = tapped_at.forward_with_maps(
            self.student, images, self.paths, self.method, labels, frozen=False
        )
        theirs = [saliency.resize_map(t, o.shape[1:]) for t, o in zip(theirs, ours, strict=True)]
        loss, _ = saliency.saliency_loss(ours, theirs, self.normalization)
        return output, models.inference_logits(said), loss.mean()


def _pairs(
    student: nn.Module, teacher: nn.Module, spec: str | list[Any], method: str
) -> list[tuple[str, str]]:
    pairs = tapped_at.tap_pairs(student, teacher, spec, method)
    kept = [(s.path, t.path) for s, t in pairs if not (s.void or t.void)]
    if not kept:
        raise UserError(
            f"taps={spec}: every one is void, its map is zero or constant; use last, or a lower block"
        )
    return kept


def evaluate(
    run: str | Path,
    data: str | Path | None = None,
    *,
    split: str = "test",
    resolutions: Sequence[int] | None = None,
    which: str = "best",
) -> dict[str, Any]:
    """Accuracy of a run at each resolution, agreement of its maps with the teacher's, as `irkd evaluate` measures them.

    data: a folder of shards; None: those of its training. Kept in the run folder's `evaluation/`.
    """
    from irkd_dist.evaluation import evaluate as measure

    sizes = None if resolutions is None else [*resolutions]
    return measure(
        Path(run), which=which, split=split, resolutions=sizes, data=None if data is None else str(data)
    )


def read_run(run: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The events of a run in order, each step once, as a table (`pandas.DataFrame(read_run(folder, "train"))`).

    event: one kind only, such as `train`, `evaluation`, `stage`, `transition`, `summary`.
    """
    events = eventlog.read_events(Path(run))
    return [e for e in events if event is None or e["event"] == event]

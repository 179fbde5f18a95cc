"""`irkd export`: a run's student as one folder that serves timm, the Hugging Face Hub, torch and ONNX alike.

Nothing is written that was not read again and compared with the student on images at each resolution of its training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from irkd_dist import __version__, export_card, files, networks, runfolder
from irkd_dist import config as configuration
from irkd_dist.data import remote, shards
from irkd_dist.data.decoded import Dataset
from irkd_dist.data.geometry import CENTRAL, Geometry
from irkd_dist.data.loader import Loader
from irkd_dist.data.views import View
from irkd_dist.distill import models
from irkd_dist.errors import UserError, one_line
from irkd_dist.networks import Network

FORMATS = ("timm", "onnx", "torch", "int8")
MANIFEST, CONFIG, CARD, WEIGHTS = "export.json", "config.json", "README.md", "model.safetensors"
ONNX, INT8, PROGRAM = "model.onnx", "model.int8.onnx", "model.pt2"
TOLERANCE = 1e-4  # of logits, beside their size
_TIMM_MODES = {"crop": "center", "squash": "squash", "pad": "border"}
# in config.json, for us
_KEPT = ("resolutions", "method", "taps", "size", "mean", "std", "classes", "geometry")
COMPARED, MEASURED = (
    16,
    2048,
)  # images compared at each resolution; images that int8's accuracy is measured on

Answer = Callable[[np.ndarray], np.ndarray]  # images (B, 3, r, r) -> logits (B, K)


@dataclass(frozen=True)
class Images:
    """Images to compare on, by resolution: (B, 3, r, r) as the student sees them, and labels (B,) where known."""

    by_size: dict[int, Tensor]
    labels: Tensor | None
    source: str


def export(
    run: Path,
    out: Path,
    formats: Sequence[str] = FORMATS,
    *,
    which: str = "best",
    data: str | None = None,
    licence: str = "other",
) -> dict[str, Any]:
    """Write a run's student to folder `out`, which appears whole or not at all.

    formats: of `FORMATS`; `model.safetensors`, `config.json` and the model card are always there. data: shards to
    compare on, None: those of its training, or noise where they are gone.

    Returns:
        What was written and how far each is from the student: the content of `export.json`.

    Raises:
        UserError: no such run, `out` is something else, a package is missing, or a format does not give the student's
            logits.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise UserError(f"--to {unknown[0]}: it is none of {', '.join(FORMATS)}, all")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} is there, and no export of ours; name another folder")
    network = networks.load(run, which)
    images, model = _images(network, data), network.model.eval()
    models.without_fused_attention(model)
    with torch.no_grad():
        expected = {size: model(x) for size, x in images.by_size.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        told = _write(network, images, expected, made, formats)
        told["accuracy"] = export_card.accuracies(runfolder.run_of(run), network.folder)
        told |= {"licence": licence, "command": export_card.command(runfolder.run_of(run))}
        files.write(made / CARD, export_card.card(network, told, out.name))
        names = sorted(p.name for p in made.iterdir())
        told["files"] = {name: _sha256(made / name) for name in names}
        files.write(made / MANIFEST, json.dumps(told, indent=1) + "\n")
        made.chmod(0o777 & ~_umask())
        before = made.with_name(f"{made.name}.before")
        if out.exists():
            out.rename(before)  # an export is there at any moment, whole, under one name or the other
        made.replace(out)
        shutil.rmtree(before, ignore_errors=True)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return told


def push(folder: Path, repository: str) -> str:
    """Upload an export to the Hugging Face Hub; returns its address.

    Raises:
        UserError: the hub does not answer, or refuses.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # whatever the network and the hub answer
        raise UserError(f"--push {repository}: {one_line(error)}; the export is in {folder}") from error


def problems(folder: Path) -> list[str]:
    """What is wrong with an export's files, a line each."""
    try:
        told = json.loads(files.read(folder / MANIFEST))
        kept = dict(told["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST} cannot be read: {one_line(error)}"]
    found = []
    for name, digest in kept.items():
        try:
            same = _sha256(folder / name) == digest
        except OSError as error:
            found.append(f"{folder / name} cannot be read: {one_line(error)}")
            continue
        found += [] if same else [f"{folder / name} is altered: its checksum differs"]
    return found


def _write(
    network: Network, images: Images, expected: dict[int, Tensor], made: Path, formats: Sequence[str]
) -> dict[str, Any]:
    config = configuration.from_dict(network.state["config"], str(network.folder))
    architecture, arguments = _timm_arguments(network)
    geometry, note = networks.geometry(network)
    told: dict[str, Any] = {
        "format": 1, "irkd_dist": __version__, "torch": torch.__version__, "timm": timm.__version__,
        "run": str(network.folder), "step": network.state.get("step"), "images": images.source,
        "architecture": architecture, "classes": list(network.classes), "mean": list(network.mean),
        "std": list(network.std), "size": network.size, "resolutions": configuration.resolutions(config),
        "method": network.method, "taps": list(network.taps), "parameters": models.parameter_count(network.model),
        "geometry": None if note else json.loads(json.dumps(asdict(geometry))), "notes": [note] if note else [],
        "differences": {}, "tolerance": TOLERANCE,
    }  # fmt: skip
    save_file({k: v.contiguous() for k, v in network.model.state_dict().items()}, made / WEIGHTS)
    (made / WEIGHTS).chmod(0o666 & ~_umask())
    files.write(made / CONFIG, json.dumps(_timm_config(architecture, arguments, told), indent=1) + "\n")
    answers: dict[str, Answer] = {}
    answers["timm"] = _of_timm(made)
    if "torch" in formats:
        _write_program(network.model, images, made / PROGRAM)
        answers["torch"] = _of_program(made / PROGRAM)
    if "onnx" in formats or "int8" in formats:
        _write_onnx(network.model, images, made / ONNX)
        answers["onnx"] = of_onnx(made / ONNX)
    for name, answer in answers.items():
        told["differences"][name] = _compare(name, answer, images, expected)
    if "int8" in formats:
        told["int8"] = _write_int8(made, network, images, answers["onnx"])
        if "onnx" not in formats:
            (made / ONNX).unlink()
    return told


def _compare(name: str, answer: Answer, images: Images, expected: dict[int, Tensor]) -> dict[str, float]:
    """Largest difference of logits at each resolution; a batch of one is asked too.

    Raises:
        UserError: it is more than rounding.
    """
    found = {}
    for size, x in images.by_size.items():
        theirs = torch.from_numpy(np.concatenate([answer(x[:1].numpy()), answer(x[1:].numpy())]))
        found[str(size)] = float((theirs - expected[size]).abs().max())
        if not found[str(size)] <= TOLERANCE * max(1.0, float(expected[size].abs().max())):
            raise UserError(
                f"--to {name}: its logits differ from the student's by {found[str(size)]:.1e} at {size} px; nothing is "
                "written. Please report it with the model's name; the other formats can be asked for"
            )
    return found


# ---- the formats


def _timm_arguments(network: Network) -> tuple[str, dict[str, Any]]:
    stored = {k: v for k, v in network.state["model"].items() if k not in ("dropout", "drop_path")}
    architecture, arguments = models.timm_arguments(**stored)
    return architecture, {k: v for k, v in arguments.items() if k != "num_classes"}


def _timm_config(architecture: str, arguments: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """What timm's `local-dir:` and `hf-hub:` read."""
    size = [3, told["size"], told["size"]]
    geometry = CENTRAL if told["geometry"] is None else Geometry.parse(told["geometry"])
    pretrained = {
        "custom_load": False, "input_size": size, "fixed_input_size": False, "interpolation": "lanczos",
        **timm_cut(geometry, told["size"]), "mean": told["mean"], "std": told["std"],
        "num_classes": len(told["classes"]),
        **{k: v for k, v in _own_cfg(architecture).items() if k in ("first_conv", "classifier", "pool_size")},
    }  # fmt: skip
    return {
        "architecture": architecture, "num_classes": len(told["classes"]), "label_names": told["classes"],
        "model_args": arguments, "pretrained_cfg": pretrained,
        "irkd": {key: told[key] for key in _KEPT},
    }  # fmt: skip


def timm_cut(geometry: Geometry, size: int) -> dict[str, Any]:
    """`crop_pct` and `crop_mode` with which timm's transform cuts as `geometry` does; where it pads it is not black."""
    _, side = geometry.sides(size)
    whole = geometry.mode == "crop" or geometry.crop_pct == 1  # then the share follows from the sides
    pct = size / side if whole else geometry.crop_pct
    while math.floor(size / pct) < side:  # timm's rule, which a rounding must not leave one pixel short
        pct = math.nextafter(pct, 0)
    return {"crop_pct": pct, "crop_mode": _TIMM_MODES[geometry.fit]}


def _own_cfg(architecture: str) -> dict[str, Any]:
    cfg = timm.get_pretrained_cfg(architecture)
    return {} if cfg is None else cfg.to_dict()


def load_timm(folder: Path) -> nn.Module:
    """The model of an export, by timm alone."""
    # torch.load is not involved: the folder has safetensors
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def _of_timm(folder: Path) -> Answer:
    model = load_timm(folder)

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return answer


def _program(model: nn.Module, images: Images) -> Any:
    """An exported program with any batch and, where the model takes it, any resolution."""
    size, anything = max(images.by_size), torch.export.Dim.DYNAMIC
    free = {0: anything} | ({2: anything, 3: anything} if _takes(model, 2 * size) else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, (images.by_size[size][:2],), dynamic_shapes=(free,))


def _write_program(model: nn.Module, images: Images, file: Path) -> None:
    torch.export.save(_program(model, images), file)


def _of_program(file: Path) -> Answer:
    program = torch.export.load(file).module()

    @torch.no_grad()
    def answer(images: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(images)).numpy()

    return answer


def _write_onnx(model: nn.Module, images: Images, file: Path) -> None:
    """Position embeddings are resampled inside the graph, so one file takes every resolution."""
    _need("onnx", "onnxscript", "onnxruntime")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _program(model, images), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
            opset_version=18,
        )  # fmt: skip
        assert program is not None
        program.save(str(file), external_data=False)


def of_onnx(file: Path) -> Answer:
    """The logits that an ONNX file gives, by ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def answer(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"images": images})[0])

    return answer


def _write_int8(made: Path, network: Network, images: Images, exact: Answer) -> dict[str, Any]:
    """Weights of matrix products in 8 bits, quantised as they are used; accuracy before and after."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(made / ONNX, made / INT8, weight_type=QuantType.QInt8)
    small, size = of_onnx(made / INT8), max(images.by_size)
    sizes = {"bytes": (made / INT8).stat().st_size, "bytes_before": (made / ONNX).stat().st_size}
    x, labels = images.by_size[size], images.labels
    before, after = exact(x.numpy()).argmax(1), small(x.numpy()).argmax(1)
    told = {**sizes, "images": len(x), "agreement": float((before == after).mean())}
    if labels is not None:
        truth = labels.numpy()
        told |= {
            "accuracy_before": float((before == truth).mean()),
            "accuracy": float((after == truth).mean()),
        }
    return told


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [p for p in packages if find_spec(p) is None]
    if missing:
        raise UserError(f"--to onnx needs {', '.join(missing)}: pip install 'irkd_dist[export]'")


# ---- images to compare on


def _images(network: Network, data: str | None) -> Images:
    """Held-out images at every resolution of the training that the model takes; noise where the shards are gone."""
    config = configuration.from_dict(network.state["config"], str(network.folder))
    sizes = [s for s in configuration.resolutions(config) if _takes(network.model, s)]
    try:
        folder = remote.place(data or config.data.shards, config.data.shard_cache)
        manifest = shards.load_manifest(folder)
        networks.check_classes(network.classes, manifest, str(folder), str(network.folder))
        split = next(s for s in ("test", "val", "train") if s in manifest.splits)
        by_size, labels = {}, None
        for size in sizes:
            count = MEASURED if size == max(sizes) else COMPARED
            view = View(size, centre_crop=config.data.centre_crop)
            dataset = Dataset(folder, _normalised(manifest, network), split, verify="size")
            with Loader(dataset, view, batch=256, seed=0) as loader:
                by_size[size], labels = loader.pick(np.arange(min(count, len(loader))))
        return Images(by_size, labels, f"{folder}, {split} split")
    except UserError as error:
        if data is not None:
            raise
        generator = torch.Generator().manual_seed(0)
        noise = {s: torch.randn(COMPARED, 3, s, s, generator=generator) for s in sizes}
        return Images(noise, None, f"noise, since the shards are not at hand: {error}")


def _normalised(manifest: shards.Manifest, network: Network) -> shards.Manifest:
    return replace(manifest, mean=network.mean, std=network.std)


def _takes(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, size, size))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

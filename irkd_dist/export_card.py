"""The model card of an export: what the student is, from what, how well,, and what to know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from irkd_dist import __version__, eventlog, files, runfolder, typed
from irkd_dist import config as configuration
from irkd_dist.data import remote
from irkd_dist.data.geometry import Geometry
from irkd_dist.errors import UserError
from irkd_dist.networks import Network


def accuracies(run: Path, checkpoint: Path) -> dict[str, float]:
    """Test accuracy (0..1) by resolution, as `irkd evaluate` or else the run itself has measured this checkpoint."""
    for file in runfolder.evaluation_files(run):
        if file.stem.endswith("-raw") or "-data-" in file.stem:
            continue  # of other weights than those exported, or of other images than its own
        try:
            told = typed.parse_checked(files.read(file))
            if told["split"] == "test" and Path(told["checkpoint"]).name == checkpoint.name:
                return {str(size): float(value) for size, value in told["accuracy"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # `irkd verify` names it
    try:
        summary = next(e for e in reversed(eventlog.read_events(run)) if e["event"] == "summary")
        best = checkpoint.parent.name == runfolder.BEST
        newest = next(iter(runfolder.bests(run)), checkpoint)
        if (best and checkpoint.name != newest.name) or (
            not best and runfolder.step_of(checkpoint) != summary["steps"]
        ):
            return {}  # an earlier one, which nobody has tested
        return {str(summary["resolution"]): float(summary["test_accuracy" if best else "test_accuracy_last"])}
    except (UserError, StopIteration, KeyError):
        return {}


def command(run: Path) -> str:
    """The command that began a run; empty where it is not known."""
    try:
        started = next(e for e in eventlog.read_events(run) if e["event"] == "start")
    except (UserError, StopIteration):
        return ""
    return str(started.get("command", ""))


def card(network: Network, told: dict[str, Any], name: str) -> str:
    """The card as Markdown, with the header that the Hugging Face Hub reads."""
    config = configuration.from_dict(network.state["config"], str(network.folder))
    loss, teacher = config.loss, config.teacher
    terms = ["cross-entropy"]
    terms += (
        [f"logits of the teacher (alpha {loss.kd.alpha}, T {loss.kd.temperature})"] if loss.kd.alpha else []
    )
    if loss.saliency.gamma:
        terms += [f"saliency maps by `{network.method}` at {', '.join(f'`{t}`' for t in network.taps)}"]
    stages = ", ".join(f"{s.resolution} px" for s in configuration.stages(config))
    lines = [
        "---", "library_name: timm", "pipeline_tag: image-classification", f"license: {told['licence']}",
        "tags: [image-classification, timm, distillation, irkd]", "---", "",
        f"# {name}", "",
        f"`{told['architecture']}`, {told['parameters'] / 1e6:.2f} M parameters, {len(network.classes)} classes, "
        f"trained with irkd_dist {network.state.get('package_version', __version__)} by {'; '.join(terms)}.", "",
        f"- Stages: {stages}; it takes {', '.join(str(r) for r in told['resolutions'])} px.",
        f"- Data: `{remote.without_secrets(config.data.shards)}`, digest `{network.state.get('data_digest')}`"
        + (f", {config.data.subset} images of it." if config.data.subset else "."),
        f"- Teacher: {_teacher(teacher)}.",
        f"- Checkpoint: `{network.folder.name}`, seed {config.seed}, optimizer policy `{config.optim.policy}`.", "",
        *_accuracy(told["accuracy"]),
        *_made_by(told["command"]),
        "## Use", "",
        "```python", "import timm", f"model = timm.create_model('local-dir:{name}', pretrained=True).eval()",
        f"# images: RGB, {network.size} px, mean {_short(network.mean)}, std {_short(network.std)}", "```", "",
        _pictures(told), "",
        *(["`irkd predict FOLDER photo.jpg`; `model.onnx` (input `images`, any batch and size above) needs no torch."
           "", ""] if "onnx" in told["differences"] else []),
        "## Compared", "",
        f"Largest difference of logits from the student's, on {told['images']}:", "",
        *_differences(told), "",
        *_deviations(config, network), "",
        "## Licence", "",
        f"`{told['licence']}`. Data and teacher may have licences of their own, which this card does not know.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _teacher(teacher: configuration.Teacher | None) -> str:
    if teacher is None:
        return "none"
    if teacher.run is not None:
        return f"run `{Path(teacher.run).name}`, seen at {'full' if teacher.view == 'full' else 'the same'} resolution"
    assert teacher.model is not None
    return f"`{teacher.model.name}` with weights `{teacher.model.weights or 'as timm has them'}`"


def _pictures(told: dict[str, Any]) -> str:
    """A line on how pictures of any shape become its input."""
    if told["geometry"] is None:
        return "How its pictures were cut is not known (a checkpoint of an earlier release): take the central square."
    geometry, size = Geometry.parse(told["geometry"]), told["size"]
    square = {
        "crop": "its central square", "squash": "the whole of it squashed to a square",
        "pad": "the whole of it on a black square (timm's `border` takes the mean colour for black)",
    }[geometry.fit]  # fmt: skip
    _, side = geometry.sides(size)
    seen = f"scaled to {side} px" + (f", of which the central {size} px are seen" if side > size else "")
    return f"Of a picture of any shape evaluation sees {square}, {seen}; `config.json` says so to timm's transforms."


def _made_by(command: str) -> list[str]:
    return ["## Made by", "", "```", command, "```", ""] if command else []


def _accuracy(measured: dict[str, float]) -> list[str]:
    if not measured:
        return ["Its accuracy was not measured on a test split (`irkd evaluate` does).", ""]
    rows = [f"| {size} px | {value:.2%} |" for size, value in measured.items()]
    return ["| resolution | test accuracy |", "|---|---|", *rows, ""]


def _differences(told: dict[str, Any]) -> list[str]:
    sizes = [*next(iter(told["differences"].values()))]
    lines = [f"| format | {' | '.join(f'{s} px' for s in sizes)} |", f"|{'---|' * (len(sizes) + 1)}"]
    lines += [
        f"| {name} | {' | '.join(f'{found[s]:.1e}' for s in sizes)} |"
        for name, found in told["differences"].items()
    ]
    if (int8 := told.get("int8")) is not None:
        accuracy = ""
        if "accuracy" in int8:
            accuracy = f"accuracy {int8['accuracy_before']:.2%} before, {int8['accuracy']:.2%} after; "
        lines += ["", f"int8: {accuracy}same class on {int8['agreement']:.2%} of {int8['images']} images; "
                      f"{int8['bytes'] / 1e6:.1f} MB instead of {int8['bytes_before'] / 1e6:.1f}."]  # fmt: skip
    return lines


def _deviations(config: configuration.Config, network: Network) -> list[str]:
    found = []
    if configuration.student_distilled(config):
        found.append(
            "- Two heads read two tokens and are no single layer: timm keeps both and averages their logits; "
            "ONNX and torch.export have the average in the graph."
        )
    if "small_resnet" in network.state["model"]["name"]:
        found.append("- timm knows this architecture once `irkd_dist.distill.small_resnet` is imported.")
    return ["## To know", "", *found] if found else []


def _short(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{v:.4f}" for v in values) + ")"

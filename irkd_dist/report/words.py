"""A run in words: its terms, its state, what was run, and what a reader must know."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from irkd_dist import config as configuration
from irkd_dist import typed
from irkd_dist.config import Config
from irkd_dist.report.reading import Run


def terms(config: Config) -> str:
    """The terms that are on, as the paper names them: `CE + KD + CL + saliency`."""
    alpha = config.loss.kd.alpha
    parts = {
        "CE": config.loss.form == "sum" or alpha < 1,
        "KD": alpha > 0,
        "CL": len(configuration.stages(config)) > 1,
        "saliency": config.loss.saliency.gamma > 0,
    }
    return " + ".join(name for name, on in parts.items() if on)


def status(run: Run) -> str:
    """Whether the run is finished, and how far it is if not."""
    if run.last("summary") is not None:
        return "finished"
    if not run.events:
        return "not started"
    stage = run.last("stage")
    where = f", in stage {stage['stage'] + 1} of {len(run.stages)}" if stage else ""
    return f"unfinished: at step {run.events[-1]['step']:,}{where}"


def notices(run: Run) -> list[str]:
    """What a reader must know before believing the numbers."""
    found, epochs = list(run.notices), run.of("evaluation")
    if run.last("summary") is None:
        found.append("This run is not finished; what follows is its state so far.")
    if not run.passed():
        found.append("No epoch has been completed yet, so there are no accuracies.")
    elif not epochs:
        found.append("No epoch has been judged yet (eval_every), so there are no accuracies.")
    elif len(epochs) == 1:
        found.append("There is only one epoch that was judged, so each curve is a single point.")
    gone = [e for e in run.events if e["event"] == "best_lost"]
    found += [
        f"A best checkpoint was lost, and the run went on without it: {e.get('what', '')}" for e in gone
    ]
    if any(e["split"] == "test" for e in epochs):
        found.append(
            "There is no validation split: stages were judged, and the best checkpoint chosen, by the test split."
        )
    return found


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run and where, as (name, value)."""
    config, first = run.config, run.last("start")
    start = {**(first or {}), **(run.last("resume") or {})}  # the newest word on each
    student = _model(config.student, configuration.student_distilled(config))
    found = [
        ("Student" if config.teacher else "Network", student),
        ("Teacher", _teacher(config)),
        ("Loss", _loss(config)),
        ("Saliency", _saliency(config)),
        ("Resolutions", _stages(config)),
        ("Optimizer", _optimizer(config)),
        ("Data", _data(config)),
        ("Augmentation", _augmentation(config)),
        ("Seed", str(config.seed)),
    ]
    found += _sizes(run, first or {})
    if start:
        world = start.get("world", 1)
        processes = f"{world} process{'es' * (world > 1)} on {start.get('device', '?')}, {start.get('precision', '?')}"
        version = f"irkd_dist {run.version or start.get('version', 'unknown')}"
        version += f", commit {start['commit']}" if start.get("commit") else ""
        found += [("Machine", processes), ("Versions", f"{version}, torch {start.get('torch', 'unknown')}")]
        found += [("Command", start["command"])] if start.get("command") else []
    if first:
        resumed = sum(e["step"] < run.events[-1]["step"] for e in run.of("resume"))
        again = f", resumed {resumed} time{'s' * (resumed > 1)}" if resumed else ""
        began = datetime.fromtimestamp(first["time"], UTC)
        found.append(("Started", f"{began:%Y-%m-%d %H:%M} UTC{again}"))
    found += [("Note", note) for note in start.get("notes", [])]
    return found


def _sizes(run: Run, start: dict[str, Any]) -> list[tuple[str, str]]:
    """Numbers of images and parameters, and how fast the networks are, as far as they were written down."""
    found, counts = [], start.get("images")
    if isinstance(counts, dict):
        told = (f"{n:,} {split}" for split, n in counts.items() if typed.is_count(n))
        found.append(("Images", ", ".join(told)))
    own, teacher = start.get("parameters"), start.get("teacher_parameters")
    if own:
        text = f"{own / 1e6:.3g} M"
        text += f"; the teacher's {teacher / 1e6:.3g} M, {teacher / own:.3g} times as many" if teacher else ""
        found.append(("Parameters", text))
    rates = next((e.rates for e in run.evaluations if e.rates), {})
    if rates:
        told = (f"{who} {rate:,.0f} images/s" for who, rate in rates.items())
        found.append(("Inference", ", ".join(told) + ", the network alone"))
    return found


def _model(model: configuration.Model, distilled: object) -> str:
    parts = [model.name]
    parts += [f"patch {model.patch}"] if model.patch else []
    parts += ["distillation token"] if distilled is True else []
    parts += [f"dropout {model.dropout:g}"] if model.dropout else []
    parts += [f"drop path {model.drop_path:g}"] if model.drop_path else []
    parts += ["pretrained"] if model.pretrained or model.weights else []
    return ", ".join(parts)


def _teacher(config: Config) -> str:
    spec = config.teacher
    if spec is None:
        return "none"
    name = spec.run if spec.run else _model(spec.model, False) if spec.model else ""
    view = "sees the student's resolution" if spec.view == "matched" else "sees the full resolution"
    return f"{name}, {view}" + (", a checkpoint for each stage" if spec.schedule == "aligned" else "")


def _loss(config: Config) -> str:
    loss = config.loss
    alpha, gamma = loss.kd.alpha, loss.saliency.gamma
    parts = ["CE" if loss.form == "sum" or not alpha else f"{1 - alpha:g} CE"]
    if alpha:
        kind = f"soft, T = {loss.kd.temperature:g}" if loss.kd.kind == "soft" else "hard"
        follows = ", weight follows the teacher" if loss.kd.follow_teacher else ""
        parts.append(f"{alpha:g} KD ({kind}{follows})")
    parts += [f"{gamma:g} saliency"] if gamma else []
    return " + ".join(parts)


def _saliency(config: Config) -> str:
    spec = config.loss.saliency
    if not spec.gamma:
        return f"not in the loss (maps shown: {spec.method})"
    taps = spec.taps if isinstance(spec.taps, str) else ", ".join(map(str, spec.taps))
    text = f"{spec.method} maps at taps {taps}; {spec.normalization}"
    text += f"; every {spec.every} steps" if spec.every > 1 else ""
    return text + (f"; on {spec.fraction:.0%} of the batch" if spec.fraction < 1 else "")


def _stages(config: Config) -> str:
    stages, spec = configuration.stages(config), config.curriculum or config.fixed
    epochs = [str(s.epochs) for s in stages]
    same = len(set(epochs)) == 1
    text = " → ".join(str(s.resolution) for s in stages) + " px, "
    text += (epochs[0] if same else " + ".join(epochs)) + f" epoch{'s' * (epochs != ['1'])}"
    text += " each" if same and len(stages) > 1 else ""
    text += f", patience {spec.patience}" if spec and spec.patience else ""
    best = config.curriculum is not None and config.curriculum.start_from == "best"
    return text + (", each from the best of the one before" if best and len(stages) > 1 else "")


def _optimizer(config: Config) -> str:
    spec = config.optim
    text = f"AdamW, learning rate {spec.lr:g} ({spec.schedule.kind.replace('_', ' ')})"
    text += f", weight decay {spec.weight_decay:g}"
    several = len(configuration.stages(config)) > 1
    return text + (f"; at a new stage: {spec.policy}" if several else "")


def _data(config: Config) -> str:
    subset = f", {config.data.subset:,} training images" if config.data.subset else ""
    return f"{config.data.shards}{subset}, batch {config.data.batch}"


def _augmentation(config: Config) -> str:
    spec = config.augment
    parts = [f"crop with {spec.padding} px padding"] if spec.padding else []
    if spec.crop == "resized":
        parts = [f"random part of {spec.scale[0]:g} to {spec.scale[1]:g} of the image, resized"]
    parts += ["flip"] if spec.flip else []
    parts += [f"RandAugment {spec.rand_augment} x {spec.magnitude}"] if spec.rand_augment else []
    named = {
        "auto_augment": f"AutoAugment ({spec.policy})" if spec.policy != "cifar10" else "AutoAugment",
        "three_augment": "3-Augment", "colour_jitter": "colour jitter", "hue": "hue jitter",
        "erase": "erasing", "mixup": "MixUp", "cutmix": "CutMix",
    }  # fmt: skip
    parts += [f"{label} {getattr(spec, key):g}" for key, label in named.items() if getattr(spec, key)]
    parts += [f"label smoothing {spec.smoothing:g}"] if spec.smoothing else []
    parts += [f"each image {spec.repeats} times in a batch"] if spec.repeats > 1 else []
    parts += ["other settings in some stages"] if any(s.augment for s in configuration.stages(config)) else []
    parts += [f"{spec.draws} draws of each image, again and again"] if spec.draws else []
    return ", ".join(parts) or "none"

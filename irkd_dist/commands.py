"""What each `irkd <command>` calls and prints; the work is done elsewhere, imported when it is called."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irkd_dist.data import arguments as render_arguments
from irkd_dist.errors import UserError, printable, say

if TYPE_CHECKING:
    from irkd_dist.config import Config


@contextmanager
def _imports() -> Iterator[None]:
    """Import without garbage collection: torch's modules are gone through again and again, a third of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay; later collections need not look at them either
        gc.enable()


def render(arguments: argparse.Namespace) -> int:
    render_arguments.check(arguments)
    try:
        return _render_source(arguments)
    except KeyboardInterrupt:
        say("irkd: interrupted; the same command goes on from here")
        return 130


def _render_source(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist.data import preview, render
        from irkd_dist.data.sources import naming, open_source
        from irkd_dist.training.tracking import count_bar

    given = arguments.resolutions or str(arguments.size)
    resolutions = render_arguments.numbers(given, "--resolutions")
    options = render.Options(
        resolutions, arguments.mode, arguments.encoding, arguments.samples_per_shard, arguments.val_fraction,
        arguments.seed, arguments.limit, arguments.dataset, arguments.workers, arguments.max_bad, arguments.fit,
        arguments.crop_pct, arguments.white, arguments.shuffle,
    )  # fmt: skip
    render.check(options)
    source = open_source(
        arguments.source, arguments.path, image_column=arguments.image_column, label_column=arguments.label_column,
        download=arguments.download, samples=render_arguments.samples(arguments.samples), seed=arguments.seed,
        size=max(resolutions) if arguments.size is None else arguments.size,
        classes=naming.given(arguments.classes) if arguments.classes is not None else None,
    )  # fmt: skip
    with count_bar("shards") as (progress, tell):
        manifest = render.render(
            source, arguments.out, options, overwrite=arguments.overwrite, part=render_arguments.part(arguments.part),
            progress=progress, warn=lambda text: tell(f"warning: {printable(text)}"),
        )  # fmt: skip
    if manifest is not None:
        splits = ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
        sizes = ", ".join(map(str, manifest.resolutions))
        out, count = printable(str(arguments.out)), len(manifest.classes)
        cropped = (
            f" (seen up to {manifest.largest} px, crop_pct {manifest.crop_pct:g})"
            if manifest.crop_pct < 1
            else ""
        )
        print(f"{out}: {count} classes, {splits}, at {sizes} px{cropped}; see {preview.PREVIEW}")
    return 0


def verify(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import verify
        from irkd_dist.data import remote
        from irkd_dist.training.tracking import count_bar

    problems, place = 0, remote.place(arguments.path)
    with count_bar("files", pause_s=10) as (progress, tell):
        for problem in verify.verify(place, progress):
            tell(printable(problem))
            problems += 1
    print(printable(f"{place}: {f'{problems} problems' if problems else 'all as it should be'}"))
    return 1 if problems else 0


def train(arguments: argparse.Namespace) -> int:
    from irkd_dist import config

    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(loaded), end="")
        return 0
    if arguments.print_folder:
        print(config.folder_of(loaded))
        return 0
    arguments.folder = config.folder_of(loaded)  # for the traceback of a crash
    if "WORLD_SIZE" not in os.environ and not arguments.folder.exists():
        _look_for_files(loaded)
    with _imports():
        from irkd_dist.training.train import train

    train(loaded, owns_process=True, extend=arguments.extend)
    return 0


def _look_for_files(loaded: Config) -> None:
    """Say at once what a new run lacks, before torch is imported, which takes seconds; training looks closer."""
    from irkd_dist import config, runfolder
    from irkd_dist.data import shards

    folder = config.shards_of(loaded)
    if isinstance(folder, Path):
        shards.load_manifest(folder)
    if loaded.teacher is not None and loaded.teacher.run is not None:
        runfolder.check_trained(Path(loaded.teacher.run), "teacher.run")


def doctor(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import doctor

    if arguments.slurm:
        return doctor.over_the_allocation([*filter(None, [arguments.config]), *arguments.overrides])
    return doctor.doctor(arguments.config, arguments.overrides)


def status(arguments: argparse.Namespace) -> int:
    from irkd_dist import status

    print(status.overview(arguments.run))
    return 0


def requeue(arguments: argparse.Namespace) -> int:
    from irkd_dist.training import requeue

    print(requeue.decide(arguments.run, arguments.limit, owner=arguments.owner))
    return 0


def probe(arguments: argparse.Namespace) -> int:
    from irkd_dist import config

    loaded = config.load(arguments.config, arguments.overrides)
    with _imports():
        from irkd_dist.linear_probe import probe

    done = probe(loaded, say=lambda text: print(printable(text)))
    kept = "" if done.computed else " (features were there)"
    print(
        f"validation accuracy {done.accuracy:.2%} with penalty {done.penalty:g}{kept}; "
        f"teacher: {{run: {printable(str(done.folder))}, renormalize: true}}"
    )
    return 0


def teach(arguments: argparse.Namespace) -> int:
    from irkd_dist import config

    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.epochs is not None and arguments.epochs < 1:
        raise UserError(f"--epochs {arguments.epochs}: give 1 or more")
    with _imports():
        from irkd_dist.teach import teach
        from irkd_dist.training.tracking import count_bar

    with count_bar("batches") as (progress, say):
        part = render_arguments.part(arguments.part) or (0, 1)
        done = teach(loaded, part=part, epochs=arguments.epochs, progress=progress, say=say)
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{done['computed']:.0f} answers computed, {done['found']:.0f} were there, in {done['seconds']:.1f} s"
        )
    return 0


def cache(arguments: argparse.Namespace) -> int:
    from irkd_dist.distill import cache_admin

    if not arguments.prune and (arguments.older_than is not None or arguments.keep_gib is not None):
        raise UserError("--older-than and --keep-gib say what --prune removes: give it too")
    if arguments.prune:
        for line in cache_admin.prune(arguments.folder, arguments.older_than, arguments.keep_gib):
            print(line)
    for line in cache_admin.describe(arguments.folder):
        print(line)
    bad = cache_admin.verify(arguments.folder) if arguments.verify else []
    for line in bad:
        print(line)
    if arguments.verify and not bad:
        print("every record matches its sum")
    return 1 if bad else 0


def evaluate(arguments: argparse.Namespace) -> int:
    from irkd_dist import runfolder

    runfolder.check_trained(arguments.run)  # what can be refused at once is, before torch is imported
    with _imports():
        from irkd_dist import evaluation

    sizes = arguments.resolutions and list(render_arguments.numbers(arguments.resolutions, "--resolutions"))
    result = evaluation.evaluate(
        arguments.run, which=arguments.which, split=arguments.split, resolutions=sizes, data=arguments.data,
        raw=arguments.raw, quick=arguments.quick,
    )  # fmt: skip
    evaluation.show(result)
    return 0


def watch(arguments: argparse.Namespace) -> int:
    from irkd_dist import watch

    return watch.watch(arguments.runs, arguments.every, arguments.once)


def report(arguments: argparse.Namespace) -> int:
    if arguments.price is not None and not 0 <= arguments.price < float("inf"):
        raise UserError(
            f"--price {arguments.price:g}: give the money an hour of all machines costs, 0 or more"
        )
    from irkd_dist import runfolder

    for run in arguments.runs:
        runfolder.read_config(run)
    with _imports():
        from irkd_dist import evidence, files, report

    if arguments.summary is not None:
        if len(arguments.runs) > 1:
            raise UserError("--summary is of one run: name one")
        values = evidence.summary(arguments.runs[0])
        files.write(arguments.summary, json.dumps(values, indent=1) + "\n")
        print(arguments.summary)
        return 0
    if arguments.live:
        return report.live(arguments.runs, arguments.out, price=arguments.price, every=arguments.every)
    print(report.write(arguments.runs, arguments.out, price=arguments.price))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from irkd_dist import config as configuration

    if not arguments.bandwidth > 0:
        raise UserError(f"--bandwidth {arguments.bandwidth}: give GB/s above 0")
    loaded = configuration.load(arguments.config, arguments.overrides)
    with _imports():
        from irkd_dist import plan
        from irkd_dist.training import tracking

    model = plan.Model(arguments.gpus * arguments.nodes, bandwidth=1e9 * arguments.bandwidth)
    forecast = plan.plan(loaded, model, arguments.config)
    if arguments.json:
        print(json.dumps(plan.to_dict(forecast)))
        return 0
    console = tracking.console()
    for item in plan.show(forecast):
        console.print(item, markup=False) if isinstance(item, str) else console.print(item)
    if model.gpus > 1:
        console.print(
            f"of {model.gpus} devices: the batch divided at {model.efficiency:.0%} efficiency, gradients summed in a "
            f"ring at {arguments.bandwidth:g} GB/s, half of it behind the backward", markup=False
        )  # fmt: skip
    return 0


def export(arguments: argparse.Namespace) -> int:
    from irkd_dist import runfolder

    runfolder.check_trained(arguments.run)
    with _imports():
        from irkd_dist import export

    formats = export.FORMATS if arguments.to == "all" else arguments.to.split(",")
    told = export.export(
        arguments.run,
        arguments.out,
        formats,
        which=arguments.checkpoint,
        data=arguments.data,
        licence=arguments.licence,
    )
    for note in told["notes"]:
        say(f"irkd: warning: {note}")
    print(f"{arguments.out}: compared with the student on {told['images']}")
    for name, found in told["differences"].items():
        print(f"  {name}: largest difference of logits {max(found.values()):.1e} at {', '.join(found)} px")
    if (int8 := told.get("int8")) is not None:
        accuracy = (
            f"accuracy {int8['accuracy_before']:.2%} -> {int8['accuracy']:.2%}, "
            if "accuracy" in int8
            else ""
        )
        print(f"  int8: {accuracy}same class on {int8['agreement']:.2%} of {int8['images']} images")
    if arguments.push:
        print(export.push(arguments.out, arguments.push))
    return 0


def predict(arguments: argparse.Namespace) -> int:
    from irkd_dist import predict

    found, left_out = predict.find(arguments.pictures)
    if not found:
        raise UserError(f"no pictures: {'; '.join(left_out) or 'nothing was named'}")
    model = predict.open_model(arguments.model, overlay=arguments.overlay is not None)
    if model.note is not None:
        say(f"irkd: warning: {model.note}")
    answers = [*predict.predict(model, found, arguments.top, arguments.overlay)]
    unread = [a for a in answers if isinstance(a, str)]
    read = [a for a in answers if not isinstance(a, str)]
    form = predict.as_json if arguments.json else predict.as_csv if arguments.csv else predict.table
    print(form(read))
    for line in [*left_out, *unread]:
        say(f"irkd: {line}")
    missing = [line for line in left_out if "no such file" in line]
    if unread or missing:
        say(f"irkd: {len(unread) + len(missing)} of {len(found) + len(missing)} pictures could not be read")
    return 1 if unread or missing else 0


def init(arguments: argparse.Namespace) -> int:
    from irkd_dist import project

    written, kept = project.init(arguments.folder)
    there = f", {kept} were there already" if kept else ""
    print(f"{printable(str(arguments.folder))}: {written} files in {', '.join(project.FOLDERS)}{there}")
    return 0


def completion(arguments: argparse.Namespace) -> int:
    from irkd_dist import completion

    print(completion.script(arguments.parser, arguments.shell), end="")
    return 0


def study(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import study

    loaded = _with_seeds(study.load(arguments.study), arguments.seeds)
    if arguments.cells or arguments.cell is not None:
        cells = study.cells(loaded, arguments.overrides, arguments.scale)
        study.check_folders(cells)
        if arguments.cells:
            print(
                "\n".join(
                    f"{i} {cell.name}: irkd {shlex.join(cell.arguments)}" for i, cell in enumerate(cells, 1)
                )
            )
        elif not 1 <= arguments.cell <= len(cells):
            raise UserError(f"--cell {arguments.cell}: {arguments.study} has 1 to {len(cells)}")
        else:
            print("\n".join(cells[arguments.cell - 1].arguments))
        return 0
    return _run_studies("study", arguments, [loaded], str(arguments.study))


def reproduce(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import study

    columns = ("custom_p2", "vit_tiny_p2", "vit_tiny_p4")
    studies = [study.load(Path(f"configs/cifar10/{arguments.table}/{name}.yaml")) for name in columns]
    return _run_studies(
        "reproduce", arguments, [_with_seeds(s, arguments.seeds) for s in studies], arguments.table
    )


def _with_seeds(loaded: Any, count: int | None) -> Any:
    return loaded if count is None else dataclasses.replace(loaded, seeds=[*range(count)])


def _run_studies(name: str, arguments: argparse.Namespace, studies: list[Any], what: str) -> int:
    from irkd_dist import study

    options = [("--scale", arguments.scale), ("--seeds", arguments.seeds), ("--out", arguments.out)]
    told = [f"{name} {value}" for name, value in options if value is not None]
    command = " ".join(["irkd", name, what, *map(shlex.quote, arguments.overrides), *told])
    print(
        study.run(
            studies, arguments.overrides, arguments.out, command, beside=arguments.jobs, scale=arguments.scale
        )
    )
    return 0


def demo(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import demo

    demo.demo(arguments.out)
    return 0

"""The command line: `irkd <command>`. Parses, calls, prints; the work is done elsewhere, imported when it is called."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from irkd_dist import __version__
from irkd_dist.data import arguments as render_arguments
from irkd_dist.errors import (
    EXIT_STOPPED,
    EXIT_USER,
    Lost,
    Stopped,
    UserError,
    keep_traceback,
    one_line,
    place,
    printable,
    say,
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, 1 for our own errors or if another process of the run is gone, 2 for the user's errors, 75 when asked to stop,
    130 when interrupted. The traceback of an error of our own is kept in a file.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if "=" in text]
    if len(overrides) < len(rest) or (rest and not hasattr(arguments, "overrides")):
        unknown = [text for text in rest if text not in overrides] or rest
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if hasattr(arguments, "overrides"):
        given = sys.argv[1:] if argv is None else argv  # the last one holds, in whatever form
        arguments.overrides = sorted([*arguments.overrides, *overrides], key=given.index)
    try:
        return arguments.call(arguments)
    except UserError as error:
        if error.said or (error.said is None and os.environ.get("LOCAL_RANK", "0") != "0"):
            # leave it to the one that says it: then the launcher ends all. If it does not, say it too
            time.sleep(5)
        if not error.said:
            say(f"irkd: {place()}error: {error}")
        return EXIT_USER
    except Lost as error:
        say(f"irkd: {error}")
        return 1
    except Stopped:
        return EXIT_STOPPED  # the run has said why
    except KeyboardInterrupt:
        say("irkd: interrupted; the same command goes on from the last checkpoint")
        return 130
    except BrokenPipeError:
        return 1  # whoever read has read enough
    except Exception as error:
        kept = keep_traceback(error, getattr(arguments, "folder", None))
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        say(f"irkd: {place()}error: {kind}{printable(one_line(error))} ({kept})")
        _tell_torchrun(error)
        return EXIT_USER if isinstance(error, OSError) else 1


def _tell_torchrun(error: Exception) -> None:
    """Its summary shows the traceback of the process that failed first."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


@contextmanager
def _imports() -> Iterator[None]:
    """Import without garbage collection: torch's modules are gone through again and again, a third of the start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay; later collections need not look at them either
        gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="irkd", description="Distil a large Vision Transformer into a small one."
    )
    parser.add_argument("--version", action="version", version=f"irkd_dist {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    # in the order of use: `irkd --help` lists them so
    demo = _command(commands, "demo", "the whole job on synthetic images, in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.set_defaults(call=_demo)

    init = _command(commands, "init", "configurations, SLURM scripts, launchers and examples into a folder")
    init.add_argument(
        "folder", type=Path, metavar="DIR", help="your project; none of its files is written over"
    )
    init.set_defaults(call=_init)

    what = "images -> WebDataset shards at every resolution"
    render = _command(commands, "render", what, help_option=False)
    render_arguments.add_to(render)
    render.set_defaults(call=_render)

    doctor = _command(commands, "doctor", "check machine, processes, data and one step before a run")
    doctor.add_argument("config", nargs="?", help="YAML file of the run to come; without: the machine only")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value")
    doctor.add_argument("--slurm", action="store_true", help="on every node of this SLURM allocation")
    doctor.set_defaults(call=_doctor)

    plan = _command(commands, "plan", "time, memory and disk of a run before it starts, from some real steps")
    plan.add_argument("config", type=Path, help="configuration")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument(
        "--gpus", type=_at_least_one, default=1, metavar="N", help="devices a node like this one's"
    )
    plan.add_argument("--nodes", type=_at_least_one, default=1, metavar="M")
    plan.add_argument(
        "--bandwidth", type=float, default=10.0, metavar="GB/s", help="of the slowest link (default: 10)"
    )
    plan.add_argument("--json", action="store_true")
    plan.set_defaults(call=_plan)

    what = "train a linear head on a backbone without one; its run folder is a teacher"
    probe = _command(commands, "probe", what)
    probe.add_argument("config", help="YAML file: student (with weights) is the backbone, data the images")
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value")
    probe.set_defaults(call=_probe)

    teach = _command(commands, "teach", "fill the teacher's cache ahead of a training")
    teach.add_argument("config", help="YAML file of the training; it names teacher.cache.folder")
    teach.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or --key=value, as for the training"
    )
    teach.add_argument("--part", metavar="I/N", help="the I-th of N jobs beside one another (1-based)")
    teach.add_argument("--epochs", type=int, metavar="N", help="the run's first N epochs only")
    teach.set_defaults(call=_teach)

    train = _command(commands, "train", "train a teacher or a student; the same command resumes")
    train.add_argument("config", help="YAML file; those that ship with the package are named configs/...")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value, as sweeps send it")
    train.add_argument("--print-config", action="store_true", help="show the configuration and stop")
    train.add_argument("--print-folder", action="store_true", help="show the run folder and stop")
    more = "more epochs or stages than the run was started with, also if it is done"
    train.add_argument("--extend", action="store_true", help=more)
    train.set_defaults(call=_train)

    status = _command(commands, "status", "where a run stands: stage, speed, checkpoint, time left")
    status.add_argument("run", type=Path, help="run folder, or a folder of them for a line each")
    status.set_defaults(call=_status)

    watch = _command(commands, "watch", "runs as they go: bars, losses, speed, time left, last events")
    watch.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, or folders of them")
    watch.add_argument("--every", type=_seconds, default=2.0, metavar="S", help="seconds between two looks")
    watch.add_argument("--once", action="store_true", help="a line for each run, and no more")
    watch.set_defaults(call=_watch)

    evaluate = commands.add_parser(
        "evaluate", help="accuracy at each resolution, saliency agreement, pointing game"
    )
    evaluate.add_argument("run", type=Path, help="run folder or checkpoint folder")
    evaluate.add_argument(
        "--which", choices=["best", "last"], default="best", help="checkpoint of a run folder"
    )
    evaluate.add_argument("--split", choices=["train", "val", "test"], default="test")
    evaluate.add_argument("--resolutions", metavar="R,R,...", help="default: all rendered")
    evaluate.add_argument(
        "--raw", action="store_true", help="the trained weights, not their moving average (optim.ema)"
    )
    evaluate.add_argument(
        "--quick",
        action="store_true",
        help="this checkpoint alone: no teacher on all images, no other stages",
    )
    evaluate.add_argument("--data", help="shards, if they are not where the run found them")
    evaluate.set_defaults(call=_evaluate)

    report = _command(commands, "report", "figures and one self-contained HTML page")
    report.add_argument(
        "runs", type=Path, nargs="+", metavar="run", help="one run folder, or several to compare"
    )
    report.add_argument("--out", type=Path, help="the page (default: report.html beside what it reports)")
    report.add_argument(
        "--price", type=float, metavar="N", help="money an hour of all machines of a run costs"
    )
    report.add_argument("--live", action="store_true", help="write it again and again while the runs go on")
    report.add_argument(
        "--every", type=_seconds, default=30.0, metavar="S", help="with --live: seconds (default 30)"
    )
    report.add_argument(
        "--summary",
        type=Path,
        metavar="FILE",
        help="instead of a page what a finished run came to, as JSON to cite",
    )
    report.set_defaults(call=_report)

    export = _command(
        commands, "export", "a student as a folder for timm, ONNX, torch and the Hugging Face Hub"
    )
    export.add_argument("run", type=Path, help="run folder or checkpoint folder")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--to", default="all", metavar="timm,onnx,torch,int8|all", help="default: all")
    export.add_argument("--checkpoint", choices=["best", "last"], default="best")
    export.add_argument("--data", help="shards to compare on, if they are not where the run found them")
    export.add_argument("--licence", default="other", help="for the model card, such as apache-2.0")
    export.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face Hub too")
    export.set_defaults(call=_export)

    predict = _command(commands, "predict", "classes of pictures, by a run or an export")
    predict.add_argument("model", type=Path, help="run folder, checkpoint folder or export")
    predict.add_argument("pictures", type=Path, nargs="+", help="files, or folders of them")
    predict.add_argument("--top", type=_at_least_one, default=1, help="classes to name, the likeliest first")
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object a line")
    form.add_argument("--csv", action="store_true")
    predict.add_argument(
        "--overlay", type=Path, metavar="FOLDER", help="write each picture beside its saliency"
    )
    predict.set_defaults(call=_predict)

    study = _command(commands, "study", "several experiments over several seeds, and their table")
    study.add_argument("study", type=Path, help="YAML file, e.g. configs/cifar10/cpu/study.yaml")
    _study_options(study)
    study.add_argument("--cells", action="store_true", help="only list the runs, numbered from 1 on")
    study.add_argument(
        "--cell", type=int, help="only print the arguments of this run, for `irkd`, a line each"
    )
    study.set_defaults(call=_study)

    reproduce = _command(commands, "reproduce", "a table of the paper, every cell of it, with intervals")
    reproduce.add_argument(
        "table", choices=["table1"], help="which: table1 has 5 setups for each of 3 students"
    )
    _study_options(reproduce)
    reproduce.set_defaults(call=_reproduce)

    verify = _command(
        commands,
        "verify",
        "check every file of shards, a run, a checkpoint or a page of results; exit code 1 if one is bad",
    )
    verify.add_argument("path", help="folder of shards, or its URL, run folder or checkpoint")
    verify.set_defaults(call=_verify)

    cache = _command(commands, "cache", "what a teacher's cache holds, and for which runs")
    cache.add_argument("folder", type=Path)
    cache.add_argument(
        "--verify", action="store_true", help="check every record; exit code 1 if one is damaged"
    )
    cache.add_argument("--prune", action="store_true", help="remove what killed processes left")
    cache.add_argument("--older-than", type=float, metavar="DAYS", help="and what was not used for so long")
    cache.add_argument(
        "--keep-gib", type=float, metavar="N", help="and what was used longest ago, down to N GiB"
    )
    cache.set_defaults(call=_cache)

    requeue = _command(commands, "requeue", "after a job of irkd train: is it to run again?")
    requeue.add_argument("run", type=Path, help="run folder")
    limit = "restarts in a row without a new checkpoint (default 3)"
    requeue.add_argument("--limit", type=int, default=3, metavar="N", help=limit)
    requeue.add_argument("--owner", metavar="ATTEMPT", help="refuse if the run folder's `owner` is another")
    requeue.set_defaults(call=_requeue)

    completion = _command(
        commands, "completion", "a script that completes commands and options in your shell"
    )
    completion.add_argument("shell", choices=["bash", "zsh"], help='bash: eval "$(irkd completion bash)"')
    completion.set_defaults(call=_completion)
    return parser


def _study_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every run")
    parser.add_argument(
        "--out", type=Path, help="Markdown file for the table; .html and .json appear beside it"
    )
    parser.add_argument("--jobs", type=_at_least_one, default=1, help="runs at once, as far as memory allows")
    parser.add_argument(
        "--seeds", type=_at_least_one, help="0 to this many less one, instead of the study's own"
    )
    parser.add_argument("--scale", help="one of the study's scales, which shorten every run")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
    return value


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _command(
    commands: argparse._SubParsersAction, name: str, what: str, help_option: bool = True
) -> argparse.ArgumentParser:
    about = what[0].upper() + what[1:] + "."
    # an abbreviated option could be an override
    return commands.add_parser(name, help=what, description=about, add_help=help_option, allow_abbrev=False)


def _render(arguments: argparse.Namespace) -> int:
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


def _verify(arguments: argparse.Namespace) -> int:
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


def _train(arguments: argparse.Namespace) -> int:
    from irkd_dist import config

    loaded = config.load(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(loaded), end="")
        return 0
    if arguments.print_folder:
        print(config.folder_of(loaded))
        return 0
    arguments.folder = config.folder_of(loaded)  # for the traceback of a crash
    with _imports():
        from irkd_dist.training.train import train

    train(loaded, owns_process=True, extend=arguments.extend)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import doctor

    if arguments.slurm:
        return doctor.over_the_allocation([*filter(None, [arguments.config]), *arguments.overrides])
    return doctor.doctor(arguments.config, arguments.overrides)


def _status(arguments: argparse.Namespace) -> int:
    from irkd_dist import status

    print(status.overview(arguments.run))
    return 0


def _requeue(arguments: argparse.Namespace) -> int:
    from irkd_dist.training import requeue

    print(requeue.decide(arguments.run, arguments.limit, owner=arguments.owner))
    return 0


def _probe(arguments: argparse.Namespace) -> int:
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


def _teach(arguments: argparse.Namespace) -> int:
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


def _cache(arguments: argparse.Namespace) -> int:
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


def _evaluate(arguments: argparse.Namespace) -> int:
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


def _watch(arguments: argparse.Namespace) -> int:
    from irkd_dist import watch

    return watch.watch(arguments.runs, arguments.every, arguments.once)


def _report(arguments: argparse.Namespace) -> int:
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


def _plan(arguments: argparse.Namespace) -> int:
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


def _export(arguments: argparse.Namespace) -> int:
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


def _predict(arguments: argparse.Namespace) -> int:
    from irkd_dist import predict

    found, left_out = predict.find(arguments.pictures)
    if not found:
        raise UserError(f"no pictures: {'; '.join(left_out) or 'nothing was named'}")
    model = predict.open_model(arguments.model, overlay=arguments.overlay is not None)
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


def _init(arguments: argparse.Namespace) -> int:
    from irkd_dist import project

    written, kept = project.init(arguments.folder)
    there = f", {kept} were there already" if kept else ""
    print(f"{printable(str(arguments.folder))}: {written} files in {', '.join(project.FOLDERS)}{there}")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from irkd_dist import completion

    print(completion.script(_parser(), arguments.shell), end="")
    return 0


def _study(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import study

    loaded = _with_seeds(study.load(arguments.study), arguments.seeds)
    if arguments.cells or arguments.cell is not None:
        cells = study.cells(loaded, arguments.overrides, arguments.scale)
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
    return _run_studies(arguments, [loaded], str(arguments.study))


def _reproduce(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import study

    columns = ("custom_p2", "vit_tiny_p2", "vit_tiny_p4")
    studies = [study.load(Path(f"configs/cifar10/{arguments.table}/{name}.yaml")) for name in columns]
    return _run_studies(arguments, [_with_seeds(s, arguments.seeds) for s in studies], arguments.table)


def _with_seeds(loaded: Any, count: int | None) -> Any:
    return loaded if count is None else dataclasses.replace(loaded, seeds=[*range(count)])


def _run_studies(arguments: argparse.Namespace, studies: list[Any], named: str) -> int:
    from irkd_dist import study

    options = [("--scale", arguments.scale), ("--seeds", arguments.seeds), ("--out", arguments.out)]
    told = [f"{name} {value}" for name, value in options if value is not None]
    name = "study" if arguments.call is _study else "reproduce"
    command = " ".join(["irkd", name, named, *map(shlex.quote, arguments.overrides), *told])
    print(
        study.run(
            studies, arguments.overrides, arguments.out, command, beside=arguments.jobs, scale=arguments.scale
        )
    )
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    with _imports():
        from irkd_dist import demo

    demo.demo(arguments.out)
    return 0

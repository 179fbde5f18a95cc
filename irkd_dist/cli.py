"""The command line: `irkd <command>`, its options and its exit codes. What a command does: commands.py."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from irkd_dist import __version__, commands
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="irkd", description="Distil a large Vision Transformer into a small one."
    )
    parser.add_argument("--version", action="version", version=f"irkd_dist {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")

    # in the order of use: `irkd --help` lists them so
    demo = _command(subparsers, "demo", "the whole job on synthetic images, in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"))
    demo.set_defaults(call=commands.demo)

    init = _command(subparsers, "init", "configurations, SLURM scripts, launchers and examples into a folder")
    init.add_argument(
        "folder", type=Path, metavar="DIR", help="your project; none of its files is written over"
    )
    init.set_defaults(call=commands.init)

    what = "images -> WebDataset shards at every resolution"
    render = _command(subparsers, "render", what, help_option=False)
    render_arguments.add_to(render)
    render.set_defaults(call=commands.render)

    doctor = _command(subparsers, "doctor", "check machine, processes, data and one step before a run")
    doctor.add_argument("config", nargs="?", help="YAML file of the run to come; without: the machine only")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value")
    doctor.add_argument("--slurm", action="store_true", help="on every node of this SLURM allocation")
    doctor.set_defaults(call=commands.doctor)

    plan = _command(
        subparsers, "plan", "time, memory and disk of a run before it starts, from some real steps"
    )
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
    plan.set_defaults(call=commands.plan)

    what = "train a linear head on a backbone without one; its run folder is a teacher"
    probe = _command(subparsers, "probe", what)
    probe.add_argument("config", help="YAML file: student (with weights) is the backbone, data the images")
    probe.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value")
    probe.set_defaults(call=commands.probe)

    teach = _command(subparsers, "teach", "fill the teacher's cache ahead of a training")
    teach.add_argument("config", help="YAML file of the training; it names teacher.cache.folder")
    teach.add_argument(
        "overrides", nargs="*", metavar="key=value", help="or --key=value, as for the training"
    )
    teach.add_argument("--part", metavar="I/N", help="the I-th of N jobs beside one another (1-based)")
    teach.add_argument("--epochs", type=int, metavar="N", help="the run's first N epochs only")
    teach.set_defaults(call=commands.teach)

    train = _command(subparsers, "train", "train a teacher or a student; the same command resumes")
    train.add_argument("config", help="YAML file; those that ship with the package are named configs/...")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="or --key=value, as sweeps send it")
    train.add_argument("--print-config", action="store_true", help="show the configuration and stop")
    train.add_argument("--print-folder", action="store_true", help="show the run folder and stop")
    more = "more epochs or stages than the run was started with, also if it is done"
    train.add_argument("--extend", action="store_true", help=more)
    train.set_defaults(call=commands.train)

    status = _command(subparsers, "status", "where a run stands: stage, speed, checkpoint, time left")
    status.add_argument("run", type=Path, help="run folder, or a folder of them for a line each")
    status.set_defaults(call=commands.status)

    watch = _command(subparsers, "watch", "runs as they go: bars, losses, speed, time left, last events")
    watch.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, or folders of them")
    watch.add_argument("--every", type=_seconds, default=2.0, metavar="S", help="seconds between two looks")
    watch.add_argument("--once", action="store_true", help="a line for each run, and no more")
    watch.set_defaults(call=commands.watch)

    evaluate = subparsers.add_parser(
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
    evaluate.set_defaults(call=commands.evaluate)

    report = _command(subparsers, "report", "figures and one self-contained HTML page")
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
    report.set_defaults(call=commands.report)

    export = _command(
        subparsers, "export", "a student as a folder for timm, ONNX, torch and the Hugging Face Hub"
    )
    export.add_argument("run", type=Path, help="run folder or checkpoint folder")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument("--to", default="all", metavar="timm,onnx,torch,int8|all", help="default: all")
    export.add_argument("--checkpoint", choices=["best", "last"], default="best")
    export.add_argument("--data", help="shards to compare on, if they are not where the run found them")
    export.add_argument("--licence", default="other", help="for the model card, such as apache-2.0")
    export.add_argument("--push", metavar="ORG/NAME", help="upload it to the Hugging Face Hub too")
    export.set_defaults(call=commands.export)

    predict = _command(subparsers, "predict", "classes of pictures, by a run or an export")
    predict.add_argument("model", type=Path, help="run folder, checkpoint folder or export")
    predict.add_argument("pictures", type=Path, nargs="+", help="files, or folders of them")
    predict.add_argument("--top", type=_at_least_one, default=1, help="classes to name, the likeliest first")
    form = predict.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a JSON object a line")
    form.add_argument("--csv", action="store_true")
    predict.add_argument(
        "--overlay", type=Path, metavar="FOLDER", help="write each picture beside its saliency"
    )
    predict.set_defaults(call=commands.predict)

    study = _command(subparsers, "study", "several experiments over several seeds, and their table")
    study.add_argument("study", type=Path, help="YAML file, e.g. configs/cifar10/cpu/study.yaml")
    _study_options(study)
    study.add_argument("--cells", action="store_true", help="only list the runs, numbered from 1 on")
    study.add_argument(
        "--cell", type=int, help="only print the arguments of this run, for `irkd`, a line each"
    )
    study.set_defaults(call=commands.study)

    reproduce = _command(subparsers, "reproduce", "a table of the paper, every cell of it, with intervals")
    reproduce.add_argument(
        "table", choices=["table1"], help="which: table1 has 5 setups for each of 3 students"
    )
    _study_options(reproduce)
    reproduce.set_defaults(call=commands.reproduce)

    verify = _command(
        subparsers,
        "verify",
        "check every file of shards, a run, a checkpoint or a page of results; exit code 1 if one is bad",
    )
    verify.add_argument("path", help="folder of shards, or its URL, run folder or checkpoint")
    verify.set_defaults(call=commands.verify)

    cache = _command(subparsers, "cache", "what a teacher's cache holds, and for which runs")
    cache.add_argument("folder", type=Path)
    cache.add_argument(
        "--verify", action="store_true", help="check every record; exit code 1 if one is damaged"
    )
    cache.add_argument("--prune", action="store_true", help="remove what killed processes left")
    cache.add_argument("--older-than", type=float, metavar="DAYS", help="and what was not used for so long")
    cache.add_argument(
        "--keep-gib", type=float, metavar="N", help="and what was used longest ago, down to N GiB"
    )
    cache.set_defaults(call=commands.cache)

    requeue = _command(subparsers, "requeue", "after a job of irkd train: is it to run again?")
    requeue.add_argument("run", type=Path, help="run folder")
    limit = "restarts in a row without a new checkpoint (default 3)"
    requeue.add_argument("--limit", type=int, default=3, metavar="N", help=limit)
    requeue.add_argument("--owner", metavar="ATTEMPT", help="refuse if the run folder's `owner` is another")
    requeue.set_defaults(call=commands.requeue)

    completion = _command(
        subparsers, "completion", "a script that completes commands and options in your shell"
    )
    completion.add_argument("shell", choices=["bash", "zsh"], help='bash: eval "$(irkd completion bash)"')
    completion.set_defaults(call=commands.completion, parser=parser)
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
    subparsers: argparse._SubParsersAction, name: str, what: str, help_option: bool = True
) -> argparse.ArgumentParser:
    about = what[0].upper() + what[1:] + "."
    # an abbreviated option could be an override
    return subparsers.add_parser(name, help=what, description=about, add_help=help_option, allow_abbrev=False)

"""Every command and code block of README and docs is run, or checked by the parser that would take it.

Python blocks run, YAML blocks are loaded as configurations, and `irkd` commands of the pages in TOYS run in order, at
toy size. All other commands, those within sentences too, are parsed as they would be; what no parser of ours takes is
in OTHERS, with the reason.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from irkd_dist import cli, config, plain, study
from irkd_dist.data import arguments as render_arguments
from irkd_dist.distill import methods
from tests.cases.command import irkd_alone

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    str(p.relative_to(ROOT))
    for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
]
KINDS = ("python", "bash", "yaml", "text")  # text: what is printed, or what lies in a folder
PREFIX = re.compile(
    r"(irkd|python|bash|make|accelerate|torchrun|sbatch|wandb|pip|cp|source|eval|salloc|git) "
)

# commands that no parser of ours takes, and who runs them
OTHERS = {
    "pip": "installs: tests/test_package.py",
    "wandb": "W&B's own: tests/cluster/test_sweep.py",
    "cp": "the shell's",
    "source": "the shell's",
    "eval": "the shell's; tests/test_project.py reads the completion",
    "salloc": "SLURM's: tests/cluster/",
}
# of `sbatch [options] slurm/X.sbatch ARGUMENTS`, which irkd command the arguments are for; SLURM's own options are
# taken by the real one in tests/cluster/
SBATCH = {"irkd": "train", "render": "render", "teach": "teach", "study": "study", "sweep": None}
# words that stand for something of the reader's
STANDS_FOR = {
    "CONFIG": "configs/cifar10/vit_tiny_p4_irkd.yaml",
    "STUDY": "configs/cifar10/cpu/study.yaml",
    "STUDY.yaml": "configs/cifar10/cpu/study.yaml",
    "SOURCE": "folder",
    "N": "2",
    "M": "2",
    "K": "1",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    kind: str
    title: str | None  # the file that it is the content of
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in order."""
    found, lines = list[Block](), (ROOT / page).read_text().split("\n")
    fences = [n for n, line in enumerate(lines) if line.startswith("```")]
    assert len(fences) % 2 == 0, f"{page}: a block does not end"
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        kind, _, rest = lines[start].removeprefix("```").partition(" ")
        title = re.fullmatch(r'title="(.+)"', rest)
        found.append(Block(kind, title and title[1], "\n".join(lines[start + 1 : end]) + "\n", start + 1))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a bash block as words, without comments, `name=$(...)` around them, and variables before them."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        words = shlex.split(re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip()), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def spoken(page: str) -> Iterator[list[str]]:
    """The commands within sentences, `irkd train CONFIG`, as words."""
    lines = (ROOT / page).read_text().split("\n")
    fences = [n for n, line in enumerate(lines) if line.startswith("```")]
    inside = {n for a, b in zip(fences[::2], fences[1::2], strict=True) for n in range(a, b + 1)}
    text = "\n".join(line for n, line in enumerate(lines) if n not in inside)
    for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        code = re.sub(r"^([A-Z_]+=\S+ )+", "", " ".join(code.split()))
        if PREFIX.match(code):
            yield shlex.split(code)


def plainly(words: list[str]) -> list[str]:
    """Words without `[key=value ...]` and `...`, the first of `a|b`, and ours for what stands for the reader's own."""
    text = [re.sub(r",?\.\.\.", "", word.strip("[]")) for word in words]
    text = [word.split("|")[0] if word.count("|") and "<" not in word else word for word in text]
    return [STANDS_FOR.get(word, word) for word in text if word not in ("", "key=value")]


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_known_kinds(page: str) -> None:
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.kind in KINDS, f"{where}: ```{block.kind} is none of {KINDS}"
        if block.kind == "text":
            assert not any(PREFIX.match(line) for line in block.text.splitlines()), (
                f"{where}: commands are ```bash"
            )


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_right(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    titled = [b for b in blocks(page) if b.title is not None]
    for block in titled:
        Path(str(block.title)).write_text(block.text)
    for block in blocks(page):
        if block.kind == "bash":
            for words in commands(block.text):
                check(plainly(words), f"{page}:{block.line}")
    for words in spoken(page):
        check(plainly(words), page, whole=False)


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")))
def test_commands_in_the_remarks_of_a_configuration_are_right(file: str) -> None:
    text = re.sub(r"\s*\\\n#\s*", " ", (ROOT / file).read_text())  # a command on two lines
    remarks = re.findall(r"#(.*)", text)
    for remark in remarks:
        for text in re.findall(r"(?:irkd|sbatch) (?:--|[a-z]+ )[^&();:,]*(?:,[^&();: ]+[^&();:,]*)*", remark):
            check(plainly(shlex.split(re.split(r"\s{2,}", text)[0])), file, whole=False)


def check(words: list[str], where: str, whole: bool = True) -> None:
    """Assert that the program that a command names would take its words; not whole: some may be left out."""
    said = f"{where}: {shlex.join(words)}"
    match words:
        case ["irkd", *rest]:
            check_irkd(rest, said, whole)
        case ["accelerate", "launch"] | ["accelerate", "launch", "--cpu"]:
            pass  # named in a sentence, the second as what does not work
        case ["accelerate", "launch", *rest]:
            from accelerate.commands.launch import launch_command_parser

            launch = launch_command_parser().parse_args(rest)
            assert (ROOT / launch.config_file).is_file(), said
            check_module(launch.training_script, launch.training_script_args, launch.module, said)
        case ["torchrun", *rest]:
            from torch.distributed.run import get_args_parser

            run = get_args_parser().parse_args(rest)
            check_module(run.training_script, run.training_script_args, run.module, said)
        case ["sbatch", *rest]:
            script = next((n for n, word in enumerate(rest) if word.startswith("slurm/")), len(rest))
            if script < len(rest):
                name = Path(rest[script])
                assert (ROOT / name).is_file(), said
                command, arguments = SBATCH[name.stem], rest[script + 1 :]
                if command is not None and arguments:
                    check_irkd([command, *arguments], said)
        case ["python", "-m", module, *rest]:
            check_module(module, rest, True, said)
        case ["python", script, *rest]:
            text = (ROOT / script).read_text()
            own = "runpy" not in text  # or they are another script's
            unknown = [w for w in rest if own and w.startswith("--") and f'"{w}"' not in text]
            assert not unknown, f"{said}: {script} has no {unknown}"
        case ["bash", script, *_]:
            assert (ROOT / script).is_file(), said
        case ["make", *rest]:
            makefile = (ROOT / "Makefile").read_text()
            for word in rest:
                variable, equals, _ = word.partition("=")
                target = rf"^{variable} \?=" if equals else rf"^{word}:"
                assert re.search(target, makefile, re.MULTILINE), f"{said}: the Makefile has no {word}"
        case [first, *_]:
            assert first in OTHERS, f"{said}: who takes this? name it in OTHERS with the reason"


def check_module(module: str, rest: list[str], is_module: bool, said: str) -> None:
    """The arguments of `-m irkd_dist`, or of another module of ours."""
    if module == "irkd_dist":
        check_irkd(rest, said)
    else:
        assert is_module, said
        assert find_spec(module) is not None, said


def check_irkd(words: list[str], said: str, whole: bool = True) -> None:
    """Parse as `irkd` does, and load the configuration or study that is named."""
    error, code = io.StringIO(), None
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments, rest = cli._parser().parse_known_args(words)
        except SystemExit as end:
            code = end.code
    if code is not None:
        left_out = not whole and "the following arguments are required" in error.getvalue()
        assert code == 0 or left_out, f"{said}: {error.getvalue()}"
        return
    overrides = [*getattr(arguments, "overrides", []), *rest]
    assert all("=" in word for word in overrides), f"{said}: unknown {rest}"
    assert not overrides or hasattr(arguments, "overrides"), said
    if words[0] == "render":
        render_arguments.check(arguments)
    elif getattr(arguments, "config", None):
        config.load(arguments.config, overrides)
    elif words[0] == "study":
        study.cells(study.load(arguments.study), overrides, arguments.scale)


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.kind == "yaml" for b in blocks(p))])
def test_yaml_is_a_configuration(page: str) -> None:
    """What a part of one leaves out is filled in."""
    for block in (b for b in blocks(page) if b.kind == "yaml"):
        tree = plain.parse(block.text, f"{page}:{block.line}")
        if not {"curriculum", "fixed"} & tree.keys():
            tree["fixed"] = {"resolution": 32, "epochs": 1}
        config.from_values(tree)


@dataclass(frozen=True)
class Toy:
    """How the blocks of a page run at toy size."""

    prepare: Callable[[Path], None] = lambda folder: None
    overrides: tuple[str, ...] = ()  # of every command that takes a configuration
    fixed: tuple[str, ...] = ("fixed.epochs=1",)  # and of one with a fixed resolution
    curriculum: tuple[str, ...] = ("curriculum.epochs=1",)  # or with stages
    instead: dict[str, str] = field(default_factory=dict)  # text of a command -> what is run
    left_out: dict[str, str] = field(default_factory=dict)  # command -> why it is not run here
    says: tuple[str, ...] = ()  # somewhere in what the page's commands print


TINY = "student.options={embed_dim: 16, depth: 2, num_heads: 2}"
SMALL = ("data.batch=16", "data.workers=1", "track.panels=1", "precision=fp32")


def photos(folder: Path, size: int = 40) -> None:
    """Two classes of noise as a folder."""
    rng = np.random.default_rng(0)
    for channel, name in ((0, "red"), (2, "blue")):
        (folder / "photos" / name).mkdir(parents=True)
        for n in range(30):
            pixels = rng.integers(0, 120, (size, size + 8, 3), dtype=np.uint8)
            pixels[..., channel] += 100
            Image.fromarray(pixels).save(folder / "photos" / name / f"{n:03d}.png")


def parquet(folder: Path) -> None:
    """The Hugging Face layout with 48 and 16 images of three classes."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    (folder / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 16)):
        cells = []
        for _ in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        images = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        table = pa.table({"img": images, "label": pa.array([n % 3 for n in range(count)], pa.int64())})
        pq.write_table(table, folder / "cifar10" / f"{split}-00000-of-00001.parquet")


def trained(folder: Path) -> None:
    """Shards, a run under the name that docs/export.md has, a photograph and a student's configuration."""
    photos(folder)
    shapes = ("--samples", "train=60,test=16", "--resolutions", "16,32", "--out", "shards/photos")
    irkd_alone("render", "synthetic", *shapes, cwd=folder).well()
    (folder / "student.yaml").write_text(
        "data: {shards: shards/photos, batch: 16}\nfixed: {resolution: 32, epochs: 1}\ntrack: {panels: 0}\n"
        "student: {patch: 8, options: {embed_dim: 16, depth: 2, num_heads: 2}}\nname: vit_tiny_p4_irkd-seed0\n"
    )
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "photo.jpg")


def with_a_run(folder: Path) -> None:
    """The same, trained."""
    trained(folder)
    irkd_alone("train", "student.yaml", cwd=folder).well()


TOYS = {
    "docs/start.md": Toy(
        parquet,
        (*SMALL, TINY),
        ("fixed={resolution: 16, epochs: 1}",),
        ("curriculum={stages: [{resolution: 12}, {resolution: 16}], epochs: 1}",),
        {"12,16,20,24,28,32": "12,16", "--workers 4": "--workers 1"},
        left_out={
            "pip install": OTHERS["pip"],
            "eval": OTHERS["eval"],
            "irkd study": "sixteen runs: tests/test_study.py",
            "irkd train configs/cifar10/vit_tiny_p4_irkd.yaml seed=1": "the run before with other keys; loaded",
            "accelerate": "tests/training/test_engines.py",
            "sbatch": "needs SLURM: tests/cluster/",
        },
        says=("map correlation", "report.html"),
    ),
    "docs/recipes/own-data.md": Toy(
        photos, (*SMALL, TINY), says=("2 classes", "ready (", "comparison.html", "file,class")
    ),
    "docs/recipes/faults.md": Toy(
        with_a_run,
        instead={
            "runs/student": "runs/vit_tiny_p4_irkd-seed0",
            "CONFIG": "student.yaml",
            "curriculum": "fixed",
        },
        fixed=(),
        says=("finished", "all as it should be", "resumed at step", "extended: fixed.epochs: 1 -> 2"),
    ),
    "docs/recipes/saliency-method.md": Toy(trained, says=("[(2, 4, 4), (2, 4, 4)]",)),
    "docs/python.md": Toy(trained, instead={"configs/cifar10/vit_tiny_p4_irkd.yaml": "student.yaml"}),
    "docs/export.md": Toy(
        with_a_run, instead={" --out": " --to timm,onnx --out"}, says=("onnx: largest difference",)
    ),
}


@pytest.mark.parametrize("page", TOYS)
def test_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, said, names = TOYS[page], list[str](), dict[str, object]()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__])
    toy.prepare(tmp_path)
    for block in blocks(page):
        if block.title is not None:
            place = tmp_path / ("my_methods" if block.kind == "python" else "") / block.title
            place.parent.mkdir(exist_ok=True)
            place.write_text(block.text)
        elif block.kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(replaced(block.text, toy), f"{page}:{block.line}", "exec"), names)
            said.append(out.getvalue())
        elif block.kind == "bash":
            said += [run(words, toy, tmp_path) for words in commands(replaced(block.text, toy))]
    whole = "".join(said)
    assert [words for words in toy.says if words not in whole] == [], whole


def replaced(text: str, toy: Toy) -> str:
    """A block with what is too large for a test replaced."""
    for whole, small in toy.instead.items():
        text = text.replace(whole, small)
    return text


def run(words: list[str], toy: Toy, folder: Path) -> str:
    """Run an `irkd` command in its own process, at toy size, and return what it printed."""
    command = shlex.join(words)
    if any(command.startswith(shlex.join(shlex.split(left))) for left in toy.left_out):
        return ""
    assert words[0] == "irkd", f"{command}: name it in left_out, with the reason"
    if words[1] in ("train", "doctor", "plan", "teach"):
        loaded = config.load(words[2], [word for word in words[3:] if not word.startswith("-")])
        words = [*words, *toy.overrides, *(toy.curriculum if loaded.curriculum else toy.fixed)]
    if words[1] == "train" and "name=" not in command:
        words.append(f"name={loaded.name}")
    return irkd_alone(*words[1:], cwd=folder, limit=120).well().said

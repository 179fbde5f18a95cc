"""Where metrics may go besides events.jsonl: TensorBoard, MLflow, Trackio. W&B, with its sweeps, is in tracking.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from irkd_dist import config as configuration
from irkd_dist import runfolder
from irkd_dist.errors import UserError

Rows = list[list[str]]


class Logger(Protocol):
    """What a run sends, whoever takes it. Steps never go back."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers."""
        ...

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """A picture (H, W, 3) uint8."""
        ...

    def table(self, name: str, columns: list[str], rows: Rows, step: int) -> None:
        """A table of texts."""
        ...

    def model(self, files: list[Path]) -> None:
        """The files of the checkpoint that the run is judged by."""
        ...

    def stop(self) -> None:
        """The run stops before its end, and wants to go on."""
        ...

    def finish(self) -> None:
        """All has been sent."""
        ...


class TensorBoard:
    """A writer that has the configuration in it: as text, and what changes the numbers as hyperparameters."""

    def __init__(self, run: Path, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
            from torch.utils.tensorboard.summary import hparams
        except ImportError:
            raise _missing("tensorboard") from None
        self.writer = SummaryWriter(str(run / runfolder.TENSORBOARD))
        text = json.dumps(config, indent=1)
        self.writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), 0)
        for summary in hparams(flat(config), {}):
            self.writer._get_file_writer().add_summary(summary)

    def log(self, values: dict[str, float], step: int) -> None:
        """See Logger."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See Logger."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def table(self, name: str, columns: list[str], rows: Rows, step: int) -> None:
        """As Markdown, which TensorBoard shows as a table."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
        self.writer.add_text(name, "\n".join(lines), step)

    def model(self, files: list[Path]) -> None:
        """It keeps no files."""

    def stop(self) -> None:
        """It knows no runs that stop."""

    def finish(self) -> None:
        """See Logger."""
        self.writer.close()


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in the folder `mlflow` of the run; a resumed run goes on with it."""

    def __init__(self, run: Path, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError:
            raise _missing("mlflow") from None
        self.mlflow, id_file = mlflow, run / runfolder.MLFLOW / "run-id.txt"
        if not mlflow.is_tracking_uri_set():
            id_file.parent.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{(id_file.parent / 'mlflow.db').absolute()}")
            if mlflow.get_experiment_by_name(project) is None:  # else files go to the working folder
                mlflow.create_experiment(project, (id_file.parent / "files").absolute().as_uri())
        known = runfolder.read_word(id_file) or None
        mlflow.set_experiment(project)
        self.run = mlflow.start_run(run_id=known, run_name=None if known else name, log_system_metrics=False)
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(self.run.info.run_id)
        if known is None:
            mlflow.log_params(flat(config))

    def log(self, values: dict[str, float], step: int) -> None:
        """See Logger."""
        self.mlflow.log_metrics(values, step=step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See Logger."""
        self.mlflow.log_image(pixels, key=name.replace("/", "_"), step=step)

    def table(self, name: str, columns: list[str], rows: Rows, step: int) -> None:
        """As a JSON file that MLflow shows as a table."""
        self.mlflow.log_dict({"columns": columns, "data": rows}, f"{name}.json")

    def model(self, files: list[Path]) -> None:
        """See Logger."""
        for file in files:
            self.mlflow.log_artifact(str(file), "checkpoint")

    def stop(self) -> None:
        """The run goes on with the same id later."""

    def finish(self) -> None:
        """See Logger."""
        self.mlflow.end_run()


class Trackio:
    """A run of Trackio, in its own folder on this machine (TRACKIO_DIR); `trackio show` opens it."""

    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import trackio  # pyright: ignore[reportMissingImports] (an extra)
        except ImportError:
            raise _missing("trackio") from None
        self.trackio = trackio
        trackio.init(project=project, name=name, config=flat(config), resume="allow", embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        """See Logger."""
        self.trackio.log(dict(values), step=step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """See Logger."""
        self.trackio.log({name: self.trackio.Image(pixels)}, step=step)

    def table(self, name: str, columns: list[str], rows: Rows, step: int) -> None:
        """As Markdown: its own tables want pandas."""
        lines = ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]
        self.trackio.log({name: self.trackio.Markdown("\n".join(lines))}, step=step)

    def model(self, files: list[Path]) -> None:
        """It keeps no checkpoints."""

    def stop(self) -> None:
        """The run goes on under the same name later."""

    def finish(self) -> None:
        """See Logger."""
        self.trackio.finish()


def flat(config: dict[str, Any]) -> dict[str, bool | int | float | str]:
    """The keys that change the numbers, as `a.b`, with plain values."""
    return {
        key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for key, value in configuration.semantic_keys(config).items()
    }


def artifact_name(text: str) -> str:
    """A name that W&B takes for an artifact."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:120]


def _missing(backend: str) -> UserError:
    return UserError(f"track.backend={backend} needs {backend}: pip install 'irkd_dist[{backend}]'")

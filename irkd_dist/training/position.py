"""Where a run stands in its order of samples; everything random is a function of it and the seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from irkd_dist.training import curriculum


@dataclass(frozen=True)
class Position:
    """A place between two steps. It is never changed: each step, epoch and stage gives the next one."""

    curriculum: curriculum.State = field(default_factory=curriculum.State)
    epoch_step: int = 0  # steps done in the present epoch
    epoch: int = 0  # epochs done in the run
    step: int = 0  # steps done in the run
    stage_step: int = 0  # steps done in the present stage
    finished: bool = False
    stage_bests: tuple[str, ...] = ()  # best checkpoint of each ended stage
    sums: tuple[float, ...] = ()  # loss terms of the epoch so far; saved: of all processes
    seconds: float = 0.0  # spent on the present epoch
    skipped: tuple[int, ...] = ()  # steps without a finite gradient since the last one that had it
    left_out: tuple[int, ...] = ()  # steps whose batches are left out after a roll-back

    def advance(self) -> Position:
        """One step further."""
        return replace(
            self, epoch_step=self.epoch_step + 1, step=self.step + 1, stage_step=self.stage_step + 1
        )

    def next_epoch(self, state: curriculum.State, finished: bool) -> Position:
        """The epoch is done, and the curriculum has decided."""
        return replace(
            self,
            curriculum=state,
            epoch=self.epoch + 1,
            epoch_step=0,
            sums=(),
            seconds=0.0,
            finished=finished,
        )

    def next_stage(self, best: str | None) -> Position:
        """The stage is done; `best` is its best checkpoint."""
        return replace(self, stage_step=0, stage_bests=(*self.stage_bests, *([best] if best else [])))

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return asdict(self)

    @staticmethod
    def from_state(state: dict[str, Any]) -> Position:
        """The position that a checkpoint was taken at."""
        values = {f.name: state[f.name] for f in fields(Position) if f.name in state}
        values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
        return Position(**{**values, "curriculum": curriculum.State(**values["curriculum"])})

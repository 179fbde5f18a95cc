"""Energy that the machine says it has used: its processors' (RAPL) and a process's GPU (NVML). Nothing is estimated."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RAPL = Path("/sys/class/powercap")


@dataclass
class Meter:
    """Joules since the last question; the processors' are told by the first process of a machine alone.

    rapl: where Linux has its energy counters, which only root may read on many machines.
    """

    device: torch.device
    rapl: Path = RAPL
    _last: dict[str, tuple[float, float]] = field(
        default_factory=dict
    )  # by counter: joules, and where it wraps

    def __post_init__(self) -> None:
        self._gpu = _nvml(self.device)
        self._last = self._read()

    def spent(self) -> float | None:
        """Joules since the last call; None where the machine does not tell."""
        before, self._last = self._last, self._read()
        both = [name for name in before if name in self._last]
        if not both:
            return None
        used = 0.0
        for name in both:
            now, wraps = self._last[name]
            used += now - before[name][0] + (wraps if now < before[name][0] else 0.0)
        return used

    def _read(self) -> dict[str, tuple[float, float]]:
        found = {}
        if os.environ.get("LOCAL_RANK", "0") == "0":
            for zone in sorted(
                self.rapl.glob("intel-rapl:?")
            ):  # a package each; its parts are `intel-rapl:0:1`
                try:
                    joules, wraps = (
                        int((zone / name).read_text()) / 1e6 for name in ("energy_uj", "max_energy_range_uj")
                    )
                except (OSError, ValueError):
                    continue
                found[zone.name] = (joules, wraps)
        if self._gpu is not None:
            library, handle = self._gpu
            found["gpu"] = (library.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
        return found


def _nvml(device: torch.device) -> tuple[Any, Any] | None:
    """NVML and this process's GPU in it, if both are there and it counts energy (Volta and later)."""
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml  # pyright: ignore[reportMissingImports] (no dependency: used where it is)

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return pynvml, handle

"""How `irkd plan` holds against the run: forecast and real time and peak memory of each stage, and their ratios.

    python benchmarks/plan.py CONFIG [--against RUN] [key=value ...]

Trains the configuration in a process of its own after the forecast, in a temporary folder, with the same threads; or
holds the forecast against a finished run of this machine, whose memory is not known. The last line is one JSON object;
a ratio is forecast over real.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from irkd_dist import eventlog

PEAK = (
    "import resource, sys; sys.argv[0] = 'irkd'\nfrom irkd_dist.cli import main\ncode = main(sys.argv[1:])\n"
)
PEAK += "print('peak_mib', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)\nsys.exit(code)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--against", type=Path, metavar="RUN", help="a finished run of it, started once")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        own = [*arguments.overrides, f"out={folder}", "name=run"]
        told = subprocess.run(
            [sys.executable, "-m", "irkd_dist", "plan", str(arguments.config), *own, "--json"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        forecast = json.loads(told.stdout.splitlines()[-1])
        peak = None
        if arguments.against is None:
            command = [sys.executable, "-c", PEAK, "train", str(arguments.config), *own]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            peak = float(next(x.split()[1] for x in done.stderr.splitlines() if x.startswith("peak_mib")))
        events = eventlog.read_events(arguments.against or Path(folder) / "run")
    if len([e for e in events if e["event"] == "start"]) != 1:
        parser.error(f"{arguments.against} was started several times: its stages have no time of their own")
    began = [(e["stage"], e["time"]) for e in events if e["event"] == "stage"]
    ends = [t for _, t in began[1:]] + [next(e["time"] for e in events if e["event"] == "summary")]
    real = [end - start for (_, start), end in zip(began, ends, strict=True)]
    stages = [
        {"resolution": s["resolution"], "forecast_s": round(s["seconds"], 1), "real_s": round(r, 1),
         "ratio": round(s["seconds"] / r, 3)}
        for s, r in zip(forecast["stages"], real, strict=True)
    ]  # fmt: skip
    total = next(e["seconds"] for e in events if e["event"] == "summary")
    print(
        json.dumps(
            {
                "benchmark": "plan", "stages": stages, "forecast_s": round(forecast["seconds"], 1),
                "real_s": total, "ratio": round(forecast["seconds"] / total, 3),
                "peak_mib": round(forecast["peak_mib"]), "device": forecast["device"],
                **({} if peak is None else {
                    "real_peak_mib": round(peak), "peak_ratio": round(forecast["peak_mib"] / peak, 3)
                }),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()

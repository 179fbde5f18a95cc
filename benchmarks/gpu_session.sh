#!/usr/bin/env bash
# What an hour of a lent GPU runs, in order, on a machine without a network. Before, where there is one:
#     python benchmarks/carry.py DATA     packs carry/; DATA: a folder cifar10 of parquet files
# There, each in less than ten minutes:
#     OUT=results bash benchmarks/gpu_session.sh setup tests    installs, renders; tests/gpu, each engine among them
#     OUT=results bash benchmarks/gpu_session.sh setup bench    benchmarks/gpu.py
#     OUT=results bash benchmarks/gpu_session.sh setup train    the strong teacher, then its student; ends after TRAIN_S
# `train` goes on with the runs that are there. It leaves them as $OUT/state.NN too: on a fresh machine the same command
# goes on with what is in carry/state.NN. A part that fails does not stop the next; the last lines say how each ended.
# What each printed: $OUT/PART.log. Rehearsed on a CPU by DEVICE=cpu and small TEACHER, STUDENT and RENDER.
# shellcheck disable=SC2086  # RENDER, TEACHER and STUDENT are several words each
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
OUT=$(mkdir -p "${OUT:-runs/gpu}" && cd "${OUT:-runs/gpu}" && pwd) || exit 2
DEVICE=${DEVICE:-cuda}
TESTS_S=${TESTS_S:-240} BENCH_S=${BENCH_S:-520} TRAIN_S=${TRAIN_S:-420}
RENDER=${RENDER:-parquet --path carry/cifar10 --workers $(nproc) --resolutions 12,16,20,24,28,32}
FAST="data.workers=12 data.cache=device checkpoint.keep=1 checkpoint.every_minutes=2 track.log_every=200"
TEACHER=${TEACHER:-$FAST fixed.epochs=72}  # a semantic key: a run that goes on needs the same
STUDENT=${STUDENT:-$FAST}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
irkd() { python3 -m irkd_dist "$@"; }

setup() {
    # shellcheck source=/dev/null  # benchmarks/carry.py writes it
    . carry/install.sh || return
    nvidia-smi 2>&1 | head -15
    python3 -c "import torch; print(torch.__version__, torch.cuda.is_available(), torch.cuda.device_count())"
    [ -e shards/cifar10/manifest.json ] || irkd render $RENDER --out shards/cifar10
}

tests() {
    local on=()
    [ "$DEVICE" = cuda ] || on=(IRKD_GPU_TESTS_ON="$DEVICE")
    timeout "$TESTS_S" env "${on[@]}" python3 -m pytest -p no:cacheprovider -q -ra --durations=15 tests/gpu
}

bench() {
    local quick=()
    [ "$DEVICE" = cuda ] || quick=(--device "$DEVICE" --quick)
    python3 benchmarks/gpu.py --out "$OUT/gpu.json" --budget-s "$BENCH_S" "${quick[@]}"
}

# SIGTERM makes a run write a checkpoint and end with 75
until_time_is_up() {
    local left=$((TRAIN_S - SECONDS + began))
    [ "$left" -gt 5 ] || return 75
    timeout --preserve-status --signal=TERM --kill-after=40 "$left" python3 -m irkd_dist "$@"
}

finished() { grep -qs '"state": "finished"' "$1/status.json"; }

train() {
    local began=$SECONDS code=0
    if ls carry/state.* >/dev/null 2>&1 && [ ! -e runs/cifar10-strong ]; then
        cat carry/state.* | tar -xzf - || return
    fi
    local teacher=runs/cifar10-strong/teacher-seed0 student=runs/cifar10-strong/custom_p4-seed0 without=(--exclude=answers)
    { finished $teacher || until_time_is_up train configs/cifar10/strong/teacher.yaml $TEACHER; } &&
        { [ -e $teacher/evaluation ] || until_time_is_up evaluate $teacher; } &&
        until_time_is_up train configs/cifar10/strong/custom_p4.yaml $STUDENT &&
        until_time_is_up evaluate $student &&
        irkd report $student --out "$OUT/strong.html"
    code=$?
    irkd status runs/cifar10-strong
    # without the teacher's answers, which any run computes again, and of a finished teacher what a student asks for
    finished $teacher && without+=("--exclude=$teacher/best/*/optimizer.safetensors")
    # in pieces, since large files may not travel
    tar -czf - "${without[@]}" runs/cifar10-strong | split -b 15M -d - "$OUT/state."
    ls -l "$OUT"
    return $code
}

ended=()
for part in "${@:-setup}"; do
    case $part in setup | tests | bench | train) ;; *) echo "no part $part: setup, tests, bench, train" >&2; exit 2 ;; esac
    at=$SECONDS
    { $part; } > >(tee "$OUT/$part.log") 2>&1
    code=$?
    ended+=("$part: exit code $code after $((SECONDS - at)) s")
done
printf '%s\n' "${ended[@]}"

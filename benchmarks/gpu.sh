#!/usr/bin/env bash
# One self-contained run on a bare CUDA machine: extension, gpu tests, benchmarks in order of importance.
#   benchmarks/gpu.sh --out DIR [--minutes N] [--wheels DIR] [--parts "build tests goals levels curves tune"]
#       [--commit SHA]
#       [--quality "--domain NAME --train FILE... --test FILE... --steps N ..."]
# --quality takes the options of quality.py; with it, or in a later run with --parts quality, methods are
# trained at length. Models that were trained stay in DIR/models, and a run that was cut off goes on there.
# --commit is for a copy of the sources without .git: what the results name as their commit.
# Results are written as they come; a step that does not fit in the time left is cut off or skipped, and
# one that fails costs no other. The exit status is 1 if any failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out="" minutes=9 wheels="" quality="" parts=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out) out=$2 ;;
        --minutes) minutes=$2 ;;
        --wheels) wheels=$2 ;;
        --parts) parts=$2 ;;
        --quality) quality=$2 ;;
        --commit) export GATEPACK_COMMIT=$2 ;;
        *) echo "unknown option $1; known: --out --minutes --wheels --parts --quality --commit" >&2; exit 2 ;;
    esac
    shift 2
done
[ -n "$out" ] || { echo "--out DIR is required" >&2; exit 2; }
[ -n "$parts" ] || parts="build tests goals levels curves tune${quality:+ quality}"
mkdir -p "$out"
deadline=$((SECONDS + minutes * 60))

export PYTHONPATH="$PWD/python:$PWD/tests/support${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
if [ -n "$wheels" ]; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl ||
        { echo "FAILED wheels"; failed=1; }
    export PYTHONPATH="$site:$PYTHONPATH"
fi
# The extension is built for the chip at hand only: every architecture of note takes minutes.
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
    chip=$(python3 -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") ||
        { echo "no GPU that torch can use: $chip" >&2; exit 1; }
    export TORCH_CUDA_ARCH_LIST=$chip
fi

step() { # seconds at most, name, command...
    local limit=$1 name=$2 left
    shift 2
    left=$((deadline - SECONDS))
    if [ "$left" -lt 20 ]; then
        echo "SKIPPED $name: no time left"
        return
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    echo "== $name (at most $limit s)"
    timeout --kill-after 10 "$limit" "$@" 2>&1 | tee "$out/$name.log" || { echo "FAILED $name"; failed=1; }
}

ops() { # name of the step, seconds at most, then options of bench_ops.py
    local name=$1 limit=$2
    shift 2
    step "$limit" "$name" python3 benchmarks/bench_ops.py --device cuda --json "$out/ops.jsonl" "$@"
}
bench() { # name of the step, seconds at most, then parts of run.py
    local name=$1 limit=$2
    shift 2
    [ "$limit" -lt $((deadline - SECONDS)) ] || limit=$((deadline - SECONDS))
    step "$limit" "$name" python3 benchmarks/run.py --device cuda --out "$out" \
        --budget "$(python3 -c "print($limit / 60)")" --parts "$@"
}
tune() { # op, seconds at most
    step "$2" "tune-$1" python3 benchmarks/tune.py "$1" --json "$out/tuned.jsonl"
}

# Workers compile side by side, and one that loses its GPU to a bad kernel loses no other's tests.
workers=()
if python3 -c "import xdist" 2>/dev/null; then
    workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist loadfile)
fi

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/device.txt" || echo "no nvidia-smi"
for part in $parts; do
    case "$part" in
        build)
            step 240 build python3 -c "
from gatepack import _ext
found = _ext.backend()
print(found)
if found.name == 'torch':
    _ext._load_extension()  # once more, for the compiler's own words
exit(found.name != 'cuda')"
            ;;
        tests) step 300 tests python3 -m pytest -q -rf -m gpu --continue-on-collection-errors "${workers[@]}" tests ;;
        # The speed goals first, then every level, then the curves.
        goals) bench goals 240 goals packing ;;
        levels) bench levels 300 startup levels ops ;;
        curves)
            bench curves 300 curves
            ops curves-ops 600 --models llama-3-8b smollm2-135m --tokens 1 16 256 2048 8192
            ;;
        tune)
            tune gated_mlp 240
            tune gated_attention 120
            tune gated_linear 120
            tune packed_linear 60
            ;;
        quality)
            [ -n "$quality" ] || { echo "part quality: --quality OPTIONS is required" >&2; exit 2; }
            # shellcheck disable=SC2086 # a list of options
            step $((minutes * 60)) quality python3 benchmarks/quality.py --device cuda \
                --work "$out/models" --out "$out/quality" $quality
            ;;
        *) echo "unknown part $part" >&2; exit 2 ;;
    esac
done
exit $failed

#!/usr/bin/env bash
# Measurements on a GPU; docs/benchmarks.md, "On a GPU", says what they are.
#
#   bench/gpu.sh prepare             download the wheels that `train` carries to a machine without a network
#   bench/gpu.sh train [OPTIONS]     a training step against TRL's; torch and transformers are enough
#   bench/gpu.sh annotate [OPTIONS]  capipe annotate against vllm bench throughput; needs capipe[vllm]
#
# PYTHON: the interpreter (python3). WHEELS: the folder of wheels (build/gpu-wheels). OUT: a folder for the results.
# The last line of the output is one JSON object. Without a CUDA device both are dry runs.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-$ROOT/build/gpu-wheels}
case ${1:-} in
prepare)
    download() { "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: -c "$ROOT/constraints.txt" -d "$WHEELS" "$@"; }
    download trl accelerate datasets dill
    for version in 3.11 3.12 3.13; do # its wheels are of one Python version each
        download --python-version "$version" multiprocess
    done
    du -sh "$WHEELS"
    ;;
train | annotate)
    command=$1
    shift
    exec "$PYTHON" "$ROOT/bench/gpu/$command.py" "$@"
    ;;
*)
    sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac

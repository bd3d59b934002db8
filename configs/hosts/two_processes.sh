#!/usr/bin/env bash
# The tiny configuration by two processes on this machine, as two hosts would train it.
#
#   bash configs/hosts/two_processes.sh                         flags that follow are for both
#   bash configs/hosts/two_processes.sh --max-train-steps 20 --caption-retrieval 0
#
# Any CPU with 2 cores and 8 GB. The two of them share the batches that one process has, and the result is the same.
#
# On hosts of your own that share the output folder, start one command of this kind on each: the same address, that of
# the first, and the host's own number.
set -euo pipefail
cd "$(dirname "$0")/../.."

export JAX_PLATFORMS=cpu
export JAX_COORDINATOR_ADDRESS="localhost:${PORT:-12355}"
export JAX_NUM_PROCESSES=2
command=(
  python scripts/train.py --config configs/tiny.yaml --run-name two-processes --per-device-batch-size 16 "$@"
)

JAX_PROCESS_ID=1 "${command[@]}" &
second=$!
trap 'kill -KILL "$second" 2> /dev/null || true' EXIT # nothing goes on without the first

# The one that speaks. Ctrl-C has both save after the same step; the same command goes on from there.
JAX_PROCESS_ID=0 "${command[@]}"
wait "$second"

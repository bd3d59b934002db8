#!/usr/bin/env bash
# SDXL on a slice of a TPU pod: the same command on every host of it, from your own machine.
#
#   bash configs/hosts/tpu_pod.sh                               flags that follow are for all hosts
#
# A v6e-16: 16 chips of 32 GB on 4 hosts. Each has a checkout in ~/sdxl_eqx with `pip install -e '.[tpu]'` done in it
# (the same way, with --worker=all), and in it `shared`, a folder that all hosts share (such as Filestore), with the
# pictures; runs go there too.
#
# JAX finds the other hosts by the metadata of its VM, so the environment says nothing of them. So it does with several
# slices asked for together: there the command is `gcloud compute tpus queued-resources ssh ... --node=all`, and
# each slice holds all weights (--dcn-data-parallelism -1, the default).
#
# The command lasts as long as the run: start it in tmux. To stop the run, tell one host; all save after the same step,
# and this script goes on from there:
#
#   gcloud compute tpus tpu-vm ssh sdxl --zone=us-east5-b --worker=0 --command='pkill -TERM -f "[s]cripts/train.py"'
set -euo pipefail

tpu="${TPU:-sdxl}"
zone="${ZONE:-us-east5-b}"

train=(
  python scripts/train.py
  --run-name sdxl --output-dir shared/outputs --train-data-dir shared/pictures
  # 2.6 billion weights and their optimizer take 31 GB: each chip holds its share.
  --ici-data-parallelism 1 --ici-fsdp-parallelism -1
  --per-device-batch-size 4 --learning-rate 1e-5 --max-train-steps 20000 --checkpoint-every 64000
  --hardware tpu
  "$@"
)

gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all \
  --command="cd ~/sdxl_eqx && $(printf '%q ' "${train[@]}")"

#!/usr/bin/env bash
# Starts several processes of one run on this machine, joined over loopback. Use it to try the set-up of a pod.
#
#   scripts/launch/local_processes.sh PROCESSES DEVICES -- MODULE ARGUMENTS...        DEVICES virtual CPU devices each
#   scripts/launch/local_processes.sh --gpu PROCESSES DEVICES -- MODULE ARGUMENTS...  DEVICES GPUs each
#
#   scripts/launch/local_processes.sh 2 2 -- halonet_jax.train --config=configs/digits.py --workdir="$PWD/runs/two"
#   scripts/launch/local_processes.sh --gpu 8 1 -- halonet_jax.train --config=configs/h0.py --workdir="$PWD/runs/h0"
#
# A machine with several GPUs does not need this: one plain `python -m halonet_jax.train …` uses them all.
# SIGTERM and Ctrl-C reach every process. If one fails, the others are ended. The exit code is that of the first
# failure.
set -euo pipefail

fail() { echo "error: $1" >&2 && exit 2; }
gpu=''
if [[ ${1:-} == --gpu ]]; then gpu=1 && shift; fi
[[ ${1:-} =~ ^[1-9][0-9]*$ && ${2:-} =~ ^[1-9][0-9]*$ && ${3:-} == -- && ${4:-} ]] ||
  fail "'$*' must be [--gpu] PROCESSES DEVICES -- MODULE ARGUMENTS, such as 2 2 -- halonet_jax.train --config=configs/digits.py"
processes=$1 devices=$2
shift 3
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')

pids=()
for ((i = 0; i < processes; i++)); do
  if [[ $gpu ]]; then
    mine=$(seq -s, $((i * devices)) $(((i + 1) * devices - 1)))
    place=(CUDA_VISIBLE_DEVICES="$mine")
  else
    place=(JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices")
  fi
  env "${place[@]}" python -m "$@" --coordinator_address="127.0.0.1:$port" --num_processes="$processes" --process_id="$i" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

code=0 deadline=0
while ((${#pids[@]})); do
  left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    status=0
    wait "$pid" || status=$?
    if ((status && !code)); then
      # After 75 the others are saving and end by themselves. After any other code they wait for the missing process.
      code=$status deadline=$((SECONDS + (status == 75 ? 120 : 20)))
      ((status == 75)) || kill -TERM "${pids[@]}" 2>/dev/null || true
    fi
  done
  pids=(${left[@]+"${left[@]}"})
  if ((deadline && SECONDS > deadline && ${#pids[@]})); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
  sleep 0.2 || true
done
exit "$code"

#!/usr/bin/env bash
# A Ray cluster for the length of a Slurm job, and a run on it.
# Usage, at the root of the checkout on storage that all nodes share:
#   sbatch --nodes=3 scripts/cluster/slurm.sh run CONFIG run.dir=/shared/runs/NAME
#   sbatch --array=0-2 ... run.seed=%a run.dir=/shared/runs/seed-%a   %a: the task's number
#   ROLLOUT_NODES=1        of the nodes, the last ones get the label role=rollout, the others role=train
#   RAY_PORT=6379          of Ray's head
#   RAY_INTERFACE=ib0      network interface between nodes; default: the one of the node's name
#SBATCH --job-name=rlhf-ray
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# If a node of it fails, the head's too, Slurm starts the job again, and the run resumes. Its output
# is appended. A driver that dies on a living node is started again with --retries N (after CONFIG).
# Two minutes before its time is up the run commits and ends, and the job is queued again.
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
set -euo pipefail

RAY_PORT=${RAY_PORT:-6379}
ROLLOUT_NODES=${ROLLOUT_NODES:-1}
VENV=${VENV:-$PWD/.venv}
export PATH=$VENV/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

(($#)) || {
  echo "usage: sbatch --nodes=N $0 COMMAND CONFIG [key=value ...]" >&2
  exit 2
}

[[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || set -- "${@//%a/$SLURM_ARRAY_TASK_ID}"

# A token of this job's own, in a file for its owner alone: never an argument, which others can list.
umask 077
RAY_AUTH_TOKEN_PATH=${SLURM_SUBMIT_DIR:-$PWD}/.ray-token-$SLURM_JOB_ID
export RAY_AUTH_TOKEN_PATH
head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH"
pids=()
clean_up() {
  for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap clean_up EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

on_node() { # on_node NODE COMMAND...
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}"
}

start_ray() { # start_ray NODE ARGUMENT...: not by on_node, whose subshell would be ended, not srun
  srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" ray start --block "${@:2}" &
  pids+=($!)
}

address_of() { # the first IPv4 address of a node, of RAY_INTERFACE where it is set
  on_node "$1" bash -c '
    if [[ -n ${RAY_INTERFACE:-} ]]; then
      ip -4 -o addr show "$RAY_INTERFACE" | sed -E "s#.* inet ([0-9.]+)/.*#\1#"
    else
      hostname --ip-address | cut -d" " -f1
    fi' | head -n 1
}

label_of() { # label_of INDEX
  ((${#nodes[@]} > 1 && $1 >= ${#nodes[@]} - ROLLOUT_NODES)) && echo role=rollout || echo role=train
}

head_address=$(address_of "${nodes[0]}")
start_ray "${nodes[0]}" --head --node-ip-address="$head_address" \
  --port="$RAY_PORT" --dashboard-host=127.0.0.1 --labels "$(label_of 0)"
for ((i = 1; i < ${#nodes[@]}; i++)); do
  start_ray "${nodes[i]}" --address="$head_address:$RAY_PORT" \
    --node-ip-address="$(address_of "${nodes[i]}")" --labels "$(label_of "$i")"
done

export RAY_ADDRESS=$head_address:$RAY_PORT
for ((tries = 0; ; tries++)); do # until every node has joined
  joined=$(ray list nodes --filter state=ALIVE --limit 10000 --format json 2>/dev/null |
    grep -o '"node_id"' | wc -l || true) # all nodes are printed on one line
  ((joined < ${#nodes[@]})) || break
  ((tries < 60)) || {
    echo "only $joined of ${#nodes[@]} nodes joined Ray in 5 minutes" >&2
    exit 1
  }
  sleep "${RAY_WAIT_S:-5}"
done

rlhf-ray "$@" cluster.mode=ray ${RAY_INTERFACE:+"cluster.interface=$RAY_INTERFACE"} &
driver=$!
signalled=
trap 'signalled=1; kill -TERM "$driver" 2>/dev/null || true' TERM
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do # the signal has ended the wait, not the driver
  code=0
  wait "$driver" || code=$?
done
[[ -z $signalled || $code != 143 ]] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"

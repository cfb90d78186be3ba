#!/usr/bin/env bash
# Installs everything and runs the main job: from a Stack Exchange dump to a policy trained by PPO.
# Usage: scripts/quickstart.sh [key=value ...]        (overrides of configs/quickstart.yaml)
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

run_folder() { # as the overrides say: run.dir, else runs/<run.name>
  local argument name=quickstart dir=
  for argument in "$@"; do
    case $argument in
      run.name=*) name=${argument#*=} ;;
      run.dir=*) dir=${argument#*=} ;;
    esac
  done
  echo "${dir:-runs/$name}"
}

offer_one_process() {
  cat <<'TEXT'

vLLM does not run on this machine (see the table above). The same run works in one process with
  cluster.mode=inline rollout.engine=transformers
It then uses neither Ray nor vLLM: nothing runs in parallel, sampling is slower, and no adapters are
sent to another engine. Stages, algorithms, files and report are the same.
TEXT
  [[ -t 0 ]] || return 0
  local answer
  read -r -p "Continue in one process? [y/N] " answer
  [[ $answer == [yY]* ]] || exit 0
}

scripts/setup.sh
if ! python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)'; then
  offer_one_process
  set -- cluster.mode=inline rollout.engine=transformers "$@"
fi

rlhf-ray run configs/quickstart.yaml "$@"

run=$(run_folder "$@")
cat <<TEXT

Open the report in a browser: $run/report.html
Next steps, after   source ${VENV#"$PWD"/}/bin/activate
  rlhf-ray generate $run   # answers of the SFT and the PPO model, side by side
  rlhf-ray plan configs/quickstart.yaml   # memory, placement and run time of a config
  rlhf-ray run configs/stack_exchange_cpu.yaml prepare.posts=PATH/Posts.xml   # train on your dump
TEXT

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

vLLM does not run on this machine (see the table above). The same job runs in one process with
  cluster.mode=inline rollout.engine=transformers
What differs: no Ray and no vLLM, so nothing runs in parallel, sampling is slower, and the sync of
adapters to another engine is not exercised. Stages, algorithms, files and report are the same.
TEXT
  [[ -t 0 ]] || return 0
  local answer
  read -r -p "Go on with that? [y/N] " answer
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

The report: $run/report.html
Try next, after   source ${VENV#"$PWD"/}/bin/activate
  rlhf-ray run configs/stack_exchange_cpu.yaml prepare.posts=PATH/Posts.xml   # a dump of your own
  rlhf-ray plan configs/quickstart.yaml                                       # memory and placement
  rlhf-ray report $run/config.yaml                              # the report, drawn again
TEXT

#!/usr/bin/env bash
# Checks what only GPUs can show, in order of value; docs/gpu.md says what each line means.
# Usage: scripts/gpu_check.sh [--wheels FOLDER] [--out FOLDER] [--steps 1,3] [--nodes] [--limit-s S]
#   --wheels   install packages from this folder, beside those of PYTHON; needs no network
#   --out      results.json, logs, models; default: runs/gpu_check
#   --steps    these steps alone
#   --nodes    the part for several nodes, on a node of a Ray cluster (export RAY_ADDRESS)
#   --limit-s  seconds of all steps together; default: 600, without a GPU 1800, with --nodes 7200
#   PYTHON=/path/to/python   default: .venv/bin/python if scripts/setup.sh was run, else python3
# Without a GPU what needs none runs on tiny models, and the rest says what it would do.
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

fail() {
  echo "gpu_check: $*" >&2
  exit 2
}

wheels=
out=runs/gpu_check
options=()
while (($#)); do
  case $1 in
    --wheels) wheels=${2:?a folder} && shift ;;
    --out) out=${2:?a folder} && shift ;;
    *) options+=("$1") ;;
  esac
  shift
done

python=${PYTHON:-$VENV/bin/python}
[[ -n ${PYTHON:-} || -x $python ]] || python=$(command -v python3) || fail "no Python found"
mkdir -p "$out"
if [[ $wheels ]]; then
  compgen -G "$wheels/*.whl" >/dev/null || fail "$wheels holds no wheels"
  site=$(cd "$out" && pwd)/site
  if [[ ! -e $site/.whole ]]; then # a second call finds them installed
    echo "Installing the wheels of $wheels"
    "$python" -m pip install --quiet --no-index --no-deps --upgrade --target "$site" "$wheels"/*.whl
    touch "$site/.whole"
  fi
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
fi
export PYTHONPATH=$PWD:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m gpu_checks --out "$out" ${options[@]+"${options[@]}"}

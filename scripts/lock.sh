#!/usr/bin/env bash
# Resolves requirements/cpu.txt, gpu.txt and gpu_cu12.txt anew from pyproject.toml and requirements/*.in.
# Usage: scripts/lock.sh            (needs Python 3.11 or 3.12, and the network)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UV_VERSION=0.13.8
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lock() { # lock NAME [uv option ...]
  local name=$1 started=$SECONDS
  shift
  "$work/venv/bin/uv" pip compile pyproject.toml "requirements/$name.in" --extra dev \
    --universal --python-version 3.11 --no-header --no-annotate --quiet "$@" \
    -o "$work/$name.txt" >/dev/null
  {
    echo "# Made by scripts/lock.sh from pyproject.toml and requirements/$name.in: do not edit."
    echo "# For Python 3.11 and 3.12. scripts/setup.sh installs it, with pip --no-deps."
    # Lines for other systems and Pythons, and those of the overrides, can never apply.
    grep -vE "sys_platform == '(never|win32|emscripten)'|python_full_version >= '3.13'" "$work/$name.txt"
  } >"requirements/$name.txt"
  echo "requirements/$name.txt: $(grep -c == "requirements/$name.txt") packages" \
    "($((SECONDS - started)) s)"
}

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq "uv==$UV_VERSION"
lock cpu --extra cpu --override requirements/cpu.overrides
lock gpu --extra gpu
lock gpu_cu12 --override requirements/gpu_cu12.overrides

#!/usr/bin/env bash
# Resolves scripts/requirements/*.txt from pyproject.toml and scripts/requirements/*.in, with hashes.
# Usage: scripts/lock.sh [--upgrade]     (needs Python 3.11 or 3.12, and the network)
#   --upgrade   the newest versions that fit; without it, pinned versions stay where they still fit
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

folder=scripts/requirements
options=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

lock() { # lock NAME [uv option ...]
  local name=$1 started=$SECONDS
  shift
  cp "$folder/$name.txt" "$work/$name.txt" # the versions to prefer
  "$work/venv/bin/uv" pip compile pyproject.toml "$folder/$name.in" --extra dev \
    --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --quiet \
    "$@" "${options[@]}" -o "$work/$name.txt" >/dev/null
  {
    echo "# Made by scripts/lock.sh from pyproject.toml and $folder/$name.in: do not edit."
    echo "# For Python 3.11 and 3.12. scripts/setup.sh installs it, without dependencies."
    # Entries for other systems and Pythons, and those of the overrides, can never apply.
    awk '
      /^[^ #]/ { keep = !/sys_platform == .(never|win32|emscripten).|python_full_version >= .3\.13./ }
      keep' "$work/$name.txt"
  } >"$folder/$name.txt"
  echo "$folder/$name.txt: $(grep -c == "$folder/$name.txt") packages ($((SECONDS - started)) s)"
}

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq "uv==$UV_VERSION"
lock cpu --extra cpu --override "$folder/cpu.overrides"
lock gpu --extra gpu
lock gpu_cu12 --extra train --override "$folder/gpu_cu12.overrides"

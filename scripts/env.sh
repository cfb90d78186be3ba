# shellcheck shell=bash
# Sourced by the other scripts: the checkout as working folder, the environment's programs on PATH.
# (DeepSpeed looks there for ninja, in every process that Ray starts.)
VENV=${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}
mkdir -p "$(dirname "$VENV")"
VENV=$(cd "$(dirname "$VENV")" && pwd)/$(basename "$VENV")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export VENV PATH="$VENV/bin:$PATH"
export UV_VERSION=0.13.8 # resolves and installs the packages

#!/usr/bin/env bash
# Installs everything, then lint, types, import rule and tests; stops at the first that fails.
# Usage: scripts/test.sh [--all] [pytest arguments]
#   --all   the slow tests too, and the chaos tests, which kill real processes
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

marker="not chaos and not slow"
if [[ ${1:-} == --all ]]; then
  marker="" # none: every test
  shift
fi
num_filters=$#
timings=
NUM_WORKERS=$(($(nproc) < 4 ? $(nproc) : 4))

show_timings() {
  local status=$?
  printf '\n%b' "$timings"
  ((status == 0)) && echo "All passed in $SECONDS s." || echo "Failed after $SECONDS s." >&2
}

step() { # step NAME COMMAND...
  local name=$1 started=$SECONDS status=0
  printf '\n== %s\n' "$name"
  "${@:2}" || status=$?
  timings+=$(printf '%-12s %5s s  %s' "$name" $((SECONDS - started)) \
    "$( ((status == 0)) && echo ok || echo "FAILED ($status)")")'\n'
  return $status
}

lint() {
  ruff check . && ruff format --check .
}

tests() { # tests FOLDER [pytest argument ...]
  local status=0
  python -m pytest -m "$marker" "$@" || status=$?
  # A filter may leave nothing of a folder (pytest's exit code 5): no failure if one was asked for.
  ((status != 5 || num_filters == 0)) || status=0
  return $status
}

integration() { # integration MARKERS [pytest argument ...]
  local marker="${marker:+$marker and }$1"
  tests tests/integration "${@:2}"
}

has_tests() {
  compgen -G "$1/test_*.py" >/dev/null
}

other_tests() { # the fast ones, wherever they lie
  tests tests --ignore tests/inline --ignore tests/integration --ignore tests/gpu \
    --ignore tests/chaos -n "$NUM_WORKERS" "$@"
}

# Without a browser the tests that need one are skipped, and say so.
browser() {
  ! command -v chromium || return 0
  if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } \
      >/dev/null 2>&1 && return
    echo "apt-get could not install chromium; try: apt-get update && apt-get install chromium"
  else
    echo "no chromium, and no root or no apt-get to install it"
  fi
}

trap show_timings EXIT
step setup scripts/setup.sh
step browser browser
step lint lint
step types pyright --pythonpath "$VENV/bin/python"
step imports lint-imports
step unit other_tests "$@"
step inline tests tests/inline -n "$NUM_WORKERS" --dist loadfile "$@" # fixtures of a file are shared
# Two at a time: an engine or a cluster that starts leaves a core to another.
step integration integration "not alone" -n 2 --dist loadfile "$@"
step "whole runs" integration alone "$@"
! has_tests tests/gpu || step gpu tests tests/gpu "$@"
[[ -n $marker ]] || ! has_tests tests/chaos || step chaos tests tests/chaos "$@"

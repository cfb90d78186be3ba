#!/usr/bin/env bash
# Writes the generated pages of docs/ anew. Run it after a change of config keys or metrics.
# Usage: scripts/docs.sh
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

write() { # write PAGE MODULE FUNCTION
  local text
  text=$(python -c "from $2 import $3; print($3())")
  printf '%s\n' "$text" >"docs/$1"
  echo "docs/$1"
}

write config.md rlhf_ray.config.reference markdown
write metrics.md rlhf_ray.observability.metrics markdown_table
write other_names.md rlhf_ray.config.key_aliases markdown

#!/usr/bin/env bash
# Writes the generated pages of docs/. Run it after a change of config keys or metrics.
# Usage: scripts/docs.sh [--site]
#   --site   also build the documentation site into build/site/site; a link that leads nowhere fails
set -euo pipefail
# shellcheck source=scripts/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

SITE=build/site
SITE_PACKAGES=(zensical==0.0.73 mkdocstrings-python==2.0.11)

write() { # write PAGE MODULE FUNCTION
  local text
  text=$(python -c "from $2 import $3; print($3())")
  printf '%s\n' "$text" >"docs/$1"
  echo "docs/$1"
}

# The site holds pages from beside docs/ too, so it is built from a copy in which links lead to them.
gather_pages() {
  rm -rf "$SITE/docs"
  cp -r docs "$SITE/docs"
  cp scripts/site/mkdocs.yml "$SITE/mkdocs.yml"
  cp README.md "$SITE/docs/overview.md"
  cp actors/README.md "$SITE/docs/actors.md"
  cp scripts/cluster/README.md "$SITE/docs/cluster_files.md"
  cp .github/CONTRIBUTING.md "$SITE/docs/contributing.md"
  cp .github/SECURITY.md "$SITE/docs/reporting.md"
  sed -i -E '
    s#\]\((\.\./)+README\.md#](overview.md#g
    s#\]\((\.\./)*actors/README\.md#](actors.md#g
    s#\]\((\.\./)*scripts/cluster/README\.md#](cluster_files.md#g
    s#\]\((\.\./)*\.github/CONTRIBUTING\.md#](contributing.md#g
    s#\]\(SECURITY\.md#](reporting.md#g
    s#\]\((\.\./)*docs/#](#g' "$SITE"/docs/*.md
}

build_site() {
  [[ -x $SITE/env/bin/zensical ]] || {
    python -m venv "$SITE/env"
    "$SITE/env/bin/python" -m pip install -qq "${SITE_PACKAGES[@]}"
  }
  gather_pages
  (cd "$SITE" && NO_COLOR=1 env/bin/zensical build --clean --strict)
  echo "$SITE/site/index.html"
}

write config.md rlhf_ray.config.reference markdown
write metrics.md rlhf_ray.observability.metrics markdown_table
write other_names.md rlhf_ray.config.key_aliases markdown
[[ ${1:-} != --site ]] || build_site

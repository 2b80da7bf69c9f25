#!/usr/bin/env bash
# Installs this package for development: install.sh PYTHON [CONSTRAINTS]
#
# With a file of constraints its versions are installed. Where one of them cannot be had, a line says so, and the bounds
# of setup.cfg hold instead of the file. Without one it is the newest versions within those bounds.
set -euo pipefail
python=$1 constraints=${2:-}
log=$(mktemp)
trap 'rm -f "$log"' EXIT

echo "install: torch, transformers and what they need, some gigabytes; this takes minutes"
install() { "$python" -m pip install --disable-pip-version-check --editable '.[dev]' "$@" >"$log" 2>&1; }

if [ -z "$constraints" ]; then
  install --upgrade --upgrade-strategy eager || { cat "$log" >&2; exit 1; }
elif ! install --constraint "$constraints"; then
  wanted=$(sed -n 's/.*The user requested (constraint) //p' "$log" | sort -u | paste -sd ' ')
  echo "install: ${wanted:-a version of $constraints} cannot be had here; installing within setup.cfg's bounds" >&2
  install || { cat "$log" >&2; exit 1; }
fi

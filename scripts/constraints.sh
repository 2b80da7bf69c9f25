#!/usr/bin/env bash
# Prints the versions of everything that is installed, as pip's constraints: constraints.sh PYTHON
#
# What torch pins by itself, and has under other names on other platforms, is left to it.
set -euo pipefail
cat <<'HEAD'
# The versions that the whole test suite last passed on; `make` installs them. CONTRIBUTING.md says how they move.
HEAD
"$1" -m pip --disable-pip-version-check list --format freeze --exclude-editable 2>/dev/null \
  | grep -vE '^(pip|setuptools|wheel|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' | sed -E 's/\+[a-z0-9.]+$//'

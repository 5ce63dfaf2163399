#!/usr/bin/env bash
# Serve a dense model and a mixture of experts in NVFP4 on this machine's CPU, and ask both a few questions.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec .venv/bin/python scripts/demo.py "$@"

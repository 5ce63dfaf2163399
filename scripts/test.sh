#!/usr/bin/env bash
# Format, lint, types and all tests, two files at a time. With arguments: only pytest, which gets them.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if (($# == 0)); then
  .venv/bin/python -m ruff check .
  .venv/bin/python -m ruff format --check .
  .venv/bin/python -m mypy
  set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"

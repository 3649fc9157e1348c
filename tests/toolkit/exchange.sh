#!/usr/bin/env bash
# Exchanges `.nemo` archives with NVIDIA's NeMo toolkit: ours restores there, one saved there opens here.
# Installs into a throw-away environment, as the toolkit pins older versions than requirements.txt; needs a package
# index and minutes, no GPU. PYTHON=... names an interpreter of version 3.11 or newer.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec </dev/null

environment="$(mktemp -d)"
trap 'rm -rf "$environment"' EXIT
"${PYTHON:-python3}" -m venv "$environment"
export PATH="$environment/bin:$PATH"

# torch first: the toolkit takes any version, and would fetch the newest
pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/requirements.txt")"
pip install --quiet --disable-pip-version-check -e "$root[nemo-toolkit]"

# from here on nothing is fetched
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 python "$root/tests/toolkit/exchange.py"

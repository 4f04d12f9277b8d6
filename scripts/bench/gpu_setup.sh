#!/bin/sh
# Prepare a bare GPU machine (Linux x86-64, Python 3.12, torch, transformers, peft, pytest, hypothesis; no network) for gpu.py.
#   scripts/bench/gpu_setup.sh fetch    where there is a network: wheels into .whl/, which git ignores
#   scripts/bench/gpu_setup.sh          there: install them into .gpu/ and see that everything can be imported
#   PYTHONPATH=.:.gpu python scripts/bench/gpu.py
set -eu
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
case "${1:-install}" in
fetch)
    mkdir -p .whl
    # One call for all would look for versions that agree; these are given.
    grep -v '^#' scripts/bench/gpu_wheels.txt | while read -r name; do
        wanted=$(grep -i "^$(echo "$name" | tr _ -)==" constraints.txt || grep -i "^$name==" constraints.txt || echo "$name")
        case "$name" in
        antlr4-python3-runtime) # there is no wheel of it, and nothing to compile in it
            "$PYTHON" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .whl "$wanted" ;;
        *)
            "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
                --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 \
                --platform manylinux_2_34_x86_64 --dest .whl "$wanted" ;;
        esac
    done
    du -sh .whl
    ;;
install)
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --upgrade --target .gpu .whl/*.whl
    PYTHONPATH=.:.gpu FLWR_TELEMETRY_ENABLED=0 "$PYTHON" - <<'EOF'
import clients.private_round, clients.stacked, dp_accounting, fedsb.cli, fedsb.client_app, fedsb.client_stack, fedsb.server_app, opacus, pytest_timeout
from fedsb.config.compose import load
import flwr, torch, transformers

load(["model=llama_3_2_1b", "data.task=causal_lm", "model.dtype=bfloat16"])
print("flwr", flwr.__version__, "opacus", opacus.__version__, "torch", torch.__version__, "transformers", transformers.__version__)
print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
EOF
    ;;
*)
    echo "usage: $0 [fetch]" >&2
    exit 2
    ;;
esac

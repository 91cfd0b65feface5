#!/usr/bin/env bash
# From a bare clone to a trained tiny DeepSeek-V4: environment, training on the Python standard library's source on
# eight simulated devices, one restart from the checkpoint, a sample, and loss.png.
#   scripts/quickstart.sh [key=value ...]     e.g. train.steps=600
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${FATHOM_VENV:-.venv}
run=runs/quickstart
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compilation-cache}
if [ ! -x "$venv/bin/fathom" ]; then
    echo "Installing Fathom into $venv ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet -e .
fi
fathom="$venv/bin/fathom"
rm -rf "$run"
steps=$("$venv/bin/python" -c 'import fathom; print(fathom.load_recipe("tiny-v4-cpu").train.steps)')
half=$((steps / 2))
echo "== Training to step $half, then stopping =="
"$fathom" train tiny-v4-cpu metrics.directory="$run" train.stop_at="$half" "$@"
echo "== Resuming from the checkpoint at step $half =="
"$fathom" train tiny-v4-cpu metrics.directory="$run" "$@"
echo "== A sample from the trained model =="
"$venv/bin/python" scripts/examples/sample.py "$run" --prompt "def "
echo
echo "Loss curve: $run/loss.png   metrics: $run/metrics.jsonl   checkpoint: $run/checkpoints"

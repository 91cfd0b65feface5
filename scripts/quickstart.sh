#!/usr/bin/env bash
# From a bare clone to a trained tiny DeepSeek-V4: environment, training on the Python standard library's source on
# eight simulated devices, one restart from the checkpoint, a sample, and loss.png.
#   scripts/quickstart.sh [key=value ...]     overrides of the recipe tiny-v4-cpu, e.g. train.steps=600
# PYTHON chooses the interpreter (default python3); FATHOM_VENV the environment's folder.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${FATHOM_VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/runs/compilation-cache}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} # where the recipe simulates its eight devices

stop() {
    echo "quickstart: $*" >&2
    exit 1
}

[ ! -x "$venv/bin/python" ] || python="$venv/bin/python"
found=$("$python" -c 'import sys; print("Python %d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    stop "$python does not run; install Python 3.11 or newer, or say PYTHON=/path/to/python3.11 scripts/quickstart.sh"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    stop "$python is $found, Fathom needs 3.11 or newer: PYTHON=python3.11 FATHOM_VENV=.venv-311 scripts/quickstart.sh"
if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)"
    echo "Making the environment $venv with $found ..."
    "$python" -m venv "$venv"
fi
if [ ! -x "$venv/bin/fathom" ]; then
    echo "Installing Fathom into $venv ..."
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet -e .
fi

SECONDS=0
overrides=(metrics.directory=runs/quickstart "$@")
# What the overrides make of the recipe; the loss is held to a limit only in a run of full length.
plan=$("$venv/bin/python" - "${overrides[@]}" <<'EOF'
import sys
from fathom.recipe import RecipeError, load_recipe
try:
    recipe = load_recipe("tiny-v4-cpu", sys.argv[1:])
except RecipeError as error:
    print(f"quickstart: {error}", file=sys.stderr)
    sys.exit(2)
steps = recipe.train.steps
full = steps >= load_recipe("tiny-v4-cpu").train.steps
print(max(steps // 2, 1), int(full), recipe.run_dir, recipe.checkpoint_dir, sep="\n")
EOF
) || exit $?
{ read -r half; read -r full; read -r run; read -r checkpoints; } <<<"$plan"

for folder in "$run" "$checkpoints"; do
    if [ -e "$folder" ]; then
        old="$folder.old-$(date +%Y%m%d-%H%M%S)"
        while [ -e "$old" ]; do old="$old+"; done
        mv "$folder" "$old"
        echo "The earlier run in $folder is now in $old"
    fi
done
echo "== Training to step $half, then stopping =="
"$venv/bin/fathom" train tiny-v4-cpu "${overrides[@]}" train.stop_at="$half"
echo "== Resuming from the checkpoint at step $half =="
"$venv/bin/fathom" train tiny-v4-cpu "${overrides[@]}"
echo "== A sample from the trained model =="
"$venv/bin/python" scripts/examples/sample.py "$checkpoints" --prompt "def "
echo
echo "Loss curve: $run/loss.png   metrics: $run/metrics.jsonl   checkpoints: $checkpoints"
"$venv/bin/python" - "$run" "$full" "$SECONDS" <<'EOF'
import sys
from fathom.train.metrics import read_metrics
LIMIT = 2.2  # nats per byte; text of independent bytes with this text's frequencies would have 3.2
run, full, seconds = sys.argv[1], sys.argv[2] == "1", int(sys.argv[3])
losses = [entry["loss/main"] for entry in read_metrics(run) if "loss/main" in entry]
print(f"loss/main: first {losses[0]:.3f}, last {losses[-1]:.3f} nats per byte after {len(losses)} steps; "
      f"{seconds // 60} min {seconds % 60} s in all")
if full and not losses[-1] < LIMIT:
    sys.exit(f"quickstart: the last loss/main is {losses[-1]:.3f}, expected below {LIMIT}; look at {run}/loss.png")
EOF

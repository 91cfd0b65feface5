#!/usr/bin/env bash
# Makes the test environment if it is not there, and runs the whole suite.
#   scripts/test.sh [pytest arguments]
# PYTHON chooses the interpreter (default python3); FATHOM_VENV the environment's folder.
# With a Python other than 3.11 the PyTorch comparisons are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${FATHOM_VENV:-.venv}
stamp="$venv/.installed-$(cksum pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Installing the test environment into $venv ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet -e ".[test]"
    touch "$stamp"
fi
"$venv/bin/ruff" check --quiet .
exec "$venv/bin/python" -m pytest -n 2 --dist loadgroup -m "not slow" "$@"

#!/usr/bin/env bash
# Makes the test environment if it is not there, and runs the whole suite.
#   scripts/test.sh [pytest arguments]
# PYTHON chooses the interpreter (default python3); FATHOM_VENV the environment's folder.
# With a Python other than 3.11 the PyTorch comparisons are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${FATHOM_VENV:-.venv}
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
extras=test
[ "$version" = 3.11 ] && extras=test,parity
stamp="$venv/.installed-$extras-$(cksum pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
    echo "Installing the test environment into $venv ($extras) ..."
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip
    "$venv/bin/python" -m pip install --quiet -e ".[$extras]"
    touch "$stamp"
fi
"$venv/bin/ruff" check --quiet .
exec "$venv/bin/python" -m pytest -n 2 --dist loadgroup -m "not slow" "$@"

#!/usr/bin/env bash
# Make the virtual environment .venv of this repository, or bring it up to date; does nothing where it already is.
#
#   bash scripts/setup_env.sh && source .venv/bin/activate
#
# $PYTHON names the interpreter to use (default: python3; 3.11 or later).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
extras="mpi,quickstart,ldm,dev"

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python 3.11 or later is needed, and '$python' is not; set PYTHON=/path/to/python3" >&2
    exit 2
fi

# The environment is current if these files and the interpreter are those that it was made from.
wanted=$( { "$python" --version; echo "$extras"; cat pyproject.toml constraints.txt scripts/setup_env.sh; } | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if ! "$python" -m venv --clear .venv; then
        echo "error: '$python -m venv' does not work here; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 2
    fi
fi

echo "installing into .venv (this is done once)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    -e ".[$extras]"
echo "$wanted" >.venv/installed

#!/usr/bin/env bash
# Set up .venv if need be, then run the tests that take seconds. Arguments go to pytest:
#
#   bash scripts/test.sh                   all but the slow ones
#   bash scripts/test.sh -m slow           only those
#   bash scripts/test.sh tests/test_train_util.py -k resumed
#   bash scripts/test.sh -n 0 --pdb        in one process (by default one per core, at most four)
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup_env.sh
# The tests start several ranks: one thread each keeps them from waiting for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# mpiexec of the environment, which belongs to its mpi4py.
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 -m "not slow" "$@"

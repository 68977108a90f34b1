#!/usr/bin/env bash
# The whole of MT-Diffusion on real digits, in minutes on two cores: see experiments/quickstart.py.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup_env.sh
# mpiexec of the environment, which belongs to its mpi4py.
export PATH="$PWD/.venv/bin:$PATH"
exec .venv/bin/python experiments/quickstart.py "$@"

#!/usr/bin/env bash
# Make the documentation site in site/, with the API reference; a link that leads nowhere is an error.
#
#   bash scripts/docs.sh            make it; then open site/index.html
#   bash scripts/docs.sh serve      show it while you write
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/setup_env.sh
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
export NO_MKDOCS_2_WARNING=1  # a note on the next major version, which is not used
exec .venv/bin/python -m mkdocs "${@:-build}"

#!/usr/bin/env bash
# Lints and tests, two test files at a time. Arguments go to pytest: bash launch/test.sh tests/test_scores.py -k hostile
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
python="$(bash "$here/setup.sh" dev)"
cd -- "$here/.."
"$python" -m ruff check
"$python" -m ruff format --check
exec "$python" -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"

#!/usr/bin/env bash
# The main job on this machine: judges the package's examples with the embedded default model, prints the judgments and
# writes verdicts.jsonl in the current folder. Further arguments go to `score`: bash launch/local.sh --votes 32
set -euo pipefail

here="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)"
python="$(bash "$here/setup.sh")"
exec "$python" -m grm_jax.main score --input examples --output verdicts.jsonl --votes 8 --max-new-tokens 256 --show --overwrite "$@"

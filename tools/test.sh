#!/usr/bin/env bash
# Installs what is missing and runs all tests. Arguments go to pytest: bash tools/test.sh tests/algorithms -k gate
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/install.sh
# Slurm's programs, from Debian's packages. Where they cannot be had, what needs them is skipped, in one loud line; CI has them.
bash slurm/install.sh || { status=$?; [[ $status == 3 && "${CI:-}" != true ]] || exit "$status"; }

unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 # tests start processes by the dozen; results are also compared bit for bit
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec .venv/bin/python -m pytest --durations=20 "$@"

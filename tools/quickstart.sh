#!/usr/bin/env bash
# A whole MetaAPO run on the toy world, on this machine: see usage below.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash tools/quickstart.sh [--seed N] [--run DIR] [--slurm]

Checks this machine, installs into .venv, builds the toy world, and performs a MetaAPO run on it: a warm-start round and
three gated rounds. Prints the table of rounds and where the report lies. What is there already is used again: a second
call shows a finished run, and continues one that was stopped.

  --seed N    seed of the toy world and of the run (default 0)
  --run DIR   the run directory (default runs/quickstart; with another seed runs/quickstart-N; with --slurm …-slurm)
  --slurm     the same run as Slurm jobs, on a private Slurm cluster of three nodes that this starts on this machine and stops again:
              the trainer on two nodes (tensor x pipeline parallel 2 x 2), two workers, a sidecar
  --help      this text
END
}

refuse() { # MESSAGE
    echo "quickstart: $*" >&2
    exit 2
}

seed=0
run=
slurm=no
while (($#)); do
    case $1 in
        --seed) [[ "${2:-}" =~ ^[0-9]{1,9}$ ]] || refuse "--seed expects a whole number from 0, got '${2:-}'"; seed=$((10#$2)); shift 2 ;;
        --run) [[ -n "${2:-}" ]] || refuse "--run expects a directory"; run=$(realpath -m -- "$2"); shift 2 ;;
        --slurm) slurm=yes; shift ;;
        -h | --help) usage; exit ;;
        *) usage >&2; refuse "unknown argument $1" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
suffix=$( ((seed == 0)) || echo "-$seed")
world=toy-world$suffix
run=${run:-runs/quickstart$suffix$([[ $slurm == no ]] || echo -slurm)}

unset PYTHONPATH PYTHONHOME
export OMP_NUM_THREADS=1 # for each role's process: more threads than cores would only wait for each other
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export CUDA_VISIBLE_DEVICES= # what tools/install.sh installs is for the CPU

step() { # TEXT
    echo
    echo "== $* (after $SECONDS s)"
}

step "1/3 this machine and its packages"
bash tools/install.sh
[[ $slurm == no ]] || bash slurm/install.sh

step "2/3 the toy world: a policy, a reward model, preference pairs, a gold reward"
.venv/bin/python tools/toy_world.py --output "$world" --seed "$seed"

outcome() { # how the run in $run ended: finished, cancelled or failed; open; or none
    .venv/bin/metaapo status "$run" --refresh --json 2>/dev/null |
        .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["outcome"] or "open")' 2>/dev/null || echo none
}
launch=(launch experiment=quickstart cluster=local toy="'$world'" run="'$run'" seed="$seed")
if [[ $slurm == yes ]]; then
    launch=(launch experiment=quickstart cluster=devcluster toy="'$world'" run="'$run'" seed="$seed"
        trainer.tensor=2 trainer.pipeline=2 inference.workers=2)
fi
start_cluster() { # where the run has something left to do as Slurm jobs
    [[ $slurm == yes ]] || return 0
    cluster=$(mktemp -d /tmp/slurm-XXXXXX)
    setting=$(.venv/bin/python slurm/devcluster.py start "$cluster" --nodes 3) ||
        { rm -rf "$cluster"; refuse "the private Slurm cluster did not start"; }
    trap '.venv/bin/python slurm/devcluster.py stop "$cluster"' EXIT
    eval "$setting"
}
watch() { # after a launch that left the run to its jobs: until they have finished it
    [[ $slurm == yes ]] || return 0
    .venv/bin/metaapo status "$run" --watch
    [[ $(outcome) == finished ]] || { .venv/bin/metaapo explain "$run"; exit 1; }
    .venv/bin/metaapo report "$run"
}

case $(outcome) in
    finished)
        step "3/3 the run: $run holds a finished one, shown here. For another: --run DIR or --seed N"
        .venv/bin/metaapo report "$run"
        ;;
    cancelled | failed)
        step "3/3 the run: $run was stopped; it continues"
        start_cluster
        .venv/bin/metaapo resume "$run"
        watch
        ;;
    *)
        step "3/3 the run: metaapo ${launch[*]}"
        start_cluster
        .venv/bin/metaapo "${launch[@]}"
        watch
        ;;
esac

name=$(printf %q "$run")
cat <<END

Finished after $SECONDS s. What to try next:
  .venv/bin/metaapo verify $name     proves from the records that every pair was trained exactly once
  .venv/bin/metaapo status $name     what it did, round by round
  README.md, "Your own data and model"
END

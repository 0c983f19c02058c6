#!/usr/bin/env bash
# Installs what the development cluster needs, from Debian's or Ubuntu's packages, where it may: as root, or with a sudo
# that asks nothing. Does nothing if all is there. Where it can't, it says so in one line and exits with 3.
set -euo pipefail

PATH=$PATH:/usr/sbin:/usr/local/sbin:/sbin # an ordinary user's PATH lacks the directories of daemons
declare -A package=([munged]=munge [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client
    [slurmdbd]=slurmdbd [mariadbd]=mariadb-server-core)

lacking=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || lacking+=("${package[$program]}")
done
((${#lacking[@]})) || exit 0

install="apt-get install -y --no-install-recommends ${lacking[*]}"
give_up() { # WHY
    echo "SLURM IS NOT INSTALLED, nothing that needs it can run or be tested: $1. Do it by hand: sudo $install" >&2
    exit 3
}
command -v apt-get >/dev/null || give_up "no apt-get here"
if ((EUID == 0)); then
    as_root=(env)
else
    as_root=(sudo -n env)
    sudo -n true 2>/dev/null || give_up "neither root nor a sudo without a password"
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { "${as_root[@]}" DEBIAN_FRONTEND=noninteractive "$@" >>"$log" 2>&1; }
echo "installing ${lacking[*]} ..."
# A fresh container has no package lists yet, an old machine outdated ones.
# shellcheck disable=SC2086 # the words of a command
apt $install || { apt apt-get update && apt $install; } || give_up "apt-get failed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"

# The cluster starts daemons of its own; those of the machine, which a package may have started, are not wanted.
if [[ -d /run/systemd/system ]]; then
    for service in "${lacking[@]}"; do
        "${as_root[@]}" systemctl disable --now "$service" >>"$log" 2>&1 || true
    done
fi

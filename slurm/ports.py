"""TCP ports for several development clusters on one machine."""

from __future__ import annotations

import random
import socket

BLOCK = 62
FIRST_PORTS = range(10_000, 30_000, BLOCK)  # below the ports that Linux gives to clients


def claim_ports(count: int) -> tuple[socket.socket, int]:
    """Find ``count`` (at most ``BLOCK``) free TCP ports in a row; return a claim on them, and the first.

    Slurm must be told its ports beforehand, so they can't be kept by binding them. The claim, which keeps other clusters
    away while it is open, is a socket of an agreed abstract name: the kernel gives a name to one process only, and
    frees it when that process ends. Raises OSError if all are taken.
    """
    for first in random.sample(FIRST_PORTS, len(FIRST_PORTS)):
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0slurm-devcluster-{first}")
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Slurm does
                    probe.bind(("", port))
            return claim, first
        except OSError:
            claim.close()
    raise OSError(f"no {count} free TCP ports in a row from {FIRST_PORTS.start} to {FIRST_PORTS.stop}")

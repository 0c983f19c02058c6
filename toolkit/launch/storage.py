"""Whether a filesystem can carry a run: what the exchange relies on, tried in a directory of its own beside where the run will be."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from toolkit.config import Config
from toolkit.errors import UserError
from toolkit.exchange import filesystem
from toolkit.launch.estimate import disk, parameters
from toolkit.launch.finding import Finding, fault, note, ok, warning

GIB = 2**30
LEAST_FREE = 10 * GIB  # where the size of a run is not known
LEAST_FILES = 20_000  # a run of hundreds of shards has some thousands of files
SKEW = 5.0  # seconds between this machine's clock and the filesystem's that are worth a word
NFS_CACHE = 60.0  # seconds that an NFS client may keep a directory's names, unless mounted otherwise (acdirmax, nfs(5))
OWN_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")


def nearest(path: Path) -> Path:
    """``path``, or the nearest directory above it that exists."""
    return next(each for each in (path, *path.parents) if each.is_dir())


@contextlib.contextmanager
def probe_directory(run: Path) -> Iterator[Path | None]:
    """A directory on the filesystem of a run, with the group and mode that the run would get; None if nothing can be written."""
    probe = nearest(run) / f".metaapo-doctor-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
    except OSError:
        yield None
        return
    try:
        yield probe
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def check_storage(config: Config, probe: Path | None) -> Iterator[Finding]:
    """Try out the run directory's filesystem in ``probe``."""
    run = Path(config.run)
    subject = f"filesystem of {run.parent}"
    if probe is None:
        yield fault(subject, f"{nearest(run)} cannot be written to: choose another place for the run, run=DIR")
        return
    kind, options = mount(probe)
    if config.cluster.kind == "slurm" and kind in OWN_DISKS:
        yield warning(
            subject, f"{kind}: a disk of this machine. Every node of a job must see the run directory: run=DIR"
        )
    yield from _semantics(subject, kind, probe)
    yield _visibility(config, subject, kind, options, probe)
    yield from _permissions(config, subject, probe)
    yield from _room(config, subject, probe)
    skew = _skew(probe)
    if abs(skew) > SKEW:
        yield warning(
            subject, f"its clock differs from this machine's by {skew:+.0f} s: ages in `metaapo status` will be off"
        )


def _semantics(subject: str, kind: str, probe: Path) -> Iterator[Finding]:
    """Hard links, names that are given once, renames and syncs in a directory."""
    try:
        first = filesystem.create_once(probe / "once", b"first")  # private file, fsync, link, fsync of the directory
        second = filesystem.create_once(probe / "once", b"second")
        filesystem.replace(probe / "replaced", b"old")
        filesystem.replace(probe / "replaced", b"new")
        (probe / "folder").mkdir()
        (probe / "folder").rename(probe / "renamed")
    except (OSError, UserError) as error:
        yield fault(subject, f"{kind}: {error}")
        return
    kept = (probe / "once").read_bytes(), (probe / "replaced").read_bytes()
    if (first, second, *kept) != (True, False, b"first", b"new") or not (probe / "renamed").is_dir():
        yield fault(
            subject,
            f"{kind}: a name that was taken could be given again, or a rename did nothing; a run needs another place",
        )
    else:
        yield ok(subject, f"{kind}: hard links, names given once, renames, and directories that can be synced")


def _visibility(config: Config, subject: str, kind: str, options: dict[str, str], probe: Path) -> Finding:
    """How long a name that was looked for in vain may stay unseen after another process has made it."""
    wanted = probe / "late"
    assert not wanted.exists()  # a negative lookup, which may be remembered
    with subprocess.Popen(["/bin/sh", "-c", 'exec > "$0"', str(wanted)]) as writer:
        writer.wait()
    started = time.monotonic()
    while not wanted.exists() and time.monotonic() - started < 2 * NFS_CACHE:
        time.sleep(0.05)
        filesystem.refresh(probe)
    measured = time.monotonic() - started
    cached = kind.startswith("nfs") and "noac" not in options and options.get("lookupcache") != "none"
    window = float(options.get("acdirmax", NFS_CACHE)) if cached else 0.0
    seen = f"what another process made was seen after {measured:.1f} s here"
    if not window and measured < 1:
        return ok(subject, f"{seen}; {kind} promises no delay between nodes")
    advice = "keep method.meta.lag at 1 or more" if config.method.meta.lag == 0 else "method.meta.lag covers it"
    level = warning if config.learns and config.method.meta.lag == 0 else note
    return level(subject, f"{seen}; between nodes it may take {max(window, measured):.0f} s ({kind}): {advice}")


def _permissions(config: Config, subject: str, probe: Path) -> Iterator[Finding]:
    """Modes and groups of new files, as the run's umask wants them."""
    umask = int(config.cluster.umask, 8)
    before = os.umask(umask)
    try:
        (probe / "shared").mkdir()
        (probe / "shared" / "file").touch()
    finally:
        os.umask(before)
    found, folder = (probe / "shared" / "file").stat(), nearest(Path(config.run)).stat()
    wanted = 0o666 & ~umask
    if found.st_mode & 0o777 != wanted:
        yield warning(
            subject,
            f"new files get mode {found.st_mode & 0o777:03o} where cluster.umask asks for {wanted:03o} (default ACLs?)",
        )
    if wanted & 0o070 and found.st_gid != folder.st_gid:
        yield warning(
            subject,
            f"new files belong to group {found.st_gid}, not to that of {nearest(Path(config.run))} ({folder.st_gid}): "
            f"chmod g+s {nearest(Path(config.run))} mends it; quotas of groups count there, too",
        )


def _room(config: Config, subject: str, probe: Path) -> Iterator[Finding]:
    state = os.statvfs(probe)
    free = state.f_bavail * state.f_frsize
    needed = kept(config)
    needs = (
        f"a run takes up to {needed / GIB:,.1f} GiB"
        if needed
        else f"no model is read; runs take {LEAST_FREE / GIB:.0f} GiB and more"
    )
    words = f"{free / GIB:,.1f} GiB free; {needs}"
    if free < (needed or LEAST_FREE):
        yield fault(subject, f"{words}: make room, keep less (retention.checkpoints, retention.policies), or run=DIR")
    else:
        yield ok(subject, f"{words}. Quotas are not seen here: ask your site's command")
    if state.f_files and state.f_favail < LEAST_FILES:
        yield warning(subject, f"{state.f_favail:,} more files fit; a run makes thousands")


def kept(config: Config) -> int:
    """Bytes of the checkpoints and policies that are kept at a time, at most; 0 if the model is not there."""
    try:
        return disk(config, parameters(config.model.policy))[2]
    except (OSError, UserError):
        return 0


def _skew(probe: Path) -> float:
    before = time.time()
    (probe / "clock").write_bytes(b".")
    return (probe / "clock").stat().st_mtime - (before + time.time()) / 2


def mount(path: Path) -> tuple[str, dict[str, str]]:
    """Kind of the filesystem that holds ``path``, and its mount options (proc(5), mountinfo)."""
    found: tuple[int, str, dict[str, str]] = (-1, "unknown filesystem", {})
    target = path.resolve()
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        point = Path(left.split()[4].encode().decode("unicode_escape"))
        if len(point.parts) > found[0] - 1 and target.is_relative_to(point):
            kind, _, *more = right.split()
            options = ",".join([left.split()[5], *more])
            found = len(point.parts) + 1, kind, dict(option.partition("=")[::2] for option in options.split(","))
    return found[1], found[2]

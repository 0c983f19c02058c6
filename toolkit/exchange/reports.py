"""Reports of damaged records: a reader that met one says so here; the tick looks for itself and condemns."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from toolkit.exchange import filesystem, layout, lineage, retention
from toolkit.exchange.records import Corrupt, Manifest, Ref, check, decode
from toolkit.exchange.run import Run


def report(run: Run, corrupt: Corrupt) -> None:
    """Leave a note for the tick about the damaged record that this attempt met."""
    path = corrupt.manifest_path.relative_to(run.root)
    body = {"manifest": str(path), "detail": corrupt.detail, "attempt": run.attempt}
    directory = run.root / "reports"
    directory.mkdir(exist_ok=True)
    filesystem.replace(directory / f"{str(path).replace('/', '~')}", json.dumps(body).encode())


def condemn_reported(run: Run) -> list[str]:
    """Look at every reported record and condemn the damaged ones (only the tick does this).

    A record that a checkpoint of the lineage consumed may only be re-made to the same bytes: its tombstone says which.

    Returns:
        What was condemned, a line each.
    """
    condemned = []
    directory = run.root / "reports"
    for note in sorted(directory.glob("*.json")) if directory.is_dir() else []:
        try:
            path = run.root / str(json.loads(note.read_bytes())["manifest"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        detail, ref = damage(path), ref_of(run.root, path)
        if detail is not None and not retention.is_deleted(run, ref):
            if not _is_condemned(path):
                run.records.condemn(path, ref, "damaged", detail, _required(run, ref, path))
                condemned.append(f"{ref}: {detail}")
            _announce(run, ref, detail)  # also if a tick condemned it that died before it could say so
        with contextlib.suppress(OSError):
            note.unlink()
    return condemned


def _announce(run: Run, ref: Ref, detail: str) -> None:
    number = 0
    while not run.records.publish(layout.condemned(number), {"record": str(ref), "detail": detail})[1]:
        number += 1


class Condemnations:
    """Tells whoever remembers records that some were condemned: what it thought done may have to be done again."""

    def __init__(self, run: Run) -> None:
        self.run, self.seen = run, 0
        self.news()

    def news(self) -> bool:
        """Whether anything was condemned since the last call."""
        before = self.seen
        while self.run.records.find(layout.condemned(self.seen)) is not None:
            self.seen += 1
        return self.seen > before


def ref_of(root: Path, manifest_path: Path) -> Ref:
    """The name of the record whose manifest lies at this path."""
    directory = manifest_path.parent.relative_to(root)
    return Ref(
        "" if str(directory) == "." else str(directory), manifest_path.name.removesuffix(".json").rpartition(".g")[0]
    )


def damage(manifest_path: Path) -> str | None:
    """What is wrong with a record's bytes, or None."""
    try:
        manifest = decode(manifest_path, manifest_path.read_bytes())
        for entry in manifest.files:
            check(manifest, entry)
    except FileNotFoundError:
        return None
    except Corrupt as error:
        return error.detail
    return None


def _is_condemned(manifest_path: Path) -> bool:
    return manifest_path.with_name(manifest_path.name.removesuffix(".json") + ".tombstone.json").exists()


def _required(run: Run, ref: Ref, path: Path) -> list[str] | None:
    """The file digests a re-made record must have, if a checkpoint consumed this one."""
    if not any(str(ref) in manifest.attributes["consumed"] for manifest in lineage.chain(run.records)):
        return None
    try:
        manifest: Manifest = decode(path, path.read_bytes())
    except Corrupt:
        return []  # the manifest itself is damaged: no re-made record can be shown to be equal
    return [entry.digest for entry in manifest.files]

"""Reports of damaged records: a reader that met one says so here; the tick looks for itself and condemns."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

from toolkit.exchange import filesystem, layout, lineage, retention
from toolkit.exchange.records import Corrupt, Ref, check, decode
from toolkit.exchange.run import Run

# Where the scores and the annotations of shards lie.
SHARD = re.compile(r"rounds/(?P<round>\d+)/(logprobs/[^/]+/(?P<half>offline)|annotations)/\d+")


def report(run: Run, corrupt: Corrupt) -> None:
    """Leave a note for the tick about the damaged record that this attempt met."""
    path = corrupt.manifest_path.relative_to(run.root)
    body = {"manifest": str(path), "detail": corrupt.detail, "attempt": run.attempt}
    directory = run.root / "reports"
    directory.mkdir(exist_ok=True)
    filesystem.replace(directory / f"{str(path).replace('/', '~')}", json.dumps(body).encode())


def condemn_reported(run: Run) -> list[str]:
    """Look at every reported record and condemn the damaged ones (only the tick does this).

    A record that a checkpoint of the lineage consumed, or that others were made from, may only be re-made to the same bytes: its
    tombstone says which. Where a second damaged record stands in the way of finding that out, it is reported and comes first.

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
        try:
            if detail is not None and not retention.is_deleted(run, ref):
                if not _is_condemned(path):
                    run.records.condemn(path, ref, "damaged", detail, _required(run, ref, path))
                    condemned.append(f"{ref}: {detail}")
                _announce(run, ref, detail)  # also if a tick condemned it that died before it could say so
        except Corrupt as other:
            report(run, other)
            continue
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
    """The file digests a re-made record must have, if a checkpoint consumed this one or other records were made from it."""
    if ref.directory == layout.checkpoint(0).directory:
        return None  # training goes back to the one before it
    consumed = any(str(ref) in manifest.attributes["consumed"] for manifest in lineage.chain(run.records))
    if not consumed and not _has_descendants(run, ref):
        return None
    try:
        return [entry.digest for entry in decode(path, path.read_bytes()).files]
    except Corrupt:
        return []  # the manifest itself is damaged: no re-made record can be shown to be equal


def _has_descendants(run: Run, ref: Ref) -> bool:
    """Whether other records were made from these pairs, this policy, or the scores or annotations of this shard."""
    if ref == layout.PAIRS:
        return run.newest_policy() is not None
    if ref.directory == layout.policy(0).directory:
        responses = (run.root / layout.responses(int(ref.name), 0).directory).parent
        made = [layout.evaluation(int(ref.name)), Ref(str(responses.relative_to(run.root)), "*/*")]
    elif match := SHARD.fullmatch(ref.directory):
        index, shard = int(match["round"]), int(ref.name)
        scores = [layout.statistics(index), layout.requests(index, shard)]
        made = scores if match["half"] else [layout.logprobs("*", "online", index, shard)]
    else:
        return False
    return any(True for name in made for _ in run.root.glob(f"{name}.g*.json"))

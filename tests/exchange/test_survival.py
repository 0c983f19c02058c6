"""Writers that are killed or paused at any moment."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

from tests.exchange.conftest import answer, script
from toolkit.exchange import layout
from toolkit.exchange.records import Records, check, decode

# Forks a writer again and again and kills it at a random moment after its first record.
KILLED_WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
from toolkit.exchange.records import Records, Ref

root, kills = Path(sys.argv[1]), int(sys.argv[2])

def write(writer, started):
    records = Records(root, f"writer-{writer}")
    for number in range(10000):
        name = f"{writer:03d}-{number:05d}"
        records.publish(Ref("data", name), {"size": number}, blobs={".bin": name.encode() * 4000, ".txt": name.encode()})
        os.write(started, b"1")

for writer in range(kills):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        write(writer, writing)
        os._exit(0)
    os.read(reading, 1)
    time.sleep(random.Random(writer).uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


def test_readers_never_see_a_part_of_a_record_whoever_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "data"
    directory.mkdir()
    writers = script(KILLED_WRITERS, tmp_path, 40)
    looks = 0
    while writers.poll() is None:  # a reader all the while; `decode` and `check` raise at the first torn byte
        for path in list(directory.glob("[0-9]*.g0.json"))[-20:]:
            manifest = decode(path, path.read_bytes())
            for entry in manifest.files:
                check(manifest, entry)
            looks += 1
        time.sleep(0.002)
    answer(writers)
    assert looks

    reader, named = Records(tmp_path, "reader"), set()
    manifests = sorted(directory.glob("[0-9]*.g0.json"))
    assert len(manifests) >= 40
    for path in manifests:
        manifest = decode(path, path.read_bytes())
        for suffix, times in ((".bin", 4000), (".txt", 1)):
            content = reader.verified(manifest, manifest.file(suffix)).read_bytes()
            assert content == path.name[:9].encode() * times
        named |= {path.name, *(entry.path for entry in manifest.files)}
    garbage = {path.name for path in directory.iterdir()} - named
    assert garbage, "no writer was killed inside a publication, so nothing was shown"
    assert all(name.startswith(".") or ".g0.writer-" in name for name in garbage), garbage
    # A name whose writer was killed before it had it is free for the next one.
    last = max(int(path.name[4:9]) for path in manifests if path.name.startswith("000-"))
    free = layout.Ref("data", f"000-{last + 1:05d}")
    assert Records(tmp_path, "next").publish(free, {})[1]


# Stops itself in the last moment before it takes the name.
PAUSED_WRITER = """
import json, os, signal, sys
from pathlib import Path
from toolkit.exchange import layout
from toolkit.exchange.records import Records

link = os.link
def pausing(*arguments):
    os.kill(os.getpid(), signal.SIGSTOP)
    link(*arguments)
os.link = pausing

manifest, won = Records(Path(sys.argv[1]), "paused").publish(layout.phi(3), {"by": "paused"}, blobs={".bin": b"paused"})
print(json.dumps([won, manifest.attempt, manifest.attributes["by"]]))
"""


def test_a_paused_writer_that_wakes_late_loses(tmp_path: Path) -> None:
    paused = script(PAUSED_WRITER, tmp_path)
    _, status = os.waitpid(paused.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    records = Records(tmp_path, "second")
    assert records.find(layout.phi(3)) is None
    manifest, won = records.publish(layout.phi(3), {"by": "second"}, blobs={".bin": b"second"})
    assert won
    before = manifest.path.read_bytes()
    os.kill(paused.pid, signal.SIGCONT)
    assert json.loads(answer(paused)) == [False, "second", "second"]
    assert manifest.path.read_bytes() == before
    found = records.require(layout.phi(3))
    assert records.verified(found, found.file(".bin")).read_bytes() == b"second"

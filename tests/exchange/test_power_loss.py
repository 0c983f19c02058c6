"""What is published survives a power loss: the disk as it is at that moment, mounted again, has the whole record."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.exchange.conftest import answer, script

# The filesystem writes nothing by itself for an hour, so what reaches its disk is what somebody forced there.
MOUNT = (
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -o loop,commit=3600 "$1" "$2" && shift 2 && exec "$@"',
    "sh",
)
PUBLISH = """
import os, shutil, sys
from pathlib import Path
from toolkit.exchange import layout
from toolkit.exchange.records import Records

root, disk, crashed = map(Path, sys.argv[1:])
records = Records(root, "writer")
records.publish(layout.phi(1), {"version": 1}, blobs={".bin": bytes(range(256)) * 1000})
(root / "unsynced").write_text("written, never forced to disk")
shutil.copyfile(disk, crashed)  # the power fails here
"""
LOOK = """
import json, sys
from pathlib import Path
from toolkit.exchange import layout
from toolkit.exchange.records import Records, check

root = Path(sys.argv[1])
manifest = Records(root, "reader").require(layout.phi(1))
for entry in manifest.files:
    check(manifest, entry)
print(json.dumps({"version": manifest.attributes["version"], "unsynced": (root / "unsynced").exists()}))
"""


def test_a_published_record_survives_a_power_loss(tmp_path: Path) -> None:
    disk, crashed, mount = tmp_path / "disk", tmp_path / "crashed", tmp_path / "mount"
    mount.mkdir()
    with disk.open("wb") as file:
        file.truncate(32 * 2**20)
    probe = subprocess.run(["mkfs.ext4", "-q", str(disk)], capture_output=True, text=True, check=False)
    if not probe.returncode:
        probe = subprocess.run([*MOUNT, str(disk), str(mount), "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no disk image can be mounted here: {probe.stderr.strip()}")
    answer(script(PUBLISH, mount, disk, crashed, prefix=(*MOUNT, str(disk), str(mount))))
    found = json.loads(answer(script(LOOK, mount, prefix=(*MOUNT, str(crashed), str(mount)))))
    assert found == {"version": 1, "unsynced": False}

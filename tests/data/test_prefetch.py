"""What is brought to a place without a network, from a hub of the test's own on this machine."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest

from tests.exchange.conftest import make_config
from toolkit import cli
from toolkit.config import Config, build
from toolkit.data import prefetch
from toolkit.data.prefetch import fetch, is_hub_id
from toolkit.errors import UserError

FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"first",
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "tokenizer.model": b"pieces",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"code",
    "original/consolidated.safetensors": b"again",
    "README.md": b"words",
}
REPOSITORIES = {"org/tiny": FILES, "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"a pickle"}}
COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download of a model takes."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in REPOSITORIES:
            name = "/".join(parts[2:4])
            if parts[4:5] == ["tree"]:
                sizes = {file: len(content) for file, content in REPOSITORIES[name].items()}
                rows = [{"type": "file", "path": file, "size": size, "oid": file} for file, size in sizes.items()]
                return self.answer(json.dumps(rows).encode())
            names = [{"rfilename": file} for file in REPOSITORIES[name]]
            return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": names}).encode())
        if len(parts) > 4 and parts[2] == "resolve":
            return self.answer(REPOSITORIES["/".join(parts[:2])]["/".join(parts[4:])])
        code = {"gated": "GatedRepo"}.get(parts[-3] if len(parts) > 2 else "", "RepoNotFound")
        self.send_response(403 if code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    do_HEAD = do_GET

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        headers = {"ETag": f'"{abs(hash(content)):x}"', "X-Repo-Commit": COMMIT, "Content-Length": str(len(content))}
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that downloads ask; yields the paths that were asked for."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    download = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *names, **more: download(*names, endpoint=address, **more)
    )
    Hub.asked.clear()
    yield Hub.asked
    server.shutdown()
    server.server_close()


def config(tmp_path: Path, **groups: object) -> Config:
    given = {"model": {"policy": "/models/mine"}, "data": {"path": "/data/mine.parquet"}, "reward": {"model": None}}
    return build(Config, given | groups)


def test_models_come_as_safetensors_tokenizer_and_template(tmp_path: Path, hub: list[str]) -> None:
    said: list[str] = []
    wanted = config(tmp_path, model={"policy": "org/tiny", "reference": "org/tiny"}, reward={"model": "/models/judge"})
    found = fetch(wanted, tmp_path, said.append)
    folder = tmp_path / "models" / "org--tiny"
    assert found == {"model.policy": str(folder), "model.reference": str(folder)} and len(said) == 1
    names = {
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts
    }
    assert names == FILES.keys() - {
        "pytorch_model.bin",
        "modeling_custom.py",
        "original/consolidated.safetensors",
        "README.md",
    }
    assert (folder / "model-00002-of-00002.safetensors").read_bytes() == b"second"
    assert not [path for path in hub if path.endswith((".bin", ".py"))]


def test_a_model_of_pickles_is_refused(tmp_path: Path, hub: list[str]) -> None:
    with pytest.raises(UserError, match=r"reward.model: org/pickled has no weights as safetensors.*convert it"):
        fetch(config(tmp_path, reward={"model": "org/pickled"}), tmp_path)
    assert not [path for path in hub if path.endswith(".bin")]


def test_names_that_the_hub_does_not_give(tmp_path: Path, hub: list[str]) -> None:
    with pytest.raises(
        UserError, match=r"model.policy: could not download org/none: there is no such repository.*hf auth login"
    ):
        fetch(config(tmp_path, model={"policy": "org/none"}), tmp_path)
    with pytest.raises(UserError, match="could not download org/gated: its owner gives access"):
        fetch(config(tmp_path, model={"policy": "org/gated"}), tmp_path)


def test_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    expected = r"could not download org/tiny.*no network: call it on a login or data-transfer node"
    with pytest.raises(UserError, match=f"model.policy: {expected}"):
        fetch(config(tmp_path, model={"policy": "org/tiny"}), tmp_path)
    with pytest.raises(UserError, match=f"data.path: {expected}"):
        fetch(config(tmp_path, data={"path": "org/tiny"}), tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_data_becomes_parquet(tmp_path: Path) -> None:
    """`datasets` reads a folder of files as it reads a repository of them."""
    source = tmp_path / "source"
    source.mkdir()
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in range(5)]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "to" / "data" / "org--pairs.train.parquet"
    prefetch._data(str(source), "train", file)
    assert pq.read_table(file).to_pylist() == rows
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    with pytest.raises(UserError, match=r"could not download .* \[test\]: check the name and, for data, data.split"):
        prefetch._data(str(source), "test", tmp_path / "other.parquet")


def test_data_that_is_there_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data" / "org--pairs.train.parquet"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(prefetch, "_data", lambda *_: pytest.fail("fetched again"))
    assert fetch(config(tmp_path, data={"path": "org/pairs"}), tmp_path) == {"data.path": str(file)}


def test_local_paths_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(config(tmp_path), tmp_path) == {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert not is_hub_id("org/tiny") and is_hub_id("org/other")
    for name in ("", "pairs.parquet", "/a/b", "./a/b", "../a", "~/a", "a/b/c", "data/pears.jsonl", "a/b.parquet"):
        assert not is_hub_id(name), name


def test_the_command_prints_what_to_launch_with(
    tmp_path: Path, hub: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["prefetch", "model.policy=org/tiny", "--to", str(tmp_path / "my models")]) == 0
    printed = capsys.readouterr().out
    assert f"launch with: 'model.policy={tmp_path}/my models/models/org--tiny'" in printed
    assert cli.main(["prefetch", "--to", str(tmp_path)]) == 0
    assert "nothing to download" in capsys.readouterr().out
    assert cli.main(["prefetch", "model.policy=gpt2", "--to", str(tmp_path)]) == 0
    assert "nothing to download: no key names a model or data set of the Hub as owner/name" in capsys.readouterr().out


def test_who_names_a_hub_id_is_told_of_prefetch(tmp_path: Path) -> None:
    from toolkit.launch.preflight import preflight

    with pytest.raises(
        UserError, match=r"model.policy: .* got org/tiny.*metaapo prefetch .*model.policy=org/tiny --to DIR"
    ):
        preflight(make_config(tmp_path, model={"policy": "org/tiny"}, data={"path": "org/data"}))

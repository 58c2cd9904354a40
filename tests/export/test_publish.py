"""`qft export --register` and `--push-to-hub`: what passed is handed on, and nothing else.

The hub is one of our own on this machine, to which the real client speaks over real HTTP.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from qft import registry as versions
from qft.documents.registry import VersionManifest
from qft.errors import GateError, MissingError, RecipeError, RunError
from qft.export import export
from qft.export.publish import registry as registering
from qft.files import sha256
from qft.progress import View
from tests.support.cli import qft
from tests.support.exports import options, refusal
from tests.support.paths import ROOT
from tests.support.runs import trained
from tests.support.versions import exported

OID = "c" * 40
# The hub's client, of the HTTP library that it brings.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")


def nothing_was_done(out: Path) -> bool:
    return not out.exists() or not list(out.iterdir())


# The registry.


def test_what_is_written_becomes_the_next_versions(run: Path, tmp_path: Path) -> None:
    registry = tmp_path / "models"
    asked = ("--to", "merged", "--to", "adapter", "--out", tmp_path / "out", "--register", "m", "--registry", registry)
    ran = qft("export", run, *asked, "--json")
    assert ran.exit_code == 0, ran.stderr
    merged, adapter = json.loads(ran.stdout)
    assert merged["registered"] == {"name": "m", "version": 1, "registry": str(registry)}
    assert adapter["registered"]["version"] == 2
    shelf = versions.find_shelf(registry, "m")
    manifests = {number: shelf.manifest(f"v{number}") for number in shelf.numbers()}
    assert [manifest.target for manifest in manifests.values()] == ["merged", "adapter"]
    for number, document in ((1, merged), (2, adapter)):
        manifest = manifests[number]
        assert manifest.run == str(run)
        assert manifest.gate
        assert manifest.gate.passed is True
        assert manifest.base
        assert manifest.base.model_dump() == document["base"]
        assert manifest.scores
        assert manifest.scores["loss"] > 0
        copied = registry / "m" / f"v{number}" / "artifact"
        assert {name: sha256(copied / name) for name in document["sha256"]} == document["sha256"]
        # The artifact is as it was when its gate saw it.
        assert json.loads((Path(document["path"]) / "export.json").read_text())["registered"] is None
    assert versions.problems(registry, "m") == []
    again = qft("export", run, *asked, "--overwrite")
    assert "m v4 added" in again.stdout
    next_step = re.search(r"qft models promote m 3.*", again.stdout)
    assert next_step
    assert str(registry) in next_step[0]
    assert qft("models", "promote", "m", 3, "--registry", registry).exit_code == 0


def test_what_is_refused_is_not_registered(run: Path, tmp_path: Path) -> None:
    where = {"out": tmp_path / "out", "register": "m", "registry": tmp_path / "models"}
    strict = ("export.gate.kl=0",)  # the adapter is the very same model, the merged one is rounded
    error = refusal(run, "merged", "adapter", overrides=strict, **where)
    assert isinstance(error, GateError)
    shelf = versions.find_shelf(tmp_path / "models", "m")
    assert shelf.numbers() == [1]
    assert shelf.manifest("v1").target == "adapter"


def test_what_was_not_verified_is_registered_as_that(run: Path, tmp_path: Path) -> None:
    where = {"out": tmp_path / "out", "register": "m", "registry": tmp_path / "models"}
    [document] = export(run, options("adapter", gate=False, **where), View())
    assert document.registered
    assert document.registered.version == 1
    with pytest.raises(GateError, match="was not run"):
        versions.promote(tmp_path / "models", "m", 1)


def test_the_recipe_names_the_model_and_its_registry(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"target": ["adapter"], "register_as": "told", "registry": "shelf"}
    made = trained(tmp_path, tiny_model, train={"max_steps": 1}, export=section)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    [document] = export(made, options(out=tmp_path / "out"), View())
    assert document.registered
    assert Path(document.registered.registry) == tmp_path / "shelf"  # beside the recipe
    assert versions.names(tmp_path / "shelf") == ["told"]
    export(made, options(out=tmp_path / "out", overwrite=True, register="asked", registry=Path("here")), View())
    assert versions.names(elsewhere / "here") == ["asked"]
    none = ("export.registry=null",)
    export(made, options(out=tmp_path / "out", overwrite=True, overrides=none), View())
    assert versions.names(elsewhere / "models") == ["told"]  # as `qft models` looks for it


@pytest.mark.parametrize("name", ["", "..", "a/b", "-m", "a" * 65, "é", "m\n", "a" * 64, "m.1_2-3"])
def test_the_recipe_and_the_registry_agree_on_names(name: str, tmp_path: Path, tiny_model: Path) -> None:
    recipe = {"model": {"path": str(tiny_model)}, "data": {"train": "rows.jsonl"}, "output_dir": "run"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"export": {"register_as": name}}))
    from qft.recipe import load

    found = []
    for accepts in (lambda: load(tmp_path / "recipe.yaml"), lambda: versions.find_shelf(tmp_path, name, new=True)):
        try:
            accepts()
            found.append(True)
        except RecipeError:
            found.append(False)
    assert found[0] == found[1]


def test_no_work_is_done_for_a_registry_that_cannot_be_used(run: Path, tmp_path: Path) -> None:
    out, registry = tmp_path / "out", tmp_path / "models"

    def refused(name: str | None = "m", folder: Path | None = registry, **more: Any) -> Any:
        error = refusal(run, "adapter", **{"out": out, "register": name, "registry": folder} | more)
        assert nothing_was_done(more.get("out", out))
        return error

    for name in ("../m", ""):
        assert isinstance(refused(name), RecipeError)
    assert "--register" in str(refused(None))
    (tmp_path / "file").write_text("")
    assert isinstance(refused(folder=tmp_path / "file"), RunError)
    assert "--registry" in str(refused(folder=tmp_path / "file" / "models"))
    assert "to be written" in str(refused(folder=out / "adapter" / "models"))
    made, _ = exported(tmp_path / "other", tmp_path / "run", {"path": "base"}, 4)
    versions.add(registry, "m", made, VersionManifest())
    with (registry / "m" / ".add.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "another command" in str(refused())
    (registry / "m" / "history.jsonl").write_text("{")
    assert isinstance(refused(), RunError)
    assert not list(tmp_path.rglob("adapter"))


def test_the_copy_needs_room_too(tmp_path: Path) -> None:
    free, out = shutil.disk_usage(tmp_path).free, tmp_path / "out"
    registration = registering.Registration(tmp_path / "models", "m")
    registration.require_possible(out, ["adapter"], free // 4)
    with pytest.raises(RunError, match="copy in the registry"):
        registration.require_possible(out, ["adapter"], free * 3 // 4)
    assert not registration.registry.exists()


# The hub.


class Hub(BaseHTTPRequestHandler):
    """The few routes that an upload asks for. A server has a state of its own, which a test reads and sets."""

    state: HubState

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/whoami-v2":
            return self.answer(200, self.state.user)
        if self.path == "/api/models/me/tiny" and self.state.info:
            return self.answer(200, self.state.info)
        if self.path.startswith("/api/models/me/tiny/tree/main") and self.state.info:
            names = [file["rfilename"] for file in self.state.info["siblings"]]
            return self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names])
        return self.answer(404, {}, **{"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        body = self.body()
        if self.path.endswith(self.state.fails_at):
            return self.refuse()
        self.state.large[hashlib.sha256(body).hexdigest()] = body
        return self.answer(200, {})

    def do_POST(self) -> None:
        body, state, path = self.body(), self.state, self.path.split("?")[0]
        state.asked.append(path)
        if path.endswith(state.fails_at):
            return self.refuse()
        if path == "/api/validate-yaml":
            state.cards.append(json.loads(body))
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            state.created.append(json.loads(body))
            return self.answer(200, {"url": f"{state.url}/me/tiny"})
        if path == "/api/models/me/tiny/preupload/main":
            return self.answer(200, {"files": [self.mode(file) for file in json.loads(body)["files"]]})
        if path == "/me/tiny.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{state.url}/large"}}
            return self.answer(200, {"objects": [one | {"actions": actions} for one in wanted], "transfer": "basic"})
        assert path == "/api/models/me/tiny/commit/main"
        state.commits.append([json.loads(line) for line in body.splitlines()])
        url = f"{state.url}/me/tiny/commit/{OID}"
        return self.answer(200, {"success": True, "commitOid": OID, "commitUrl": url, "hookOutput": ""})

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith(".safetensors")
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refuse(self) -> None:
        self.answer(403, {}, **{"X-Error-Message": "the disk is full"})

    def answer(self, status: int, document: Any, **headers: str) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class HubState:
    def __init__(self) -> None:
        self.url = ""
        self.user: dict[str, Any] = {
            "type": "user",
            "name": "me",
            "orgs": [{"name": "ours"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.info: dict[str, Any] | None = None
        self.fails_at = "/nowhere"
        self.asked: list[str] = []
        self.cards: list[dict[str, Any]] = []
        self.created: list[dict[str, Any]] = []
        self.commits: list[list[dict[str, Any]]] = []
        self.large: dict[str, bytes] = {}

    def arrived(self) -> dict[str, bytes]:
        """The files of the one commit."""
        [lines] = self.commits
        small = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if kind(line, "file")
        }
        large = {line["value"]["path"]: self.large[line["value"]["oid"]] for line in lines if kind(line, "lfsFile")}
        return small | large

    def deleted(self) -> list[str]:
        return [line["value"]["path"] for line in self.commits[0] if kind(line, "deletedFile")]


def kind(line: dict[str, Any], name: str) -> bool:
    return bool(line["key"] == name)


@pytest.fixture
def hub() -> Iterator[HubState]:
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def logged_in(hub: HubState, monkeypatch: pytest.MonkeyPatch) -> HubState:
    """The hub, for the client in this process: it reads its environment once, when it is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    return hub


def test_what_passed_arrives_in_one_commit(logged_in: HubState, run: Path, tmp_path: Path) -> None:
    hub = logged_in
    asked = ["export", run, "--to", "adapter", "--out", tmp_path, "--json", "--push-to-hub", "me/tiny", "--private"]
    done = qft(*asked)
    assert done.exit_code == 0, done.stderr
    [document] = json.loads(done.stdout)
    url = f"{hub.url}/me/tiny/commit/{OID}"
    assert document["pushed"] == {"repository": "me/tiny", "commit": OID, "url": url}
    [made] = hub.created
    assert (made["name"], made["organization"], made["visibility"]) == ("tiny", "me", "private")
    header = hub.commits[0][0]["value"]["summary"]
    assert "adapter" in header
    assert "gate passed (kl 0, top1_agreement 1)" in header
    assert hub.deleted() == []
    artifact, arrived = tmp_path / "adapter", hub.arrived()
    assert sorted(arrived) == sorted(path.name for path in artifact.iterdir())
    unchanged = {"adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in unchanged:
        assert arrived[name] == (artifact / name).read_bytes()
    assert set(arrived) - unchanged == {"README.md", "export.json", "adapter_config.json"}
    assert not (tmp_path / "adapter.hub").exists()


def test_no_path_of_this_machine_is_uploaded(logged_in: HubState, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    before = None
    for overwrite in (False, True):
        logged_in.commits.clear()
        [document] = export(run, options("adapter", out=tmp_path, push_to_hub="me/tiny", overwrite=overwrite), View())
        before = before or document
        arrived = logged_in.arrived()
        local = [str(folder).encode() for folder in (tmp_path.parent, run.parent, tiny_model.parent, ROOT, Path.home())]
        assert not [(name, path) for name, body in arrived.items() for path in local if path in body]
        told = json.loads(arrived["export.json"])
        assert (told["path"], told["run"], told["base"]["path"]) == ("adapter", "run", "tiny")
        assert told["sha256"] == {
            name: hashlib.sha256(body).hexdigest()
            for name, body in arrived.items()
            if name not in ("export.json", "README.md")
        }
        config = json.loads(arrived["adapter_config.json"])
        assert config["base_model_name_or_path"] == "tiny"
        own = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert own["base_model_name_or_path"] == str(tiny_model)  # which loads here
        assert config | {"base_model_name_or_path": str(tiny_model)} == own
        card = arrived["README.md"].decode()
        assert 'from_pretrained("me/tiny")' in card
        assert "FOLDER" not in card
        assert "FOLDER" in (tmp_path / "adapter" / "README.md").read_text()
        front = yaml.safe_load(card.split("---")[1])
        assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation")
        assert logged_in.cards[-1] == {"content": card, "repoType": "model"}


def test_an_earlier_model_does_not_stay_beside_it(logged_in: HubState, run: Path, tmp_path: Path) -> None:
    there = [
        "config.json",
        "model.safetensors",
        "README.md",
        "LICENSE",
        "runs/a.json",
        ".gitattributes",
        "tokenizer.json",
    ]
    logged_in.info = {"id": "me/tiny", "private": True, "siblings": [{"rfilename": name} for name in there]}
    export(run, options("adapter", out=tmp_path, push_to_hub="me/tiny"), View())
    assert sorted(logged_in.deleted()) == ["config.json", "model.safetensors"]


def test_what_is_refused_is_not_pushed(logged_in: HubState, run: Path, tmp_path: Path) -> None:
    error = refusal(run, "merged", out=tmp_path, push_to_hub="me/tiny", overrides=("export.gate.kl=0",))
    assert isinstance(error, GateError)
    assert logged_in.asked == []


@pytest.mark.parametrize("moment", ["/repos/create", "/preupload/main", "/objects/batch", "/large", "/commit/main"])
def test_a_hub_that_fails_costs_only_the_push(moment: str, logged_in: HubState, run: Path, tmp_path: Path) -> None:
    logged_in.fails_at = moment
    there = {"id": "me/tiny", "private": True, "siblings": [{"rfilename": "model.safetensors"}]}
    logged_in.info = None if moment == "/repos/create" else there  # one may not have to make it
    to_hub = ("--to", "adapter", "--out", tmp_path, "--push-to-hub", "me/tiny", "--private")
    ran = qft("export", run, *to_hub)
    assert ran.exit_code == 1
    assert "not pushed to me/tiny: 403 Forbidden: the disk is full. Push" in ran.stderr
    assert logged_in.commits == []
    assert json.loads((tmp_path / "adapter" / "export.json").read_text())["passed"] is True
    command = shlex.split(ran.stderr.partition("Push it again: ")[2])
    staged = tmp_path / "adapter.hub"
    stale = ["--delete", "model.safetensors"] if logged_in.info else []
    assert command == ["hf", "upload", "me/tiny", str(staged), "--private", *stale]
    logged_in.fails_at = "/nowhere"
    environment = os.environ | {"HF_ENDPOINT": logged_in.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    if moment == "/commit/main":  # one is enough: what is staged is the same
        hf = [str(Path(sys.executable).with_name("hf")), *command[1:]]
        done = subprocess.run(hf, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert logged_in.deleted() == ["model.safetensors"]
        assert logged_in.arrived() == {path.name: path.read_bytes() for path in staged.iterdir()}


def test_what_waits_to_be_pushed_goes_with_its_artifact(logged_in: HubState, run: Path, tmp_path: Path) -> None:
    logged_in.fails_at = "/commit/main"
    refusal(run, "adapter", out=tmp_path, push_to_hub="me/tiny")
    assert (tmp_path / "adapter.hub" / "adapter_model.safetensors").is_file()
    export(run, options("adapter", out=tmp_path, overwrite=True), View())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_work_is_done_for_what_cannot_be_pushed(
    logged_in: HubState, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str | None = "me/tiny", *to: str, **more: Any) -> Any:
        error = refusal(run, *(to or ("adapter",)), out=tmp_path / "out", push_to_hub=name, **more)
        assert nothing_was_done(tmp_path / "out")
        return error

    for name in ("tiny", "a/b/c", "me/ti ny", "me/a--b", "me/x.git", ""):
        error = refused(name)
        assert isinstance(error, RecipeError)
        assert f"--push-to-hub {name}" in str(error)
    assert "--no-gate" in str(refused(gate=False))
    assert "one by one" in str(refused("me/tiny", "adapter", "merged"))
    assert "--push-to-hub" in str(refused(None, private=True))
    assert "me, ours" in str(refused("theirs/tiny"))
    logged_in.info = {"id": "me/tiny", "private": False, "siblings": []}
    assert "public" in str(refused(private=True))
    logged_in.info = None
    logged_in.user["auth"]["accessToken"]["role"] = "read"
    assert "may only read" in str(refused())
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    error = refused()
    assert isinstance(error, MissingError)
    assert "Invalid user token" in str(error)
    assert "hf_bad" not in str(error)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "hf auth login" in str(refused())
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert isinstance(refused(), MissingError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in str(refused())
    assert logged_in.asked == []

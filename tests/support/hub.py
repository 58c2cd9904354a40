"""A hub of our own on this machine: the real client asks it over real HTTP."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

COMMITS = {"main": "1" * 40, "v2": "2" * 40}


class Hub(BaseHTTPRequestHandler):
    """The few routes of a hub that its client asks for; repositories are folders."""

    root: Path

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        parts = [part for part in unquote(self.path.split("?")[0]).split("/") if part]
        kind = "datasets" if "datasets" in parts[:2] else "models"
        parts = [part for part in parts if part not in ("api", "datasets", "models")]
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == "org/gated":
            return self.refuse(403, "GatedRepo")
        if not (self.root / kind / name).is_dir():
            return self.refuse(404, "RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self.refuse(404, "RevisionNotFound")
        folder = self.root / kind / name / ("v2" if commit == COMMITS["v2"] else "main")
        if rest[:1] == ["resolve"]:
            return self.send_file(folder / "/".join(rest[2:]), commit)
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if rest[:1] == ["tree"]:
            below = "/".join(rest[2:])
            listed = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "0" * 40}
                for f in files
                if f.startswith(below)
            ]
            return self.send_json(listed)
        siblings = [{"rfilename": f} for f in files]
        return self.send_json({"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send_json(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.refuse(404, "EntryNotFound")
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return None


@contextmanager
def serving_hub(root: Path) -> Iterator[str]:
    """Address of a hub whose repositories are folders of `root`: KIND/OWNER/NAME/REVISION."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Hub,), {"root": root}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask_hub(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub's client, which reads its environment once, ask that one, and keep what it fetches in `cache`."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    _, _, below = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{{repo_id}}{below}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache / "datasets"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", address)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)

"""A small hub on loopback that speaks the protocol of Hugging Face's: repositories, one-commit uploads, downloads.

It keeps whole files in memory. Every file of ``LFS`` suffix goes by LFS, the others inside the commit.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any

TOKEN = "hf_testing"
LFS = (".safetensors", ".onnx", ".png")


@dataclass
class Hub:
    """What the server keeps; tests change ``refused``."""

    address: str = ""
    refused: dict[str, int] = field(default_factory=dict)
    """Status by the part of a path: requests to it are refused."""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content by repository and file: what the commits made. A dataset's name begins with ``datasets/``."""
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    """Keys and paths of each commit's lines."""

    @property
    def head(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()

    def commit(self, repository: str, body: bytes) -> None:
        """Apply the lines of a commit, all or none."""
        files, told = dict(self.files[repository]), []
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            told.append(f"{key} {value.get('path', '')}".strip())
        self.files[repository] = files
        self.commits.append(told)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing."""

    def answer(self, body: Any = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = self.path.partition("?")[0]
        refused = next((status for part, status in self.hub.refused.items() if part in path), None)
        if self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            refused = 401
        if refused:
            return self.answer({"error": f"refused by the test, {refused}"}, refused)
        for pattern, reply in self.routes:
            if match := re.fullmatch(pattern, f"{self.command} {path}"):
                return reply(self, body, *match.groups())
        return self.answer({"error": "no such page"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def create(self, body: bytes) -> None:
        made = json.loads(body)
        name = f"{made['organization']}/{made['name']}"
        status = 409 if name in self.hub.files else 200
        if status == 200:
            self.hub.files[name], self.hub.private[name] = {}, made.get("visibility") == "private"
        self.answer({"url": f"{self.hub.address}/{name}"}, status)

    def info(self, _: bytes, repository: str) -> None:
        if repository not in self.hub.files:
            return self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": name} for name in self.hub.files[repository]]
        private = self.hub.private[repository]
        return self.answer({"id": repository, "private": private, "sha": self.hub.head, "siblings": siblings})

    def tree(self, _: bytes, repository: str, folder: str | None) -> None:
        """List files and folders below a folder, or only those directly in it, as the query asks."""
        prefix = f"{folder}/" if folder else ""
        files = {name: data for name, data in self.hub.files[repository].items() if name.startswith(prefix)}
        above = {str(parent) for name in files for parent in PurePosixPath(name).parents} - {"."}
        listed = [{"type": "directory", "path": name} for name in sorted(above) if name.startswith(prefix)]
        listed += [{"type": "file", "path": name, "size": len(data)} for name, data in files.items()]
        if "recursive=false" in self.path.lower():
            listed = [each for each in listed if "/" not in each["path"].removeprefix(prefix)]
        if folder and not files:
            return self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        return self.answer([{**each, "oid": "0" * 40} for each in listed])

    def preupload(self, body: bytes, repository: str) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        modes = [{"path": name, "uploadMode": "lfs" if name.endswith(LFS) else "regular"} for name in names]
        self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})

    def batch(self, body: bytes, repository: str) -> None:
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer()

    def commit(self, body: bytes, repository: str) -> None:
        self.hub.commit(repository, body)
        self.answer(
            {"commitUrl": f"{self.hub.address}/{repository}/commit/{self.hub.head}", "commitOid": self.hub.head}
        )

    def resolve(self, _: bytes, repository: str, name: str) -> None:
        data = self.hub.files.get(repository, {}).get(name)
        if data is None:
            missing = "Entry" if repository in self.hub.files else "Repo"
            return self.answer({"error": f"{missing} not found"}, 404, X_Error_Code=f"{missing}NotFound")
        named = {"X_Repo_Commit": self.hub.head, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(data[int(part[1]) : int(part[2]) + 1], 206, **named)
        return self.answer(data, **named)

    routes = (
        (r"(?:HEAD|GET) /", lambda self, _: self.answer()),
        (r"POST /api/repos/create", create),
        (r"POST /api/validate-yaml", lambda self, _: self.answer({})),
        (r"GET /api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(?:/revision/[^/]+)?", info),
        (r"GET /api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", tree),
        (r"POST /api/models/([^/]+/[^/]+)/preupload/main", preupload),
        (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", batch),
        (r"PUT /objects/(\w+)", store),
        (r"POST /api/models/([^/]+/[^/]+)/commit/main", commit),
        (r"(?:HEAD|GET) /((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", resolve),
    )


@contextlib.contextmanager
def start_hub() -> Iterator[Hub]:
    """Serve an empty hub within the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()

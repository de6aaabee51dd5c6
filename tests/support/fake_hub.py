"""A hub on this machine: the routes of the HTTP API that huggingface_hub uses to read and write models, over real sockets.

Repositories are kept in memory, commit by commit. Files from ``LARGE`` bytes on go by git LFS, the others inside the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 4096  # bytes
TOKEN = "hf_test"
FAULTS = ("500", "asks for a day", "hangs", "drips", "cuts", "cuts its answer", "answers no JSON", "answers other JSON")


@dataclass
class Repository:
    """Commits (id -> path -> content), and the branches that point to them."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        """Add a commit to a branch; its id."""
        text = f"{len(self.commits)} {branch} {sorted(files)}".encode()
        name = hashlib.sha1(text).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The id and the files of a revision."""
        name = self.branches.get(revision, revision)
        return (name, self.commits[name]) if name in self.commits else None


class FakeHub:
    """The server. ``requests`` has the method and path of every request."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.corrupt: dict[str, bytes] = {}  # path -> what is served instead of its content
        self.fault: tuple[str, str] | None = None  # pattern of method and path, and one of FAULTS
        self.endless = False  # whether every page of a listing has a next one
        self.loses = ""  # a file that is empty in every listing
        self.go_on = threading.Event()  # ends what hangs
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        # It looks for the end this often, in seconds; by default a test would wait half a second for it.
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A repository with one commit."""
        repository = self.repositories[name] = Repository(private)
        repository.commit(files, "main", "first")
        return repository


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets: the second would wait 40 ms for the client

    # ---------------------------------------------------------------------------------------------------- transport

    def log_message(self, *_: Any) -> None:
        return

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str = "refused") -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_PUT = do_POST = do_GET

    @property
    def _authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ------------------------------------------------------------------------------------------------------- routes

    def _route(self) -> None:
        parts = urlsplit(self.path)
        path, body = unquote(parts.path), self._body()
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.fault is not None and re.search(self.hub.fault[0], f"{self.command} {path}"):
            return self._fault(self.hub.fault[1])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._store(match[1], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+)(?:/([^/]+))?)?(/.*)?", path):
            repository = self._repository(match[1])
            return repository and self._model(repository, match[1], match[2] or "", match[3] or "main", body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(match[1])
            return repository and self._resolve(repository, match[2], match[3])
        return self._fail(404, "NotFound")

    def _fault(self, kind: str) -> None:
        if kind == "500":
            return self._send(500, b"out of order")
        if kind == "asks for a day":
            return self._send(503, b"", {"Retry-After": "86400"})
        if kind == "answers no JSON":
            return self._send(200, b"<html>\x1b[31m", {"Content-Type": "application/json"})
        if kind == "answers other JSON":
            return self._json([{"files": 3, "objects": {}, "url": None, "type": "file"}])
        if kind == "hangs":
            self.hub.go_on.wait(60)
        if kind == "drips":  # never silent for long, and never done
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not self.hub.go_on.wait(0.02):
                self.wfile.write(b" ")
        if kind == "cuts its answer":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        self.close_connection = True
        return self.connection.shutdown(socket.SHUT_RDWR)

    def _repository(self, name: str) -> Any:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._authorized):
            self._fail(404, "RepoNotFound", "Repository not found")
            return None
        return repository

    def _create(self, asked: dict[str, Any]) -> None:
        if not self._authorized:
            return self._fail(401, "", "Invalid username or password.")
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, 409)
        self.hub.repositories[name] = Repository(bool(asked.get("private")) or asked.get("visibility") == "private")
        self.hub.repositories[name].commit({".gitattributes": b"*.bin filter=lfs\n"}, "main", "initial commit")
        return self._json({"url": f"{self.hub.url}/{name}"})

    def _model(self, repository: Repository, name: str, action: str, revision: str, body: bytes) -> None:
        if action in ("commit", "preupload", "branch") and not self._authorized:
            return self._fail(403, "", "This token cannot write")
        if action == "branch":
            if revision in repository.branches:
                return self._json({}, 409)
            repository.branches[revision] = repository.branches["main"]
            return self._json({})
        found = repository.at(revision)
        if found is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self._json({"id": name, "modelId": name, "sha": commit, "private": repository.private,
                               "tags": [], "siblings": siblings})  # fmt: skip
        if action == "tree":
            entries = [self._entry(p, b"" if p == self.hub.loses else c) for p, c in files.items()]
            link = {"Link": f'<{self.hub.url}{self.path}>; rel="next"'} if self.hub.endless else {}
            return self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json", **link})
        if action == "preupload":
            asked = json.loads(body)["files"]
            return self._json({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
                for f in asked
            ]})  # fmt: skip
        if action == "commit":
            return self._commit(repository, name, revision, dict(files), body)
        return self._fail(404, "NotFound")

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
        entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if len(content) >= LARGE:
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def _batch(self, asked: dict[str, Any]) -> None:
        if not self._authorized:
            return self._fail(403, "", "This token cannot write")
        objects = []
        for item in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
            known = item["oid"] in self.hub.objects
            objects.append({**item, **({} if known else {"actions": action})})
        return self._json({"transfer": "basic", "objects": objects})

    def _store(self, digest: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != digest:
            return self._fail(400, "", "digest")
        self.hub.objects[digest] = body
        return self._send(200)

    def _commit(self, repository: Repository, name: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files, branch, message)
        return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        found = repository.at(revision)
        if found is None:
            return self._fail(404, "RevisionNotFound", "Invalid rev id")
        commit, files = found
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[path]
        entry = self._entry(path, content)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        served = self.hub.corrupt.get(path, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"',
                   "X-Linked-Size": str(len(content)), "Accept-Ranges": "bytes"}  # fmt: skip
        return self._send(200, served, headers)

"""A Hub server on the loopback for huggingface_hub's client: repositories, branches, commits, LFS uploads. Here data
sets are repositories like models.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.environment())
        hub.repos["me/model"].files("main")["config.json"]      # the bytes that were pushed
        hub.fail_next(503, times=2, path="/commit/")            # the next two such requests

Not supported: the xet protocol (the environment turns it off in the client), pull requests, snapshot downloads.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Response = tuple[int, dict[str, str], bytes]  # status, headers, body
TOKEN, USER = "hf_of_the_tests", "me"
LFS = ("*.safetensors", "*tfevents*", "*.pt", "*.parquet")


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, tuple[dict[str, bytes], str, str | None]] = field(default_factory=dict)  # files, title, parent

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b""}, "initial commit")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes, without the .gitattributes that every repository has."""
        return {path: data for path, data in self.at(revision).items() if path != ".gitattributes"}

    def at(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)][0]

    def commit(self, branch: str, files: dict[str, bytes], title: str) -> str:
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{len(self.commits)} {title}".encode()).hexdigest()
        self.commits[oid] = (files, title, parent)
        self.branches[branch] = oid
        return oid

    def history(self, revision: str = "main") -> list[tuple[str, str]]:
        """(commit, title), newest first."""
        commit: str | None = self.branches.get(revision, revision)
        found = []
        while commit is not None:
            found.append((commit, self.commits[commit][1]))
            commit = self.commits[commit][2]
        return found


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # method, path
        self.blobs: dict[str, bytes] = {}  # LFS, by sha256
        self._failures: list[tuple[int, str]] = []
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        """The environment with which a child process uses this server as the Hub; `token=""`: it is not logged in."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token,
            "HF_TOKEN_PATH": "/nonexistent/token",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def take_over(self, monkeypatch: Any) -> None:
        """Make the client in this process use this server, too; it reads the environment only at import."""
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)

    def fail_next(self, status: int, times: int = 1, path: str = "") -> None:
        """Answer the next `times` requests whose path contains `path` with `status`."""
        self._failures += [(status, path)] * times

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Response:
        path = re.sub(
            r"^/(api/)?datasets/", lambda found: "/api/models/" if found[1] else "/", unquote(urlsplit(url).path)
        )
        with self._lock:
            self.requests.append((method, path))
            try:
                for failure in self._failures:
                    if failure[1] in path:
                        self._failures.remove(failure)
                        raise Refused(failure[0], "told to fail")
                if not path.startswith("/lfs/") and headers.get("Authorization") != f"Bearer {TOKEN}":
                    raise Refused(401, "Invalid credentials in Authorization header")
                return self._route(method, path, body)
            except Refused as error:
                found = {"X-Error-Message": str(error)} | ({"X-Error-Code": error.code} if error.code else {})
                return error.status, found, json.dumps({"error": str(error)}).encode()

    def _route(self, method: str, path: str, body: bytes) -> Response:
        def sent() -> Any:
            return json.loads(body)

        if path == "/api/whoami-v2":
            return _json({"name": USER, "type": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if path == "/api/repos/create":
            owner, name = sent().get("organization") or USER, sent()["name"]
            if owner != USER:
                raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
            known = f"{owner}/{name}" in self.repos
            self.repos.setdefault(f"{owner}/{name}", Repo(sent().get("visibility") == "private"))
            return _json({"url": f"{self.url}/{owner}/{name}", "id": f"{owner}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._validate(sent()["content"])
        if found := re.fullmatch(r"/lfs/(\w+)(/verify)?", path):
            if found[2]:
                return _json({}, 200 if found[1] in self.blobs else 404)
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refused(400, "the bytes are not those of the object's id")
            self.blobs[found[1]] = body
            return _json({})
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo(found[1])
            return _json({"transfer": "basic", "objects": [self._lfs_actions(item) for item in sent()["objects"]]})
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            files = self._at(self._repo(found[1]), found[2])
            if found[3] not in files:
                raise Refused(404, "Entry not found", "EntryNotFound")
            etag = hashlib.sha1(files[found[3]]).hexdigest()
            return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": "0" * 40}, files[found[3]]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+))?(?:/(.+))?", path):
            return self._model(method, found[1], found[2] or "", found[3] or "main", body)
        raise Refused(404, f"this Hub does not know {method} {path}")

    def _model(self, method: str, name: str, what: str, revision: str, body: bytes) -> Response:
        repo = self._repo(name)
        revision, _, below = revision.partition("/") if what == "tree" else (revision, "", "")
        if what == "branch" and method == "POST":
            if revision in repo.branches:
                raise Refused(409, "Reference already exists")
            start = json.loads(body or b"{}").get("startingPoint", "main")
            repo.branches[revision] = repo.branches.get(start, start)
            return _json({})
        files = self._at(repo, revision)
        if what in ("", "revision"):
            sha = repo.branches.get(revision, revision)
            return _json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files]})
        if what == "commits":
            return _json(
                [
                    {"id": oid, "title": title, "message": "", "authors": [], "date": "2026-01-01T00:00:00.000Z"}
                    for oid, title in repo.history(revision)
                ]
            )
        if what == "tree":
            if below and not any(path.startswith(below) for path in files):
                raise Refused(404, "Entry not found", "EntryNotFound")
            return _json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in files.items()
                    if path.startswith(below)
                ]
            )
        if what == "preupload":
            return _json(
                {
                    "files": [
                        {
                            "path": item["path"],
                            "shouldIgnore": False,
                            "uploadMode": "lfs"
                            if any(fnmatch(item["path"], pattern) for pattern in LFS)
                            else "regular",
                        }
                        for item in json.loads(body)["files"]
                    ]
                }
            )
        if what == "commit":
            return self._commit(name, repo, revision, [json.loads(line) for line in body.splitlines()])
        raise Refused(404, f"this Hub does not know {method} {what}")

    def _commit(self, name: str, repo: Repo, revision: str, lines: list[Any]) -> Response:
        if revision not in repo.branches:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        files, title = dict(repo.at(revision)), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.blobs:
                    raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, f"this Hub does not know {line['key']}")
        oid = repo.commit(revision, files, title)
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}"})

    def _validate(self, content: str) -> Response:
        head = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        data = yaml.safe_load(head[1]) if head else {}
        ids = [data.get("base_model"), *(data.get("datasets") or [])]
        wrong = [i for i in ids if i is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", i)]
        errors = [{"message": f"not an id: {i}"} for i in wrong]
        return _json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _lfs_actions(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.blobs:
            return item
        place = f"{self.url}/lfs/{item['oid']}"
        return item | {"actions": {"upload": {"href": place}, "verify": {"href": f"{place}/verify"}}}

    def _repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def _at(self, repo: Repo, revision: str) -> dict[str, bytes]:
        if revision not in repo.branches and revision not in repo.commits:
            raise Refused(404, "Invalid rev id", "RevisionNotFound")
        return repo.at(revision)


def _json(value: Any, status: int = 200) -> Response:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, headers, content = self.hub.answer(self.command, self.path, self.headers, body)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *_: Any) -> None:
        pass

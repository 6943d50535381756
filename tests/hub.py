"""A small Hugging Face Hub on loopback: enough of its HTTP interface for huggingface_hub and datasets, files on disk.

Start it with the fixture `loopback_hub`, or with `with Hub(folder) as hub:`; point processes at it with
`hub.environment()`. It speaks the LFS protocol, so HF_HUB_DISABLE_XET=1 is part of that environment.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "LoopbackOnly" * 3  # the one that may read and write everything
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "other"}  # the real Hub knows some more


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came."""

    method: str
    path: str
    body: bytes = field(repr=False)  # of uploaded LFS files nothing, they are on disk

    def json(self) -> Any:
        return json.loads(self.body)


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        self.status, self.code, self.message = status, code, message


class Hub:
    """Repositories under `folder`; `requests` lists what was asked of it, in order.

    `intercept` is called with (method, path) of each request first: it may block, or return a status to fail with.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[Request] = []
        self.intercept: Callable[[str, str], int | None] = lambda method, path: None
        self.lock = threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path, *, token: str | None = TOKEN) -> dict[str, str]:
        """Variables of a process that takes this for the Hub, with its caches under `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
        ours |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of that method whose path the pattern matches anywhere."""
        return [one for one in self.requests if one.method == method and re.search(pattern, one.path)]

    # repositories: one JSON file each, {private, refs: {name: commit}, commits: {commit: {path: entry}}}

    def _path(self, kind: str, repo: str) -> Path:
        return self.folder / kind / f"{repo}.json"

    def repository(self, kind: str, repo: str) -> dict[str, Any]:
        """What is known of a repository; `kind` is "models" or "datasets"."""
        path = self._path(kind, repo)
        if not path.exists():
            raise Refusal(404, "RepoNotFound", f"no {kind} {repo}")
        return json.loads(path.read_text())

    def create(self, repo: str, *, kind: str = "datasets", private: bool = False) -> None:
        """A repository with one commit that holds .gitattributes, as on the real Hub."""
        with self.lock:
            self._save(kind, repo, {"private": private, "refs": {}, "commits": {"0" * 40: {}}})
            entry = self.store(b"*.parquet filter=lfs diff=lfs merge=lfs -text\n")
            self._commit(kind, repo, "main", {".gitattributes": entry}, parent="0" * 40)

    def _save(self, kind: str, repo: str, content: Mapping[str, Any]) -> None:
        path = self._path(kind, repo)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))

    def _commit(self, kind: str, repo: str, branch: str, files: Mapping[str, Any], *, parent: str) -> str:
        content = self.repository(kind, repo)
        oid = hashlib.sha1(json.dumps([parent, files, len(content["commits"])], sort_keys=True).encode()).hexdigest()
        content["commits"][oid] = dict(files)
        content["refs"][branch] = oid
        self._save(kind, repo, content)
        return oid

    def upload(self, repo: str, folder: Path, *, kind: str = "models") -> str:
        """Put all files of a local folder into a new public repository; returns the commit."""
        self.create(repo, kind=kind)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        files = {
            str(path.relative_to(folder)): self.store(path.read_bytes(), lfs=path.stat().st_size > 1 << 20)
            for path in paths
        }
        return self._commit(kind, repo, "main", files, parent=self.repository(kind, repo)["refs"]["main"])

    def write(self, repo: str, path: str, data: bytes, *, kind: str = "datasets") -> str:
        """Commit one file to main, as somebody else may; returns the commit."""
        parent, files = self.resolve(kind, repo, "main")
        return self._commit(kind, repo, "main", files | {path: self.store(data)}, parent=parent)

    def tag(self, repo: str, name: str, *, kind: str = "datasets") -> None:
        """Let `name` stand for what is on main now."""
        content = self.repository(kind, repo)
        content["refs"][name] = content["refs"]["main"]
        self._save(kind, repo, content)

    def store(self, data: bytes, *, lfs: bool = False) -> dict[str, Any]:
        """Keep a file and return its entry in a commit."""
        sha256 = hashlib.sha256(data).hexdigest()
        (self.folder / "blobs" / sha256).write_bytes(data)
        return self.entry(sha256, data=None if lfs else data)

    def entry(self, sha256: str, *, data: bytes | None = None) -> dict[str, Any]:
        """A file in a commit: LFS, or regular where its `data` are given."""
        size = (self.folder / "blobs" / sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        content = pointer if data is None else data
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"sha256": sha256, "size": size, "oid": oid, "lfs": data is None, "pointer": len(pointer)}

    def files(self, repo: str, revision: str = "main", *, kind: str = "datasets") -> dict[str, dict[str, Any]]:
        """The files of a branch, tag or commit by path."""
        return self.resolve(kind, repo, revision)[1]

    def read(self, repo: str, path: str, revision: str = "main", *, kind: str = "datasets") -> bytes:
        """The content of one file."""
        return (self.folder / "blobs" / self.files(repo, revision, kind=kind)[path]["sha256"]).read_bytes()

    def resolve(self, kind: str, repo: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
        """The commit that a branch, tag or commit stands for, and its files."""
        content = self.repository(kind, repo)
        commit = content["refs"].get(revision, revision)
        if commit not in content["commits"]:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return commit, content["commits"][commit]

    # what the routes answer: JSON

    def create_repo(self, body: bytes) -> dict[str, Any]:
        asked = json.loads(body)
        kind, repo = asked.get("type", "model") + "s", f"{asked.get('organization') or 'someone'}/{asked['name']}"
        url = {"url": f"{self.url}/{'datasets/' if kind == 'datasets' else ''}{repo}"}
        if self._path(kind, repo).exists():
            raise Refusal(409, message=json.dumps(url))
        self.create(repo, kind=kind, private=asked.get("visibility") == "private")
        return url

    def validate_yaml(self, body: bytes) -> dict[str, Any]:
        found = re.search(r"^license: *(\S+)", json.loads(body)["content"].split("\n---")[0], re.MULTILINE)
        if found and found[1] not in LICENSES:
            raise Refusal(400, message=json.dumps({"errors": [{"message": '"license" must be one of [...]'}]}))
        return {"errors": [], "warnings": []}

    def info(self, kind: str, repo: str, revision: str = "main") -> dict[str, Any]:
        commit, files = self.resolve(kind, repo, unquote(revision))
        private = self.repository(kind, repo)["private"]
        siblings = [{"rfilename": path} for path in files]
        return {"id": repo, "sha": commit, "private": private, "siblings": siblings, "tags": [], "downloads": 0}

    def refs(self, kind: str, repo: str) -> dict[str, Any]:
        refs = self.repository(kind, repo)["refs"].items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in refs]
        return {"branches": branches, "tags": [], "converts": []}

    def tree(self, kind: str, repo: str, revision: str, under: str, query: Mapping[str, list[str]]) -> list[Any]:
        under = unquote(under or "").strip("/")
        found = self._listing(kind, repo, unquote(revision))
        inside = {path: entry for path, entry in found.items() if not under or path.startswith(under + "/")}
        if not inside:
            raise Refusal(404, "EntryNotFound", f"no {under}")
        if query.get("recursive", [""])[0].lower() not in ("1", "true"):
            inside = {path: entry for path, entry in inside.items() if "/" not in path[len(under) :].strip("/")}
        return list(inside.values())

    def paths_info(self, kind: str, repo: str, revision: str, body: bytes) -> list[Any]:
        wanted = parse_qs(body.decode())["paths"]
        found = self._listing(kind, repo, unquote(revision))
        return [found[path] for path in wanted if path in found]

    def _listing(self, kind: str, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        listing: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(self.resolve(kind, repo, revision)[1].items()):
            for parent in reversed(Path(path).parents[:-1]):
                oid = hashlib.sha1(str(parent).encode()).hexdigest()
                listing[str(parent)] = {"type": "directory", "oid": oid, "size": 0, "path": str(parent)}
            lfs = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": entry["pointer"]}
            listing[path] = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
            listing[path] |= {"lfs": lfs} if entry["lfs"] else {}
        return listing

    def preupload(self, kind: str, repo: str, revision: str, body: bytes) -> dict[str, Any]:
        there = self.files(repo, unquote(revision), kind=kind)
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".parquet", ".safetensors", ".arrow")) or file["size"] > 1 << 20
            known = there.get(file["path"])
            oid = known and known["sha256" if known["lfs"] else "oid"]
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, kind: str, repo: str, body: bytes) -> dict[str, Any]:
        def answer(wanted: dict[str, Any]) -> dict[str, Any]:
            if (self.folder / "blobs" / wanted["oid"]).exists():
                return wanted
            verify = {"href": f"{self.url}/lfs/verify"}
            return wanted | {"actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}, "verify": verify}}

        return {"transfer": "basic", "objects": [answer(wanted) for wanted in json.loads(body)["objects"]]}

    def lfs_verify(self, body: bytes) -> dict[str, Any]:
        wanted = json.loads(body)
        path = self.folder / "blobs" / wanted["oid"]
        if not path.exists() or path.stat().st_size != wanted["size"]:
            raise Refusal(422, message="not what was announced")
        return {}

    def commit(self, kind: str, repo: str, branch: str, body: bytes) -> dict[str, Any]:
        with self.lock:
            parent, files = self.resolve(kind, repo, unquote(branch))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header" and value.get("parentCommit", parent) != parent:
                    raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
                if line["key"] == "file":
                    files[value["path"]] = self.store(base64.b64decode(value["content"]))
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.entry(value["oid"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "deletedFolder":
                    files = {path: entry for path, entry in files.items() if not path.startswith(value["path"])}
            oid = self._commit(kind, repo, unquote(branch), files, parent=parent)
        return {"commitUrl": f"{self.url}/{kind}/{repo}/commit/{oid}", "commitOid": oid, "success": True}


def folders_of_this_machine() -> list[str]:
    """The user's home and the current folder, unless that is the root of the disk, which stands in every URL."""
    folders = {f"{Path.home()}/": Path.home(), str(Path.cwd()): Path.cwd()}
    return [name for name, folder in folders.items() if folder != Path(folder.anchor)]


REPO = r"/api/(models|datasets)/([^/]+/[^/]+)"
POST = {  # (route, method of Hub); the groups of the route, then the body, are its arguments
    r"/api/repos/create": Hub.create_repo,
    r"/api/validate-yaml": Hub.validate_yaml,
    rf"{REPO}/preupload/([^/]+)": Hub.preupload,
    rf"{REPO}/paths-info/([^/]+)": Hub.paths_info,
    rf"{REPO}/commit/([^/]+)": Hub.commit,
    r"/lfs/verify": Hub.lfs_verify,
}
GET = {
    REPO: Hub.info,
    rf"{REPO}/revision/([^/]+)": Hub.info,
    rf"{REPO}/refs": Hub.refs,
}


class Handler(BaseHTTPRequestHandler):
    """HTTP around a `Hub`."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_one(self.get)

    def do_HEAD(self) -> None:
        self.handle_one(self.get)

    def do_POST(self) -> None:
        self.handle_one(self.post)

    def do_PUT(self) -> None:
        self.handle_one(self.put)

    def handle_one(self, answer: Callable[[str, str], Any]) -> None:
        where = urlsplit(self.path)
        try:
            if status := self.hub.intercept(self.command, where.path):
                b"".join(self.body())  # else the client does not read the answer
                raise Refusal(status, message="as the test wants it")
            answer(where.path, where.query)
        except Refusal as refusal:
            if self.command in ("POST", "PUT"):
                self.close_connection = True  # the body may not have been read
            self.send(refusal.message.encode(), refusal.status, {"X-Error-Code": refusal.code})
        except ConnectionError:
            self.close_connection = True  # the other side is gone: a test killed it

    def post(self, path: str, query: str) -> None:
        body = b"".join(self.body())
        self.hub.requests.append(Request(method="POST", path=self.path, body=body))
        if path != "/api/validate-yaml":
            self.allow(write=True)
        if batch := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.send_json(self.hub.lfs_batch("datasets" if batch[1] else "models", batch[2], body))
        for route, method in POST.items():
            if found := re.fullmatch(route, path):
                return self.send_json(method(self.hub, *found.groups(), body))
        raise Refusal(501, message=f"no route {path}")

    def put(self, path: str, query: str) -> None:
        """Take in an LFS file; whoever holds the address may, as with presigned ones."""
        self.hub.requests.append(Request(method="PUT", path=self.path, body=b""))
        oid = re.fullmatch(r"/lfs/([0-9a-f]{64})", path)[1]
        aside, digest = self.hub.folder / "blobs" / f"{oid}.{threading.get_ident()}", hashlib.sha256()
        with aside.open("wb") as file:
            for part in self.body():
                digest.update(part)
                file.write(part)
        if digest.hexdigest() != oid:
            aside.unlink()
            raise Refusal(400, message="the content is not what its address says")
        aside.rename(self.hub.folder / "blobs" / oid)
        self.send(b"")

    def get(self, path: str, query: str) -> None:
        self.hub.requests.append(Request(method=self.command, path=self.path, body=b""))
        if path == "/api/whoami-v2":
            self.allow(write=True)
            return self.send_json({"type": "user", "name": "someone", "orgs": [{"name": "org"}]})
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.send_file("datasets" if found[1] else "models", *found.groups()[1:])
        for route, method in GET.items():
            if found := re.fullmatch(route, path):
                self.allow(found[1], found[2])
                return self.send_json(method(self.hub, *found.groups()))
        if found := re.fullmatch(rf"{REPO}/tree/([^/]+)(/.*)?", path):
            self.allow(found[1], found[2])
            return self.send_json(self.hub.tree(*found.groups(), parse_qs(query)))
        raise Refusal(404, message=f"no route {path}")

    def allow(self, kind: str = "", repo: str = "", *, write: bool = False) -> None:
        """Refuse who may not: writing and private repositories want the token."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return
        if write or self.hub.repository(kind, repo)["private"]:
            raise Refusal(401, "RepoNotFound" if repo else "", "Invalid username or password.")

    def send_file(self, kind: str, repo: str, revision: str, path: str) -> None:
        """One file of a repository, or the range of it that was asked for."""
        self.allow(kind, repo)
        commit, files = self.hub.resolve(kind, repo, unquote(revision))
        if unquote(path) not in files:
            raise Refusal(404, "EntryNotFound", f"no {path}")
        entry = files[unquote(path)]
        size, status = entry["size"], 200
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["sha256"] if entry["lfs"] else entry["oid"]}"'}
        headers |= {"Accept-Ranges": "bytes", "Content-Disposition": f"inline; filename={Path(path).name}"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(span[1]), int(span[2] or size - 1)) if span else (0, size - 1)
        if span:
            status, headers["Content-Range"] = 206, f"bytes {first}-{min(last, size - 1)}/{size}"
        with (self.hub.folder / "blobs" / entry["sha256"]).open("rb") as file:
            file.seek(first)
            self.send(file.read(min(last, size - 1) - first + 1), status, headers)

    def body(self) -> Iterator[bytes]:
        """What the client sends, whether its length is announced or it comes in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left and (part := self.rfile.read(min(left, 1 << 20))):
                left -= len(part)
                yield part

    def send_json(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def send(self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        known = {"Content-Length": str(len(data)), "Connection": "close" if self.close_connection else ""}
        for name, value in (known | dict(headers or {})).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

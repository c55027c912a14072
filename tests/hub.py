"""A Hub on loopback: repositories of models, datasets and Spaces with branches, pull requests, LFS and tokens.

It speaks what huggingface_hub, transformers and datasets send when something is published or loaded, and fails on
request: `faults` holds what the next matching requests get instead of an answer.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_" + "s" * 34: "someone", "hf_" + "o" * 34: "other"}
TOKEN = next(iter(TOKENS))
LFS_PATTERNS = ("*.safetensors", "*.parquet", "*.png")
ID = r"[\w.-]+/[\w.-]+"


@dataclass
class Repository:
    """`refs` maps a branch or `refs/pr/N` to a commit, `trees` a commit to its files."""

    private: bool
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    trees: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {".gitattributes": b"*.png lfs\n"}})
    messages: list[str] = field(default_factory=list)

    def tree(self, revision: str) -> dict[str, bytes] | None:
        return self.trees.get(self.refs.get(revision, revision))

    @property
    def files(self) -> dict[str, bytes]:
        return self.tree("main")


@dataclass
class Fault:
    """What `times` requests whose "METHOD path" contains `where` get: a status, or the connection cut ("drop")."""

    where: str
    status: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False  # the request takes effect, and only its answer is lost


class Hub(ThreadingHTTPServer):
    """`repos[kind, id]` with kind model, dataset or space; `requests` lists "METHOD path" in order."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def uploads(self) -> list[str]:
        """The requests that carried content: LFS objects and commits."""
        return [request for request in self.requests if request.startswith("PUT") or "/commit/" in request]


def is_lfs(path: str) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


def oid(path: str, content: bytes) -> str:
    """What the Hub compares: SHA-256 of an LFS file, git's blob hash of any other."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        self.status, self.message, self.code = status, message, code


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        """Nothing on stderr."""

    def handle_one(self):
        path = unquote(urlsplit(self.path).path)
        body = self.body()
        with self.server.lock:
            self.server.requests.append(f"{self.command} {path}")
            fault = next((f for f in self.server.faults if f.times and f.where in f"{self.command} {path}"), None)
            if fault:
                fault.times -= 1
        if fault and not fault.after:
            return self.fail(fault)
        try:
            with self.server.lock:
                answer = self.route(path, body)
        except Refused as refused:
            code = {"X-Error-Code": refused.code} if refused.code else {}
            answer = (refused.status, {"error": refused.message}, {"X-Error-Message": refused.message} | code)
        if fault:
            return self.fail(fault)
        self.answer(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def fail(self, fault: Fault) -> None:
        if fault.status == "drop":
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.answer(fault.status, {"error": f"injected {fault.status}"}, fault.headers)

    def answer(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        repo = self.server.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user != repo_id.split("/")[0]):
            # The Hub does not tell a stranger whether a private repository exists.
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and not self.user:
            raise Refused(401, "Invalid username or password.")
        return repo

    def owned(self, kind: str, repo_id: str) -> Repository:
        repo = self.repository(kind, repo_id, write=True)
        if self.user != repo_id.split("/")[0]:
            raise Refused(403, f"You have no write access to {repo_id}")
        return repo

    def route(self, path: str, body: bytes):
        """(status, content, headers) of a request; the content is bytes or becomes JSON."""
        if self.command == "PUT":
            digest = path.rsplit("/", 1)[-1]
            if hashlib.sha256(body).hexdigest() != digest:
                raise Refused(400, "The content is not what its name says")
            self.server.blobs[digest] = body
            return 200, {}
        if path == "/api/whoami-v2":
            if not self.user:
                raise Refused(401, "Invalid username or password.")
            return 200, {"type": "user", "name": self.user, "id": "x" * 24, "auth": {"accessToken": {"role": "write"}}}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body))
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(rf"/(datasets/|spaces/|)({ID})\.git/info/lfs/objects/batch", path):
            kind, repo_id = found[1].rstrip("s/") or "model", found[2]
            self.repository(kind, repo_id, write=True)
            return self.lfs_batch(json.loads(body))
        if found := re.fullmatch(rf"/(datasets/|spaces/|)({ID})/resolve/(refs/\w+/\w+|[^/]+)/(.+)", path):
            return self.resolve(found[1].rstrip("s/") or "model", *found.groups()[1:])
        found = re.fullmatch(
            rf"/api/(model|dataset|space)s/({ID})(?:/([\w-]+)(?:/(refs/\w+/\w+|[^/]+)(?:/(.*))?)?)?", path
        )
        if not found:
            raise Refused(404, f"{path} is not spoken here")
        kind, repo_id, action, revision, rest = found.groups()
        if action == "branch":
            repo = self.owned(kind, repo_id)
            if revision in repo.refs:
                raise Refused(409, "Reference already exists")
            repo.refs[revision] = repo.refs[json.loads(body or b"{}").get("startingPoint") or "main"]
            return 200, {}
        if action == "commit":
            return self.commit(kind, repo_id, revision, body)
        repo = self.repository(kind, repo_id, write=action == "preupload")
        if action == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.refs.items()]
            return 200, {"branches": branches, "converts": [], "tags": []}
        if action is None:
            action, revision = "revision", "main"
        tree = repo.tree(revision)
        if tree is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if action == "preupload":
            return 200, {"files": [self.preupload(tree, file["path"]) for file in json.loads(body)["files"]]}
        if action == "revision":
            siblings = [{"rfilename": name, "size": len(content)} for name, content in tree.items()]
            info = {"id": repo_id, "sha": repo.refs.get(revision, revision), "private": repo.private, "tags": []}
            return 200, info | {"siblings": siblings, "lastModified": "2025-01-01T00:00:00.000Z", "sdk": repo.sdk}
        if action == "tree":
            recursive = "recursive" in parse_qs(urlsplit(self.path).query)
            return 200, self.listing(tree, (rest or "").strip("/"), recursive)
        if action == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            return 200, [entry(name, tree[name]) for name in asked["paths"] if name in tree]
        raise Refused(404, f"{path} is not spoken here")

    def validate(self, asked: dict):
        """The Hub parses a card's metadata before it takes any file; a licence must be one word, ids real ids."""
        found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", asked["content"], re.DOTALL)
        errors = []
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError:
            metadata, errors = {}, [{"message": "invalid YAML"}]
        if not re.fullmatch(r"[a-z][a-z0-9.+-]*", metadata.get("license", "other")):
            errors.append({"message": '"license" must be one of the list'})
        for key in ("base_model", "datasets", "models"):
            ids = metadata.get(key, [])
            if not all(re.fullmatch(rf"{ID}|[\w.-]+", repo_id) for repo_id in ([ids] if isinstance(ids, str) else ids)):
                errors.append({"message": f'"{key}" must be Hub ids'})
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def create(self, asked: dict):
        if not self.user:
            raise Refused(401, "Invalid username or password.")
        owner = asked.get("organization") or self.user
        if owner != self.user:
            raise Refused(403, f"You have no write access to the namespace {owner}")
        kind, repo_id = asked.get("type") or "model", f"{owner}/{asked['name']}"
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.repos[kind, repo_id] = Repository(private, asked.get("sdk"))
        return 200, {"url": url}

    def preupload(self, tree: dict[str, bytes], path: str) -> dict:
        known = {"oid": oid(path, tree[path])} if path in tree else {}
        return {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False} | known

    def lfs_batch(self, asked: dict):
        objects = []
        for item in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}}
            objects.append(
                {"oid": item["oid"], "size": item["size"]} | (upload if item["oid"] not in self.server.blobs else {})
            )
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, kind: str, repo_id: str, revision: str, body: bytes):
        pull_request = "create_pr" in parse_qs(urlsplit(self.path).query)
        repo = (self.repository if pull_request else self.owned)(kind, repo_id, *([True] if pull_request else []))
        if repo.tree(revision) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        tree = dict(repo.tree(revision))
        header, *operations = map(json.loads, body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    raise Refused(400, f"The LFS object of {value['path']} was never uploaded")
                tree[value["path"]] = self.server.blobs[value["oid"]]
            elif operation["key"] == "deletedFile":
                del tree[value["path"]]
        number = hashlib.sha1(body + revision.encode() + str(len(repo.trees)).encode()).hexdigest()
        repo.trees[number] = tree
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        request_url = None
        if pull_request:
            revision = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
            request_url = f"{url}/discussions/{revision.rsplit('/', 1)[-1]}"
        repo.refs[revision] = number
        repo.messages.append(header["value"]["summary"])
        return 200, {"commitUrl": f"{url}/commit/{number}", "commitOid": number, "pullRequestUrl": request_url}

    def resolve(self, kind: str, repo_id: str, revision: str, path: str):
        repo = self.repository(kind, repo_id)
        tree = repo.tree(revision)
        if tree is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        headers = {"X-Repo-Commit": repo.refs.get(revision, revision)}
        if path not in tree:
            return 404, {"error": "Entry not found"}, headers | {"X-Error-Code": "EntryNotFound"}
        content, digest = tree[path], f'"{oid(path, tree[path])}"'
        headers |= {"ETag": digest, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if is_lfs(path):
            headers |= {"X-Linked-Etag": digest, "X-Linked-Size": str(len(content))}
        if self.headers.get("If-None-Match") == digest:
            return 304, b"", headers
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return 206, content[first : last + 1], headers
        return 200, content, headers

    def listing(self, tree: dict[str, bytes], under: str, recursive: bool) -> list[dict]:
        prefix = f"{under}/" if under else ""
        inside = {name: content for name, content in tree.items() if name.startswith(prefix)}
        if not inside:
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        folders = {
            prefix + name.removeprefix(prefix).split("/")[0] for name in inside if "/" in name.removeprefix(prefix)
        }
        return [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)] + [
            entry(name, content)
            for name, content in inside.items()
            if recursive or "/" not in name.removeprefix(prefix)
        ]


def entry(path: str, content: bytes) -> dict:
    digest = oid(path, content)
    lfs = {"lfs": {"oid": digest, "size": len(content), "pointerSize": 134}} if is_lfs(path) else {}
    return {"type": "file", "path": path, "oid": digest, "size": len(content)} | lfs

"""A Hub on loopback that speaks just enough of the real one's HTTP for the real client to create and commit."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """`repos` maps a repository's id to its files, `refuse` makes every write a 403."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.private: list[bool] = []
        self.refuse = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        """Nothing on stderr."""

    def answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
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

    def do_PUT(self):
        self.server.blobs[self.path.rsplit("/", 1)[-1]] = self.body()
        self.answer({})

    def do_GET(self):
        self.answer({"type": "user", "name": "someone", "id": "x" * 24, "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.body()
        if self.server.refuse:
            self.answer({"error": "You have no write access"}, 403)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            self.server.repos.setdefault(repo, {})
            self.server.private.append(asked.get("visibility") == "private" or asked.get("private") is True)
            self.answer({"url": f"{self.server.url}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": item["oid"],
                    "size": item["size"],
                    "actions": {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}},
                }
                for item in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        else:
            repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
            committed = []
            for operation in map(json.loads, body.splitlines()):
                value = operation["value"]
                if operation["key"] == "file":
                    self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "lfsFile":
                    self.server.repos[repo][value["path"]] = self.server.blobs[value["oid"]]
                if "path" in value:
                    committed.append(value["path"])
            self.server.commits.append(committed)
            commit = {"commitUrl": f"{self.server.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
            self.answer(commit | {"pullRequestUrl": None})

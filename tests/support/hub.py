"""A stand-in for the Hugging Face Hub on this machine: what push_to_hub and from_pretrained ask of
it, over HTTP. Repositories live in memory; every file is a regular one, its content in the commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


class Hub(BaseHTTPRequestHandler):
    """repos: name -> path -> bytes."""

    protocol_version = "HTTP/1.1"
    repos: dict[str, dict[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repos.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}", "id": name})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if re.fullmatch(rf"/api/models/{REPO}/preupload/main", self.path):
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            return self.answer({"files": modes})
        if found := re.fullmatch(rf"/api/models/{REPO}/commit/main", self.path):
            for line in body.splitlines():
                part = json.loads(line)
                if part["key"] == "file":
                    content = base64.b64decode(part["value"]["content"])
                    self.repos[found["repo"]][part["value"]["path"]] = content
            head = self.head_of(found["repo"])
            url = f"http://{self.headers['Host']}/{found['repo']}/commit/{head}"
            return self.answer({"success": True, "commitUrl": url, "commitOid": head})
        self.missing("RepoNotFound")

    def do_GET(self):
        path = self.path.partition("?")[0]
        if found := re.fullmatch(rf"/{REPO}/resolve/(main|[0-9a-f]{{40}})/(?P<path>.+)", path):
            files = self.repos.get(found["repo"])
            if files is None or found["path"] not in files:
                return self.missing("EntryNotFound" if files is not None else "RepoNotFound")
            content = files[found["path"]]
            tag = hashlib.sha1(content).hexdigest()
            headers = {"ETag": f'"{tag}"', "X-Repo-Commit": self.head_of(found["repo"])}
            return self.send(200, content, headers)
        if found := re.fullmatch(rf"/api/models/{REPO}(/revision/\w+)?", path):
            if found["repo"] not in self.repos:
                return self.missing("RepoNotFound")
            names = [{"rfilename": name} for name in self.repos[found["repo"]]]
            head = self.head_of(found["repo"])
            return self.answer({"id": found["repo"], "sha": head, "siblings": names, "tags": []})
        if found := re.fullmatch(rf"/api/models/{REPO}/tree/\w+", path):
            files = self.repos.get(found["repo"], {})
            sums = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            rows = [
                {"type": "file", "path": name, "size": len(data), "oid": sums[name]}
                for name, data in files.items()
            ]
            return self.answer(rows)
        self.missing("EntryNotFound")

    do_HEAD = do_GET

    def head_of(self, repo: str) -> str:
        files = sorted(self.repos[repo].items())
        return hashlib.sha1(repr([repo, files]).encode()).hexdigest()

    def answer(self, value) -> None:
        self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def missing(self, code: str) -> None:
        self.send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def serving():
    """(address, repositories) of a Hub that answers until the end."""
    repos = {}
    handler = type("Handler", (Hub,), {"repos": repos})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repos
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A server on localhost that answers as the Hugging Face hub does to those who stream one of its data sets: with its
files, whole or in parts, and their names. Answers that it is told to break off end in the middle."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef" * 2 + "01234567"


class Hub(ThreadingHTTPServer):
    """files: by path, what they hold. broken: which answers with files, from 0 on, end in the middle. gone: paths that
    are refused, with status 403. asked: paths of files as they were asked for. ranges: whether parts can be had."""

    def __init__(self, repository: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repository, self.files = repository, files
        self.broken: set[int] = set()
        self.gone: set[str] = set()
        self.asked: list[str] = []
        self.ranges = True
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repository: str, files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(repository, files) as hub:
        Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield hub
        hub.shutdown()


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self):
        path, hub = unquote(urlparse(self.path).path), self.server
        found = re.fullmatch(rf"/(?:datasets/{hub.repository}/resolve/[^/]+/)?(.+)", path)
        if found and found[1] in hub.files:
            return self.file(found[1])
        if re.fullmatch(rf"/api/datasets/{hub.repository}(/revision/[^/]+)?", path):
            return self.json({"id": hub.repository, "sha": COMMIT, "private": False, "tags": [], "siblings": []})
        if found := re.fullmatch(rf"/api/datasets/{hub.repository}/tree/[^/]+/?(.*)", path):
            return self.json(self.below(found[1]))
        self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def file(self, path: str) -> None:
        hub, content = self.server, self.server.files[path]
        if path in hub.gone:
            return self.answer(403, b"")
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if found and hub.ranges:
            first, last = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        hub.asked += [path] * (self.command == "GET")
        self.answer(status, content, headers, whole=len(hub.asked) - 1 not in hub.broken)

    def below(self, folder: str) -> list[dict]:
        """What lies in a folder, not deeper."""
        start = f"{folder}/" if folder else ""
        inside = [path for path in self.server.files if path.startswith(start)]
        folders = {start + path[len(start) :].split("/")[0] for path in inside if "/" in path[len(start) :]}
        files = [path for path in inside if "/" not in path[len(start) :]]
        sizes = {path: len(self.server.files[path]) for path in files}
        return [
            *({"type": "file", "path": path, "oid": COMMIT, "size": size} for path, size in sizes.items()),
            *({"type": "directory", "path": path, "oid": COMMIT, "size": 0} for path in sorted(folders)),
        ]

    def json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, content: bytes, headers: dict[str, str] = {}, whole: bool = True) -> None:  # noqa: B006
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if whole else content[: len(content) // 2])
            self.close_connection = not whole

    def log_message(self, *_):
        pass

"""A server on this machine that speaks Google Cloud Storage's JSON API, as far as we need it.

Unlike the emulators of package indexes it honours conditions on generations, on which tensorstore
builds its atomic updates.
"""

import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Server(ThreadingHTTPServer):
    """objects: (bucket, name) -> (generation, bytes). `down`: answer nothing but errors."""

    daemon_threads = True

    def __init__(self, *buckets: str) -> None:
        super().__init__(("localhost", 0), Handler)
        self.buckets, self.down = set(buckets), False
        self.objects: dict[tuple[str, str], tuple[int, bytes]] = {}
        self.sessions: dict[str, tuple[tuple[str, str], bytes]] = {}
        self.generations, self.lock = itertools.count(1), threading.Lock()
        self.address = f"http://localhost:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, -1  # else each answer waits 40 ms for the other side

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(b"")

    def do_DELETE(self) -> None:
        self.answer(b"")

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(body)

    def answer(self, body: bytes) -> None:
        with self.server.lock:
            status, headers, data = self.handle_request(self.command, self.path, body)
        if not isinstance(data, bytes):
            data, headers = json.dumps(data).encode(), {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if status != 304:
            self.wfile.write(data)
        self.wfile.flush()

    def handle_request(self, method: str, target: str, body: bytes):
        if self.server.down:
            return 403, {}, error("the bucket is gone")
        url = urlsplit(target)
        query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        if url.path == "/batch/storage/v1":
            return self.batch(body)
        found = re.match(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.*))?)?$", url.path)
        if not found or found[2] not in self.server.buckets:
            return 404, {}, error("no such bucket")
        kind, bucket, name = found[1], found[2], found[3] or ""
        if kind == "upload/":
            return self.insert(bucket, query, body)
        if "/moveTo/o/" in name:
            old, new = ((bucket, unquote(x)) for x in name.split("/moveTo/o/"))
            if old not in self.server.objects:
                return 404, {}, error("no such object")
            self.server.objects[new] = self.server.objects.pop(old)
            return 200, {}, self.resource(new)
        if not name:
            return 200, {}, self.list(bucket, query) if "/o" in url.path else {"name": bucket}
        key = (bucket, unquote(name))
        if key not in self.server.objects:
            return 404, {}, error("no such object")
        if refused := self.refuse(key, query):
            return refused, {}, error("condition")
        if method == "DELETE":
            del self.server.objects[key]
            return 204, {}, b""
        if query.get("alt") == "media":
            return self.media(key)
        return 200, {}, self.resource(key)

    def refuse(self, key: tuple[str, str], query: dict[str, str]) -> int | None:
        now = str(self.server.objects.get(key, (0,))[0])
        if query.get("ifGenerationMatch", now) != now:
            return 412
        return 304 if query.get("ifGenerationNotMatch") == now else None

    def media(self, key: tuple[str, str]):
        generation, data = self.server.objects[key]
        headers = {"x-goog-generation": str(generation), "Content-Type": "text/plain"}
        if wanted := re.match(r"bytes=(\d*)-(\d*)$", self.headers.get("Range", "")):
            first, last, size = wanted[1], wanted[2], len(data)
            start = int(first) if first else max(0, size - int(last))
            end = min(int(last) + 1, size) if first and last else size
            if start >= size:
                return 416, headers, b""
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
            return 206, headers, data[start:end]
        return 200, headers, data

    def insert(self, bucket: str, query: dict[str, str], body: bytes):
        if session := query.get("upload_id"):
            return self.resume(session, body)
        if query["uploadType"] == "resumable":
            session = str(next(self.server.generations))
            name = query.get("name") or json.loads(body)["name"]
            self.server.sessions[session] = ((bucket, name), b"")
            place = f"{self.server.address}/upload/storage/v1/b/{bucket}/o?upload_id={session}"
            return 200, {"Location": place}, b""
        if query["uploadType"] == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1]
            mark = b"--" + boundary.encode()
            parts = body.split(mark, 2)
            query["name"] = json.loads(re.split(rb"\r?\n\r?\n", parts[1], maxsplit=1)[1])["name"]
            body = re.split(rb"\r?\n\r?\n", parts[2], maxsplit=1)[1]
            body = body[: body.rindex(b"\n" + mark)]
        key = (bucket, query["name"])
        if refused := self.refuse(key, query):
            return refused, {}, error("condition")
        self.server.objects[key] = (next(self.server.generations), body)
        return 200, {}, self.resource(key)

    def resume(self, session: str, body: bytes):
        key, before = self.server.sessions[session]
        data = before + body
        self.server.sessions[session] = (key, data)
        if self.headers.get("Content-Range", "").endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(data) - 1}"}, b""
        self.server.objects[key] = (next(self.server.generations), data)
        return 200, {}, self.resource(key)

    def list(self, bucket: str, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for key in sorted(self.server.objects):
            if key[0] != bucket or not key[1].startswith(prefix):
                continue
            if delimiter and delimiter in (rest := key[1][len(prefix) :]):
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.resource(key))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def resource(self, key: tuple[str, str]) -> dict:
        generation, data = self.server.objects[key]
        at = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": key[0],
            "name": key[1],
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": str(generation),
            "timeCreated": at,
            "updated": at,
        }

    def batch(self, body: bytes):
        parts = []
        for path in re.findall(rb"DELETE (\S+) HTTP", body):
            status, _, _ = self.handle_request("DELETE", path.decode(), b"")
            parts.append(f"--batch\r\n\r\nHTTP/1.1 {status} x\r\n")
        text = "".join(parts) + "--batch--"
        return 200, {"Content-Type": "multipart/mixed; boundary=batch"}, text.encode()


def error(text: str) -> dict:
    return {"error": {"code": 0, "message": text}}

"""`convert_hf.py export --push` against a stand-in for Hugging Face's Hub, by its real client."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import convert_hf
import pytest
from huggingface_hub import constants
from test_card import make_run

from scalegpt.errors import Mistake

TOKEN = "hf_of_me"


class Hub(BaseHTTPRequestHandler):
    """Knows of the Hub's API what the client asks for during a push, and keeps what it is given."""

    repos: dict[str, dict]  # name -> private, files
    role: str
    breaks: set[str]  # parts of the paths that do not work

    def log_message(self, *args):
        pass

    def answer(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/whoami-v2":
            token = {"displayName": "t", "role": self.role}
            return self.answer({"name": "me", "auth": {"accessToken": token}})
        name = self.path.removeprefix("/api/models/")
        if name not in self.repos:
            return self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")
        repo = self.repos[name]
        files = [{"rfilename": file} for file in (".gitattributes", *repo["files"])]
        self.answer({"id": name, "private": repo["private"], "siblings": files})

    def do_POST(self):
        body = self.body()
        assert self.headers["Authorization"] == f"Bearer {TOKEN}"
        if self.breaks & {*self.path.split("/")}:
            return self.answer({"error": "out of order"}, 400)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            url = f"http://{self.headers['Host']}/{name}"
            if name in self.repos:
                return self.answer(
                    {"error": "You already created this model repo", "url": url}, 409
                )
            private = asked.get("private", asked.get("visibility") == "private")
            self.repos[name] = {"private": private, "files": {}}
            return self.answer({"url": url})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, _, action = self.path.removeprefix("/api/models/").rpartition("/")[0].rpartition("/")
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit"
        for line in map(json.loads, body.splitlines()):
            if line["key"] != "header":
                assert line["key"] == "file", line
                file = line["value"]
                self.repos[name]["files"][file["path"]] = base64.b64decode(file["content"])
        url = f"http://{self.headers['Host']}/{name}/commit/1"
        self.answer({"commitUrl": url, "commitOid": "1" * 40})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, in which the user `me` is logged in."""
    kind = type("OneHub", (Hub,), {"repos": {}, "role": "write", "breaks": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield kind
    server.shutdown()
    thread.join()
    server.server_close()


def export(folder, out, name):
    argv = ["export", "--run", str(folder / "run"), "--out", str(out), "--push", name]
    return convert_hf.main(argv)


def test_an_export_is_pushed_whole_into_a_private_repository(hub, tmp_path, capsys):
    make_run(tmp_path, model__bias="true")
    out = tmp_path / "out"
    assert export(tmp_path, out, "me/model") == 0
    assert hub.repos["me/model"]["private"]
    assert hub.repos["me/model"]["files"] == {p.name: p.read_bytes() for p in out.iterdir()}
    said = capsys.readouterr().out
    assert "/me/model, private: its settings make it public" in said
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in said
    card = (out / "README.md").read_text()
    assert 'model="me/model")' in card and 'scalegpt.load("me/model")' in card
    assert "vllm serve me/model" in card and "hf upload" not in card


def test_a_push_that_cannot_succeed_is_refused_before_the_work(hub, tmp_path, monkeypatch):
    """No run is read: there is none."""

    def refused(name, message):
        with pytest.raises(Mistake, match=message):
            export(tmp_path, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()

    for name in ("model", "me/my/model", "me/..", "me/a b", "datasets/me/x", "me/"):
        refused(name, "is no name of a repository: give OWNER/NAME")
    hub.repos["me/taken"] = {"private": False, "files": {"README.md": b"mine"}}
    refused("me/taken", "has 1 file already, as README.md, .*hf upload me/taken FOLDER")
    assert hub.repos["me/taken"]["files"] == {"README.md": b"mine"}
    hub.role = "read"
    refused("me/new", "this token may only read")
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    refused("me/new", "(?s)cannot ask Hugging Face .*if the token is wrong, `hf auth login`")
    monkeypatch.delenv("HF_TOKEN")
    refused("me/new", "needs a login: run `hf auth login`, or set HF_TOKEN")
    assert list(hub.repos) == ["me/taken"]


def test_an_upload_that_fails_leaves_the_folder_and_says_how_to_go_on(hub, tmp_path):
    make_run(tmp_path, model__bias="true")
    for part in ("create", "commit"):
        out = tmp_path / part
        hub.breaks.add(part)
        with pytest.raises(Mistake, match="(?s)cannot upload to me/m: .* is whole; this") as error:
            export(tmp_path, out, "me/m")
        hub.breaks.clear()
        assert str(error.value).endswith(f"\n  hf upload me/m {out} --private")
        written = {p.name: p.read_bytes() for p in out.iterdir()}
        assert {"model.safetensors", "README.md", "curves.png"} < written.keys()
    assert hub.repos == {"me/m": {"private": True, "files": {}}}
    assert export(tmp_path, tmp_path / "out", "me/m") == 0, "what was begun is still empty"
    assert hub.repos["me/m"]["files"].keys() == written.keys()

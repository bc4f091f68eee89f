"""A push to the hub, with the hub's own client, to as much of a hub as it asks for."""

import base64, json, os, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scir.export.folders import check_push

from exported import NODE
from helpers import ROOT


@pytest.fixture
def hub():
    "As much of the hub as an upload asks for; what it is sent stays in `asked`."

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body, where = (
                self.rfile.read(int(self.headers["content-length"])).decode(),
                f"http://127.0.0.1:{server.server_port}/datasets/me/pairs",
            )
            asked.append((self.path, self.headers.get("authorization"), body))
            if server.refuse and "create" in self.path:
                return self.say(server.refuse, {"error": "no"})
            if "preupload" in self.path:
                return self.say(
                    200,
                    {
                        "files": [
                            {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                            for f in json.loads(body)["files"]
                        ]
                    },
                )
            self.say(
                200,
                {
                    "url": where,
                    "name": "me/pairs",
                    "commitUrl": f"{where}/commit/1",
                    "commitOid": "1" * 40,
                    "success": True,
                    "hookOutput": "",
                },
            )

        def do_GET(self):
            self.say(404, {})

        def say(self, status, answer):
            data = json.dumps(answer).encode()
            self.send_response(status)
            for k, v in (("content-type", "application/json"), ("content-length", str(len(data)))):
                self.send_header(k, v)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *a):
            pass

    asked, server = [], ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.refuse = None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, asked
    server.shutdown()


def scir_export(tmp_path, port, *args, token="hf_made_up_token"):
    env = (
        {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
        | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        | ({"HF_TOKEN": token} if token else {})
    )
    return subprocess.run(
        [str(Path(sys.executable).parent / "scir"), "export", *map(str, args)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


def test_a_push_creates_a_private_repository_and_sends_the_folder(hub, tiny_run, tmp_path):
    server, asked = hub
    done = scir_export(
        tmp_path,
        server.server_port,
        tiny_run / NODE,
        "--to",
        "dataset",
        "--out",
        tmp_path / "pairs",
        "--licence",
        "mit",
        "--push",
        "me/pairs",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (
        told["pushed"].endswith("/datasets/me/pairs/commit/1")
        and told["licence"] == "mit"
        and told["folder"] == str(tmp_path / "pairs")
    )
    path, token, body = next(a for a in asked if "create" in a[0])
    assert [a[0] for a in asked].index("/api/validate-yaml") < [a[0] for a in asked].index(
        path
    ) and token == "Bearer hf_made_up_token"
    assert (
        {"name": "pairs", "organization": "me", "type": "dataset"}.items() <= json.loads(body).items()
        and '"private"' in body
        and '"private":false' not in body.replace(" ", "")
    )
    sent = {
        v["path"]: base64.b64decode(v["content"])
        for line in next(b for p, _, b in asked if "/api/datasets/me/pairs/commit/main" in p).splitlines()
        if (v := json.loads(line)["value"]) and "path" in v
    }
    assert (
        sent == {f: (tmp_path / "pairs" / f).read_bytes() for f in ("README.md", "data/train.parquet")}
        and b'load_dataset("me/pairs"' in sent["README.md"]
    )


def test_a_push_that_is_refused_says_what_to_do(hub, tiny_run, tmp_path):
    server, asked = hub
    server.refuse = 401
    done = scir_export(
        tmp_path,
        server.server_port,
        tiny_run / NODE,
        "--to",
        "dataset",
        "--out",
        tmp_path / "pairs",
        "--push",
        "me/pairs",
    )
    assert (
        done.returncode == 1
        and done.stderr.splitlines()[-1].startswith("scir: --push me/pairs: invalid hub token; run `hf auth login`")
        and (tmp_path / "pairs" / "README.md").exists()
    )
    assert done.stderr.splitlines()[-1].endswith(
        f"the folder {tmp_path / 'pairs'} is complete, upload it with: hf upload me/pairs {tmp_path / 'pairs'} --repo-type dataset --private"
    )


def test_a_push_that_cannot_work_is_refused_before_anything_is_made(tiny_run, monkeypatch, at_root):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for to, name, words in (
        ("merged", "me/x", "no hub token; run `hf auth login`"),
        ("merged", "x", "must be OWNER/NAME"),
        ("merged", "me/x y", "--push me/x y"),
        ("adapter", "me/x", "tiny-random, is a local folder"),
    ):
        with pytest.raises(ValueError, match=words):
            check_push(str(tiny_run / NODE), to, name)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_x")
    check_push(str(tiny_run / NODE), "merged", "me/x")

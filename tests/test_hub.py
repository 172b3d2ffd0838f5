"""The lines by which docs/deployment.md puts a network on the Hugging Face Hub and gets it back.

They run as they stand, in a process whose hub is a small server here: a repository is a dictionary of files. It takes
files within the commit, as the real one does with small ones; large ones travel in another way, which is the client's
business.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import networks
import pytest
import torch

import qcfs_fast

pytest.importorskip("huggingface_hub")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "deployment.md"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files, asked = {}, []

    def answer(self, code, content, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        here = f"http://127.0.0.1:{self.server.server_port}"
        self.asked.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create":
            self.answer(200, {"url": f"{here}/you/net"})
        elif self.path == "/api/models/you/net/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.startswith("/api/models/you/net/commit/main"):
            for entry in map(json.loads, body.splitlines()):
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"commitOid": COMMIT, "commitUrl": f"{here}/you/net/commit/{COMMIT}"})
        else:
            self.answer(404, {})

    def do_GET(self):
        content = self.files.get(self.path.removeprefix("/you/net/resolve/main/"))
        if content is None:
            self.answer(404, {})
        else:
            tag = hashlib.sha256(content).hexdigest()
            self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


def test_a_network_goes_to_the_hub_and_back(tmp_path):
    snn, x = networks.converted(networks.Small, T=5)
    snn.save(tmp_path / "mine.safetensors")
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "huggingface_hub" in b]
    script = f"""import qcfs_fast
snn = qcfs_fast.load("mine.safetensors")
{block}
snn.save("again.safetensors")
"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": "hf_none",
    }
    try:
        run = [sys.executable, "-c", script]
        done = subprocess.run(run, cwd=tmp_path, env={**os.environ, **hub}, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.partition("?")[0].rsplit("/", 2)[-2:] for path, _ in Hub.asked] == [
        ["repos", "create"], ["preupload", "main"], ["commit", "main"],
    ]  # fmt: skip
    assert {token for _, token in Hub.asked} == {"Bearer hf_none"}
    assert Hub.files == {"net.safetensors": (tmp_path / "net.safetensors").read_bytes()}
    assert torch.equal(qcfs_fast.load(tmp_path / "again.safetensors")(x), snn(x))
    assert list((tmp_path / "home").rglob("net.safetensors"))  # it came by the hub's cache

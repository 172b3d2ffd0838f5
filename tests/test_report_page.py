"""The HTML report in a real browser: it loads without errors or requests, and shows its figures."""

import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading

import networks
import pytest
import torch

import qcfs_fast

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FIGURES = ["accuracy", "anytime", "time", "energy", "rates", "histogram", "raster"]

# Appended to a copy of the page: writes what the browser found to the document, where --dump-dom shows it.
PROBE = """
<script>
const errors = [];
addEventListener("error", e => errors.push(e.message || "cannot load " + e.target.id), true);
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(i => [i.id, i.complete, i.naturalWidth, i.naturalHeight, i.clientWidth]),
    requests: performance.getEntriesByType("resource").map(r => r.name).filter(n => !n.startsWith("data:")),
    overflow: document.documentElement.scrollWidth - innerWidth,
    rows: document.querySelectorAll(".layers tbody tr").length,
    title: document.title,
    errors,
  };
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on this machine (on Debian: apt-get install chromium)")
    return found


def visit(page, tmp_path, width=1280):
    """What PROBE found, with every path the browser asked this server for; and the messages of the console."""
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            asked.append(self.path)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        found, messages = browse(f"http://127.0.0.1:{server.server_port}/page.html", tmp_path / "browser", width)
    finally:
        server.shutdown()
        server.server_close()
    return {**found, "asked": asked}, messages


def browse(address, folder, width):
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
        "--no-proxy-server", f"--user-data-dir={folder}", f"--window-size={width},900", "--enable-logging=stderr",
        "--v=0", "--virtual-time-budget=5000", "--dump-dom", address,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    match = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.S)
    assert match, f"the page did not load: {run.stdout[:500]} {run.stderr[-2000:]}"
    found = json.loads(html.unescape(match[1]))
    return found, found["errors"] + re.findall(r"CONSOLE.*", run.stderr)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    x = torch.randn(12, *networks.SHAPES[networks.Small], generator=torch.Generator().manual_seed(0))
    qcfs_fast.calibrate(model, [x], progress=False)
    snn = qcfs_fast.convert(model, T=10)
    labels = snn(x).argmax(1)
    p = qcfs_fast.profile(snn, [(x, labels)], raster_layer="block1.relu", progress=False)
    path = tmp_path_factory.mktemp("page") / "profile.html"
    p.to_html(path)
    return path.read_text(encoding="utf-8"), p


@pytest.mark.parametrize("width", [1280, 500])
def test_loads_and_shows_its_figures(page, tmp_path, width):
    text, p = page
    found, messages = visit(text.replace("</head>", PROBE + "</head>"), tmp_path, width)
    assert messages == []
    assert found["asked"] == ["/page.html"]
    assert found["requests"] == []
    assert [i[0] for i in found["images"]] == [f"figure-{name}" for name in FIGURES]
    for name, complete, natural_width, natural_height, shown in found["images"]:
        assert complete, name
        assert min(natural_width, natural_height) > 100, name
        assert 200 < shown < width, name
    assert found["overflow"] <= 0
    assert found["rows"] == len(p.layers) + 1
    assert found["title"] == "Profile of a spiking network"


def test_the_check_itself_notices_faults(page, tmp_path):
    text, _ = page
    broken = re.sub(r'(id="figure-time"[^>]*src="data:image/svg\+xml;base64,).{40}', r"\1AAAA", text)
    extra = '<img id="lost" src="missing.svg"><script>console.error("hello"); nothing()</script></main>'
    broken = broken.replace("</main>", extra)
    found, messages = visit(broken.replace("</head>", PROBE + "</head>"), tmp_path)
    assert {i[0]: i[2] for i in found["images"]}["figure-time"] == 0
    assert sorted(found["asked"]) == ["/missing.svg", "/page.html"]
    assert [r.rsplit("/", 1)[1] for r in found["requests"]] == ["missing.svg"]
    for fault in ("hello", "nothing is not defined", "cannot load figure-time", "cannot load lost"):
        assert any(fault in m for m in messages), messages


def test_is_self_contained(page):
    text, p = page
    for reference in re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', text):
        assert reference.startswith("data:"), reference[:80]
    assert "<script" not in text
    for row in p.layers:
        assert f"<td class=left>{row.name}</td>" in text
    for phrase in ("do not mean", "They say nothing about the energy this or any CPU or GPU uses", "Horowitz"):
        assert phrase in text
    facts = p.environment
    assert facts["qcfs_fast"] in text
    assert f"<td>threads</td><td>{facts['threads']}</td>" in text
    assert f"<td>kernels</td><td>{facts['kernels']}</td>" in text


def test_names_are_escaped(page, tmp_path):
    _, p = page
    renamed = qcfs_fast.Profile(**{**vars(p), "raster": {**p.raster, "layer": "<b>&\"x'"}})
    renamed.to_html(tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "<b>&" not in text
    assert "Raster of &lt;b&gt;&amp;" in text


def test_without_labels_class_scores_or_steps(tmp_path):
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    model = qcfs_fast.prepare(networks.randomize(networks.Perceptron()), levels=4)
    qcfs_fast.calibrate(model, [x], progress=False)
    qcfs_fast.profile(qcfs_fast.convert(model, T=1), [x], progress=False).to_html(tmp_path / "one.html")
    text = (tmp_path / "one.html").read_text()
    assert "No labels were given, so accuracy is not known" in text
    assert "after 1 step " in text or "after 1 step<" in text or "1 step each" in text

    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 1), qcfs_fast.QCFS(4), torch.nn.Conv2d(4, 3, 1)).eval()
    model[1].thresh.data.fill_(0.5)
    dense = qcfs_fast.profile(qcfs_fast.convert(model, T=2), [torch.rand(2, 1, 3, 5)], progress=False)
    dense.to_html(tmp_path / "two.html")
    ids = re.findall(r'<img id="figure-(\w+)"', (tmp_path / "two.html").read_text())
    assert ids == [name for name in FIGURES if name not in ("accuracy", "anytime")]


def test_missing_matplotlib_names_the_remedy(page, tmp_path, monkeypatch):
    _, p = page
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib: pip install 'qcfs-fast\[report\]'"):
        p.to_html(tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()

"""examples/serve.py: answers are those of predict, batches form, overload is refused, and bad images are told."""

import asyncio
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast.study import shipped

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
Image = pytest.importorskip("PIL.Image")

SHAPE = (1, 32, 32)


@pytest.fixture(scope="module")
def serve():
    path = Path(__file__).resolve().parent.parent / "examples" / "serve.py"
    spec = importlib.util.spec_from_file_location("serve", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    path = tmp_path_factory.mktemp("serve") / "net.safetensors"
    qcfs_fast.convert(shipped.network()[0], T=4).save(path)
    return path


@pytest.fixture(scope="module")
def pngs():
    """Test images, encoded."""
    found = []
    for image in shipped.images().images[:40, 0]:
        file = io.BytesIO()
        Image.fromarray(np.pad(image, 2)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def talk(app, conversation):
    """Runs conversation(client) against the application, with its task at work."""

    async def run():
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client,
        ):
            return await conversation(client)

    return asyncio.run(run())


def test_answers_are_those_of_predict(serve, network, pngs):
    about = shipped.network()[1]
    app = serve.application(network, SHAPE, about.mean, about.std)
    snn = qcfs_fast.load(network)
    sizes = []
    plain = serve.Batcher.predict
    app_predict = lambda self, x: sizes.append(len(x)) or plain(self, x)  # noqa: E731
    serve.Batcher.predict = app_predict

    async def conversation(client):
        return await asyncio.gather(*(client.post("/predict", content=png) for png in pngs))

    try:
        answers = talk(app, conversation)
    finally:
        serve.Batcher.predict = plain
    x = torch.stack([serve.read_image(png, SHAPE, about.mean, about.std) for png in pngs])
    want = snn.predict(x, 0.9)
    assert [a.status_code for a in answers] == [200] * len(pngs)
    assert [a.json()["label"] for a in answers] == want.labels.tolist()
    assert [a.json()["steps"] for a in answers] == want.steps.tolist()
    assert len(set(want.steps.tolist())) > 1
    assert max(sizes) > 1  # requests were put together
    assert sum(sizes) == len(pngs)


def test_overload_is_refused_and_passes(serve, network, pngs):
    app = serve.application(network, SHAPE, batch=2, waiting=3)

    async def conversation(client):
        crowd = await asyncio.gather(*(client.post("/predict", content=png) for png in pngs))
        alone = await client.post("/predict", content=pngs[0])
        return crowd, alone

    crowd, alone = talk(app, conversation)
    codes = [a.status_code for a in crowd]
    assert set(codes) == {200, 503}
    assert all(a.headers["Retry-After"] == "1" for a in crowd if a.status_code == 503)
    assert alone.status_code == 200


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [(b"no image", 400, "not an image"), (b"", 400, "not an image"), (b"\0" * (10 * 2**20 + 1), 413, "at most")],
    ids=["text", "nothing", "large"],
)
def test_bad_images(serve, network, body, code, message):
    answer = talk(serve.application(network, SHAPE), lambda client: client.post("/predict", content=body))
    assert answer.status_code == code
    assert message in answer.json()["detail"]


def test_a_truncated_image(serve, network, pngs):
    answer = talk(serve.application(network, SHAPE), lambda client: client.post("/predict", content=pngs[0][:-60]))
    assert answer.status_code == 400


def test_an_error_of_the_network_is_500_and_the_next_is_answered(serve, network, pngs):
    app = serve.application(network, SHAPE)

    async def conversation(client):
        batcher, plain = app.state.batcher, app.state.batcher.predict

        def broken(x):
            raise RuntimeError("no memory")

        batcher.predict = broken
        with pytest.raises(RuntimeError, match="no memory"):  # the transport of tests passes on what becomes a 500
            await client.post("/predict", content=pngs[0])
        batcher.predict = plain
        return await client.post("/predict", content=pngs[0]), await client.get("/health")

    answer, health = talk(app, conversation)
    assert answer.status_code == 200
    assert health.json()["status"] == "ok"


def test_the_load_test(tmp_path, capsys):
    pytest.importorskip("uvicorn")
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "serving.py"
    spec = importlib.util.spec_from_file_location("serving", path)
    load_test = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(load_test)
    docs, page, output = path.parent.parent / "docs" / "serving.md", tmp_path / "serving.md", tmp_path / "serving.json"
    shutil.copy(docs, page)
    few = ["--clients", "1", "4", "--seconds", "0.5"]
    found = load_test.main([*few, "--output", str(output), "--page", str(page)])
    assert json.loads(output.read_text()) == found
    assert [case["clients"] for case in found["cases"]] == [1, 4]
    for case in found["cases"]:
        assert case["requests"] > 0
        assert case["refused"] == 0
        # A closed loop: so many clients are never busy for longer than all of them together.
        assert case["requests_per_second"] * case["seconds"]["median"] < 2 * case["clients"]
    shown = capsys.readouterr().out
    assert f"{found['cores']} cores" in shown
    assert f"{found['cases'][0]['requests_per_second']:.0f} | {1e3 * found['cases'][0]['seconds']['median']:.2f}" in (
        re.sub(" +", " ", shown)
    )
    before, after = (file.read_text().split("<!-- ") for file in (docs, page))
    assert before[0] == after[0]
    assert before[-1] == after[-1]
    assert shown.strip() in page.read_text()
    with pytest.raises(RuntimeError, match="400"):
        load_test.main(["--image", str(path), "--seconds", "0.5"])

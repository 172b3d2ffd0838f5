"""Serve a saved network over HTTP: images in, labels out, in batches.

    python examples/serve.py net.safetensors --port 8000
    curl --data-binary @cat.png http://127.0.0.1:8000/predict

Requests wait in one queue. A task takes as many as are there, up to a batch, waits a moment for more, and runs them in
one call of `snn.predict`, in a thread beside the event loop (the kernels release Python's lock). So a batch forms by
itself where requests come faster than the network answers, and a lone request waits only that moment.

    queue full              503 with Retry-After: the client shall come again, and memory does not grow
    no image                400
    body too large          413
"""

import argparse
import asyncio
import io
from contextlib import asynccontextmanager

import numpy as np
import torch
from fastapi import FastAPI, HTTPException, Request
from PIL import Image

import qcfs_fast

MOST_BYTES = 10 * 2**20


class Batcher:
    """The queue, and the task that empties it."""

    def __init__(self, snn, confidence, batch, wait, waiting):
        self.snn, self.confidence, self.batch, self.wait = snn, confidence, batch, wait
        self.queue = asyncio.Queue(waiting)

    async def ask(self, image):
        """(label, steps, probability) of an image [C, H, W]; raises asyncio.QueueFull."""
        answer = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((image, answer))
        return await answer

    async def work(self):
        while True:
            asked = [await self.queue.get()]
            if self.queue.qsize() + 1 < self.batch:
                await asyncio.sleep(self.wait)
            while len(asked) < self.batch and not self.queue.empty():
                asked.append(self.queue.get_nowait())
            try:
                answers = await asyncio.to_thread(self.predict, torch.stack([image for image, _ in asked]))
            except Exception as error:
                answers = [error] * len(asked)
            for (_, future), answer in zip(asked, answers, strict=True):
                if future.cancelled():  # the client went away
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)

    def predict(self, x):
        found = self.snn.predict(x, self.confidence)
        probability = found.logits.softmax(1).amax(1)
        return list(zip(found.labels.tolist(), found.steps.tolist(), probability.tolist(), strict=True))


def read_image(body, shape, mean, std):
    """An encoded image as the network takes it, float [C, H, W]; ValueError if it is none."""
    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(body)) as file:
            image = file.convert("L" if channels == 1 else "RGB").resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ValueError(f"not an image that Pillow can read ({error})") from error
    x = torch.from_numpy(np.array(image, np.float32) / 255).reshape(height, width, channels).permute(2, 0, 1)
    return (x - torch.tensor(mean).reshape(-1, 1, 1)) / torch.tensor(std).reshape(-1, 1, 1)


def application(network, shape=None, mean=(0.0,), std=(1.0,), confidence=0.9, batch=32, wait=0.002, waiting=128):
    """The server.

    Args:
        network: file written by snn.save.
        shape: [C, H, W] of its images, default those it was settled for.
        mean, std: per channel, of images from 0 to 1.
        confidence: margin at which an image is answered before all T steps (see SNN.predict).
        batch: most images in one call.
        wait: seconds that the first of a batch waits for others.
        waiting: requests that may wait; more are refused.
    """
    snn = qcfs_fast.load(network)
    shape = tuple(shape or snn.input_shape)

    @asynccontextmanager
    async def lifespan(app):
        app.state.batcher = Batcher(snn, confidence, batch, wait, waiting)
        task = asyncio.create_task(app.state.batcher.work())
        yield
        task.cancel()

    app = FastAPI(title="qcfs_fast", lifespan=lifespan)

    @app.post("/predict")
    async def predict(request: Request):
        if int(request.headers.get("content-length") or 0) > MOST_BYTES:
            raise HTTPException(413, f"at most {MOST_BYTES} bytes")
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"at most {MOST_BYTES} bytes")
        try:
            image = read_image(body, shape, mean, std)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        try:
            label, steps, probability = await app.state.batcher.ask(image)
        except asyncio.QueueFull:
            raise HTTPException(503, "too many requests are waiting", {"Retry-After": "1"}) from None
        return {"label": label, "steps": steps, "probability": probability}

    @app.get("/health")
    async def health():
        return {"status": "ok", "waiting": app.state.batcher.queue.qsize(), "kernels": qcfs_fast.backend.describe()}

    return app


def main():
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("C", "H", "W"))
    parser.add_argument("--mean", type=float, nargs="+", default=[0.0])
    parser.add_argument("--std", type=float, nargs="+", default=[1.0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    o = parser.parse_args()
    uvicorn.run(application(o.network, o.shape, o.mean, o.std), host=o.host, port=o.port, log_level="warning")


if __name__ == "__main__":
    main()

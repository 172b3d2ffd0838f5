"""Load test of examples/serve.py on loopback: requests a second, and latency percentiles.

    python benchmarks/serving.py                                    the network that ships with the package
    python benchmarks/serving.py --network net.safetensors --image cat.png --shape 3 32 32 --output serving.json
    python benchmarks/serving.py --page docs/serving.md             write the figures into the page

The server runs in a process of its own with one thread. For each number of clients, so many connections stay open, and
each sends its next image as soon as it has the answer to the last (a closed loop). A request counts from its first byte
to the last of the answer. Refusals (503) are counted apart, and have no latency. The clients take a processor too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.backend.information import processor
from qcfs_fast.files import replace_between, write_text_atomically
from qcfs_fast.study import shipped
from qcfs_fast.study.benchmark.measure import TAIL, percentiles

MARK = "<!-- serving: written by benchmarks/serving.py -->", "<!-- end of serving -->"
SERVE = Path(__file__).resolve().parent.parent / "examples" / "serve.py"


@contextlib.contextmanager
def served(arguments: list[str], limit: float = 120) -> Iterator[int]:
    """The port of a server that answers, for as long as the block runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(SERVE), *arguments, "--port", str(port)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        end = time.monotonic() + limit
        while True:
            with contextlib.suppress(OSError), connected(port) as connection:
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    "the server did not start; it needs FastAPI, uvicorn and Pillow (pip install 'qcfs-fast[serve]')"
                )
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


def connected(port: int) -> contextlib.closing[http.client.HTTPConnection]:
    return contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60))


def load(port: int, images: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """So many clients for so long; raises on any answer but 200 and 503."""
    latencies: list[float] = []
    refused, failed = [0] * clients, []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        at = number
        try:
            with connected(port) as connection:
                while (start := time.perf_counter()) < end:
                    connection.request("POST", "/predict", images[at % len(images)])
                    answer = connection.getresponse()
                    body = answer.read()
                    if answer.status == 200:
                        latencies.append(time.perf_counter() - start)
                        at += 1
                    elif answer.status == 503:
                        refused[number] += 1
                        time.sleep(0.01)
                    else:
                        raise RuntimeError(f"{answer.status} {body[:200]!r}")
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    if failed:
        raise failed[0]
    if not latencies:
        raise RuntimeError(f"no request of {clients} clients was answered in {seconds} s")
    return {
        "clients": clients,
        "requests": len(latencies),
        "refused": sum(refused),
        "requests_per_second": len(latencies) / took,
        "seconds": {"median": statistics.median(latencies), **percentiles(latencies)},
    }


def shipped_pngs() -> list[bytes]:
    """The test images of the package, encoded."""
    from PIL import Image

    found = []
    for image in shipped.images().images[:, 0]:
        file = io.BytesIO()
        Image.fromarray(np.pad(image, 2)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, help="saved network (default: the shipped one, T = 4)")
    parser.add_argument("--image", type=Path, nargs="+", help="encoded images to send (default: the shipped ones)")
    parser.add_argument("--shape", nargs=3, default=["1", "32", "32"], metavar=("C", "H", "W"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10, help="for each number of clients")
    parser.add_argument("--output", type=Path, help="write the figures there as JSON")
    parser.add_argument("--page", type=Path, help="put the table between this Markdown page's marks")
    o = parser.parse_args(arguments)
    images = [path.read_bytes() for path in o.image] if o.image else shipped_pngs()
    with tempfile.TemporaryDirectory() as folder:
        network, more = o.network, ["--shape", *o.shape]
        if network is None:
            network, (model, about) = Path(folder) / "net.safetensors", shipped.network()
            qcfs_fast.convert(model, T=4, progress=False).save(network)
            more += ["--mean", *map(str, about.mean or (0,)), "--std", *map(str, about.std or (1,))]
        with served([str(network), *more]) as port:
            cases = []
            for clients in o.clients:
                load(port, images, clients, min(1, o.seconds))  # plans of its batches are made
                cases.append(load(port, images, clients, o.seconds))
    result = {
        "network": "the network that ships with the package (ResNet-20 of half width, 32x32, T = 4)"
        if o.network is None
        else o.network.name,
        "processor": processor(),
        "cores": os.cpu_count(),
        "kernels": backend.describe(),
        "torch": torch.__version__,
        "cases": cases,
    }
    print(table(result))
    if o.output is not None:
        write_text_atomically(o.output, json.dumps(result, indent=1) + "\n")
    if o.page is not None:
        replace_between(o.page, MARK, table(result))
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as a table of Markdown, and what they are of."""
    rows = [["clients", "requests/s", "median ms", *(f"{name} ms" for name in TAIL), "refused"]]
    for case in result["cases"]:
        seconds = [case["seconds"].get(name) for name in ("median", *TAIL)]
        times = ["-" if s is None else f"{1e3 * s:.2f}" for s in seconds]
        rows.append([f"{case['clients']}", f"{case['requests_per_second']:.0f}", *times, f"{case['refused']}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * (w - 1) + ":" for w in widths])
    lines = [f"| {' | '.join(c.rjust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows]
    facts = (
        f"Measured on {result['processor']}, {result['cores']} cores for the clients and a server of one thread, "
        f"kernels {result['kernels']}, torch {result['torch']}; {result['network']}."
    )
    return "\n".join([*lines, "", textwrap.fill(facts, 119, break_long_words=False, break_on_hyphens=False), ""])


if __name__ == "__main__":
    main()

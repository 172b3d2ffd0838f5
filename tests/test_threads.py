"""Networks made and called in several threads at once give what they give one after another."""

import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import networks
import pytest
import torch
from networks import converted
from torch import nn

import qcfs_fast
from qcfs_fast import backend
from qcfs_fast.model.tracing import symbolic_trace

KINDS = [networks.Small, networks.Branches, networks.Groups, networks.Image]


def test_callers_of_one_network():
    snn, x = converted(networks.Small, T=9)
    want = {T: snn(x, T=T, per_step=True) for T in (1, 9, 12)}
    traced, found = qcfs_fast.trace(snn, x), snn.predict(x, 0.5)

    def work(T):
        for _ in range(3):
            assert torch.equal(snn(x, T=T, per_step=True), want[T])
        assert all(torch.equal(s, traced[name]) for name, s in qcfs_fast.trace(snn, x).items())
        assert torch.equal(snn.predict(x, 0.5).logits, found.logits)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [*want] * 2))


def test_sixteen_callers_of_several_networks():
    """Each with shapes, steps and backends that change from call to call, and its own stream."""
    neurons = ["plain", "signed", "offset", "plain"]
    made = [converted(kind, T=3, neuron=neuron) for kind, neuron in zip(KINDS, neurons, strict=True)]
    settings = [{}, {}, {}, {"isa_mask": 0}, {"cpu_engine": "events"}, {"cpu_engine": "dense"}, {"reference": True}]
    cases = [(snn, x[:n].contiguous(), T) for snn, x in made for n in (1, 3) for T in (2, 4, 9)]
    want = [snn(x, T=T) for snn, x, T in cases]
    flowing = [(snn, x, snn.stream()(x, steps=5)) for snn, x in (made[0], made[1])]

    def work(i):
        numbers = random.Random(i)
        for _ in range(12):
            k = numbers.randrange(len(cases))
            snn, x, T = cases[k]
            with backend.force(**settings[numbers.randrange(len(settings))]):
                assert torch.equal(snn(x, T=T), want[k])
            snn, x, last = flowing[numbers.randrange(2)]
            stream = snn.stream()
            stream(x, steps=2)
            assert torch.equal(stream(x, steps=3), last)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))


def test_networks_are_made_while_others_run(tmp_path):
    """From the model to the loaded file, each thread its own, beside calls of a network that all share."""

    def make(kind, path=None):
        snn, x = converted(kind, T=5)
        if path:
            snn.save(path)
            snn = qcfs_fast.load(path)
        return snn.state_dict(), snn(x, per_step=True)

    shared, images = converted(networks.Small)
    logits, want = shared(images), {kind: make(kind) for kind in KINDS}

    def work(i):
        kind = KINDS[i % len(KINDS)]
        for made, first in zip(make(kind, tmp_path / f"{i}.safetensors"), want[kind], strict=True):
            if isinstance(made, dict):
                assert list(made) == list(first)
                assert all(torch.equal(made[name], first[name]) for name in first)
            else:
                assert torch.equal(made, first)
        assert all(torch.equal(shared(images), logits) for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(6)))


def test_a_network_runs_while_another_thread_traces():
    """torch.fx patches the call of every module in the process as long as it traces one."""
    snn, images = converted(networks.Small)
    want, seen = snn(images), []

    class Watched(nn.Module):
        def __init__(self, meanwhile):
            super().__init__()
            self.a, self.b, self.relu, self.meanwhile = nn.Linear(4, 4), nn.Linear(4, 2), nn.ReLU(), meanwhile

        def forward(self, x):
            x = self.relu(self.a(x))
            self.meanwhile()  # at a known place within the trace
            return self.b(x)

    with ThreadPoolExecutor(4) as pool:
        qcfs_fast.prepare(Watched(lambda: seen.append(pool.submit(snn, images).result(timeout=60))))
        assert len(seen) >= 1
        assert all(torch.equal(logits, want) for logits in seen)

        # A second trace begins within the first, and ends after it.
        first_goes_on, others = threading.Event(), []

        def begin_another():
            others.append(pool.submit(qcfs_fast.prepare, Watched(lambda: first_goes_on.wait(1))))

        plain, call = qcfs_fast.prepare(Watched(lambda: None)), nn.Module.__call__
        first = qcfs_fast.prepare(Watched(begin_another))
        first_goes_on.set()
        assert [str(other.result(timeout=60).graph) for other in others] == [str(plain.graph)] * len(others)
        assert str(first.graph) == str(plain.graph)
        assert others
        assert nn.Module.__call__ is call


def test_a_model_runs_while_another_thread_traces_it():
    """The same one, with parameters of its own (torch.fx patches how modules hand these out, too)."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.relu, self.scale = nn.Linear(4, 3), nn.ReLU(), nn.Parameter(torch.tensor(2.0))
            self.meanwhile = lambda: None

        def forward(self, x):
            self.meanwhile()
            return self.relu(self.a(x))

    model, x, found = Net().train(), torch.rand(2, 4), []
    model.b = nn.Linear(4, 3)
    want, parameter = model.b(x), model.scale

    def ask():
        model.meanwhile = lambda: None
        found.extend((model.b(x), model.scale, model.b.weight))

    def meanwhile():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(ask).result(timeout=60)

    model.meanwhile = meanwhile
    qcfs_fast.prepare(model)
    assert torch.equal(found[0], want)
    assert found[1] is parameter
    assert found[2] is model.b.weight
    assert model.training


def test_models_in_training_are_traced_in_eval_mode_by_all_threads():
    """And end in the mode they had: the mode belongs to the model, which both threads change."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)).train()

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return torch.nn.functional.dropout(self.net(x), training=self.training)

    net = Functional().train()
    with ThreadPoolExecutor(4) as pool:
        graphs = list(pool.map(lambda _: str(symbolic_trace(net).graph), range(40)))
    assert len(set(graphs)) == 1
    assert "training: False" in graphs[0]
    assert net.training
    assert model.training


ENDS = """
import os, sys, threading, time, types
import networks, torch
torch.set_num_threads(1)
snn, x = networks.converted(networks.Small, T=9)
snn(x)
inside, caller, held = threading.Event(), [], snn._executor._native
class Calls:
    def __init__(self, network):
        self.network, self.prepare = network, network.prepare
    def run(self, *arguments):
        caller.append(str(threading.get_native_id()))
        inside.set()
        while True:
            self.network.run(*arguments)
held._network = Calls(held._network)
class Last:
    def __del__(self, caller=caller, tasks=os.listdir, sleep=time.sleep, say=os.write):
        # The interpreter has ended, its modules go away. The thread comes back from its call now, and is ended.
        while caller[0] in tasks("/proc/self/task"):
            sleep(0.05)
        say(1, b"ended")
sys.modules["last"] = types.ModuleType("last")
sys.modules["last"].last = Last()
threading.Thread(target=snn, args=(x.repeat(40, 1, 1, 1),), daemon=True).start()
inside.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or sys.version_info >= (3, 14), reason="later Pythons leave it hanging")
def test_the_interpreter_ends_while_a_call_runs(tmp_path):
    """Python ends a daemon thread that comes back from native code, and the process ends as it would without it."""
    found = os.pathsep.join(str(p) for p in (Path(__file__).parent, Path(qcfs_fast.__file__).parent.parent))
    here = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", ENDS]
    done = subprocess.run(command, cwd=tmp_path, env=here, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "ended"), done.stderr

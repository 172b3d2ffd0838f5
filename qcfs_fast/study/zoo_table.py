"""Which classifiers convert, of torchvision all and of timm the families with ReLU: each is tried, and a page says what
came of it (docs/zoo.md).

One that is refused is tried once more with what the refusal offers: its activations are replaced, and the gates that it
names are left out. The obstacles on the page are those that remain.

Weights are random, since only the graph matters here: BatchNorm takes its statistics from one batch of noise,
thresholds are calibrated on another. Each layer of the converted network is then compared with float64 on the same
spikes (conversion/checking.py). Images are small; no layer depends on their size.

A network takes seconds to minutes, in a process of its own, which may take so much time and memory and no more. Its
result goes into a JSON file beside the page at once, and a run that was stopped goes on with the networks that are
missing there.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion.builder import convert
from ..conversion.checking import layer_differences, share
from ..conversion.lowering import lower
from ..conversion.preparation import prepare
from ..errors import ConversionError
from ..files import read_json, update_json, write_text_atomically
from ..model.calibration import calibrate
from ..model.graph import REPLACEABLE
from .zoo import classes_named, every_classifier, torchvision_network

SIDES = (64, 96, 224)  # pixels
MEMORY, MINUTES = 8, 20  # GiB of address space, and time, that a network may take
_OF_TIMM = """
resnet10t resnet14t resnet18 resnet18d resnet26 resnet26d resnet26t resnet34 resnet34d resnet50 resnet50c resnet50d
resnet50s resnet50t resnet50_gn resnetaa50 resnetblur18 resnetblur50 resnetrs50 resnext50_32x4d resnext50d_32x4d
resnet101 resnetv2_18 resnetv2_50 resnetv2_50x1_bit seresnet18 ecaresnet50d skresnet18 resnest14d legacy_seresnet50
res2net50_14w_8s res2net50_26w_4s res2next50 regnetx_002 regnetx_004 regnetx_004_tv regnetx_006 regnetx_008
regnety_002 densenet121 densenetblur121d dla34 dla46_c dla46x_c dla60 dla60x dla60x_c dla60_res2net dpn68
hrnet_w18_small inception_v3 vgg11 vgg11_bn vovnet39a ese_vovnet19b_dw mobilenetv1_100 mobilenetv2_035
mobilenetv2_050 mobilenetv2_100 mobilenetv4_conv_small efficientnet_lite0 efficientnet_es mobilenet_edgetpu_100
mnasnet_050 mnasnet_100 mnasnet_small semnasnet_050 fbnetc_100 spnasnet_100 tf_mobilenetv3_small_minimal_100
mobilenetv3_small_100 ghostnet_100 repghostnet_100 repvgg_a0 repvgg_b0 gernet_s mobileone_s0 mobileone_s1 selecsls42
selecsls42b selecsls60b xception41 legacy_xception hgnet_tiny hgnetv2_b0 tresnet_m fasternet_t0 starnet_s1
nf_resnet50 cspresnet50 darknet53
"""
IMAGES, T, LEVELS = 2, 4, 4
_NEVER_LINEAR = ("multiplies two activations", "result of sigmoid", "LayerNorm", "group_norm")  # whatever is replaced


def of_timm() -> list[str]:
    """timm's families with ReLU, the smaller of each, and some with gates or other activations that say why not."""
    return [f"timm:{name}" for name in _OF_TIMM.split()]


def tried_apart(name: str) -> dict[str, Any]:
    """What came of one network, tried in a process of its own."""
    command = [sys.executable, "-m", __name__, name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES, check=False)
    except subprocess.TimeoutExpired:
        return {"obstacles": [[f"took more than {MINUTES} minutes here", 1]]}
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"])[-1]
    scarce = "memory" in last.lower() or done.returncode in (-signal.SIGKILL, -signal.SIGABRT)
    return {"obstacles": [[f"takes more than {MEMORY} GiB of memory" if scarce else f"does not run here: {last}", 1]]}


def tried(name: str) -> dict[str, Any]:
    """What came of one network: "share", "neurons" and what was "replaced" if it converts, "obstacles" if not."""
    torch.manual_seed(0)
    network = torchvision_network(name, 10)
    side = _side(network)
    try:
        model, replaced = _prepared(network, side)
        del network  # it may take half of the memory
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
                m.train()
        with torch.no_grad():
            model(torch.randn(4, 3, side, side))
        calibrate(model.eval(), [torch.randn(4, 3, side, side)], progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few bits for a layer: the share shows what it is worth
            snn = convert(model, T=T, check=False)  # each layer is compared below
    except ConversionError as error:
        return {"obstacles": [_reason(why, places) for why, places in error.obstacles or _single(str(error))]}
    found = layer_differences(model, snn, torch.randn(IMAGES, 3, side, side), T)
    worst = max(found, key=lambda layer: found[layer].differing / found[layer].compared)
    compared, fired = (sum(d[i] for d in found.values()) for i in (1, 2))
    return {
        "share": share(found),
        "worst": [worst, found[worst].differing / found[worst].compared],
        "neurons": compared // (T * IMAGES),
        "rate": fired / compared,
        "replaced": replaced,
    }


def _side(network: nn.Module) -> int:
    """Of the smallest images that a network takes."""
    for side in SIDES:
        with contextlib.suppress(Exception), torch.no_grad():  # whatever it raises on images that do not fit
            network(torch.zeros(1, 3, side, side))
            return side
    return SIDES[0]


def _prepared(network: nn.Module, side: int) -> tuple[nn.Module, list[str]]:
    """A network as it is, or else with the modules replaced that its refusal offers to replace; and their classes."""

    def prepared(names: Collection[str]) -> nn.Module:
        model = prepare(network, levels=LEVELS, replace=classes_named(network, names))
        lower(model, (3, side, side))
        return model

    try:
        return prepared(()), []
    except ConversionError as error:
        refused = error
    names = {*re.findall(r"replace={(\w+)}", str(refused))}
    names |= {type(m).__name__ for m in network.modules() if type(m) in REPLACEABLE}
    try:
        return prepared(names), sorted(names)
    except ConversionError as error:
        raise (error if error.obstacles else refused) from None


def _single(message: str) -> list[tuple[str, tuple[str, ...]]]:
    place, _, why = message.partition(": ")
    return [(why, (place,))]


def _reason(why: str, places: Sequence[str]) -> list[Any]:
    """An obstacle in few words, and how often it was met."""
    short = why.partition(". ")[0].partition(" (attention")[0]
    short = re.sub(r"(has no spiking counterpart):.*", r"\1", short)
    if short.startswith("has no"):  # a function: its name stands with the place
        short = f"{', '.join(sorted({p.partition(' in ')[0] for p in places}))} {short}"
    return [short, len(places)]


def _with(found: dict[str, Any], there: dict[str, Any] | None) -> dict[str, Any]:
    return dict(sorted({**(there or {}), **found}.items()))


def check_zoo(page: Path, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Try networks, those first of which nothing is known, and write the page and the results beside it."""
    kept = page.with_suffix(".json")
    results = read_json(kept, "result of zoo --check", _page) if kept.exists() else {}
    for i, name in enumerate(names):
        if name in results:
            continue
        start = time.perf_counter()
        found = {name: tried_apart(name)}
        results = update_json(kept, partial(_with, found))
        say(f"[{i + 1}/{len(names)}] {name}: {_outcome(results[name])} ({time.perf_counter() - start:.0f} s)")
        write_text_atomically(page, _page(results))
    return results


def _outcome(result: dict[str, Any]) -> str:
    if "share" in result:
        on = f" with {', '.join(result['replaced'])} replaced" if result.get("replaced") else ""
        return f"converts{on}, {result['share']:.1e} of the spikes differ"
    return "; ".join(f"{why} ({n}x)" if n > 1 else why for why, n in result["obstacles"])


_TENSORFLOW = "https://github.com/tensorflow"
_ON_REQUEST = (
    "`prepare(model, replace={...})` makes QCFS of their activations and leaves their gates out. The spiking network",
    "agrees with what is left; but that is another network, in which weights that were trained with gates lose their",
    "accuracy. So train it before it is converted. Networks for integer hardware are made so:",
    "",
    "* EfficientNet-Lite has no squeeze-and-excitation, and ReLU6 for SiLU",
    f"  ([Google, 2020]({_TENSORFLOW}/tpu/tree/master/models/official/efficientnet/lite)).",
    "* The minimalistic MobileNetV3 has neither squeeze-and-excitation nor hard-swish",
    f"  ([Google, 2019]({_TENSORFLOW}/models/tree/master/research/slim/nets/mobilenet)).",
    "* RegNetX is RegNetY without squeeze-and-excitation ([Radosavovic et al., 2020](https://arxiv.org/abs/2003.13678)).",
)


def _page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    lines = [
        "# Classifiers of torchvision and timm",
        "",
        "`qcfs-fast zoo --check --timm` wrote this page. Weights are random, thresholds calibrated,",
        f"L = {LEVELS}, T = {T}, {IMAGES} images of noise of {SIDES[0]} pixels a side, or {SIDES[1]} or {SIDES[2]} "
        "where they must be larger.",
        "Each layer is compared with float64 on the same spikes: the share is of all spikes, that of the worst layer",
        f"of its own. A network may take {MINUTES} minutes and {MEMORY} GiB.",
    ]
    timm = {name: r for name, r in sorted(results.items()) if name.startswith("timm:")}
    rest = {name: r for name, r in sorted(results.items()) if name not in timm}
    missing = [name for name in every_classifier() if name not in rest]
    lines += _section("torchvision", rest, missing) if rest else []
    lines += _section("timm", timm, [name for name in of_timm() if name not in timm]) if timm else []
    return "\n".join([*lines, ""])


def _section(library: str, results: dict[str, Any], missing: Sequence[str]) -> list[str]:
    good = {name: r for name, r in results.items() if "share" in r and not r.get("replaced")}
    asked = {name: r for name, r in results.items() if r.get("replaced")}
    bad = {name: r["obstacles"] for name, r in results.items() if "share" not in r}
    more = f" as they are, {len(asked)} more on request" if asked else ""
    lines = ["", f"## {library}", "", f"**{len(good)} of {len(results)} convert{more}.**", "", *_table(good)]
    if asked:
        lines += ["", f"### Those of {library} that convert on request", "", *_ON_REQUEST, "", *_table(asked)]
    if bad:
        barred = sum(any(word in why for why, _ in reasons for word in _NEVER_LINEAR) for reasons in bad.values())
        count = f"All {len(bad)}" if barred == len(bad) else f"{barred} of the {len(bad)}"
        lines += ["", f"### Those of {library} that do not", ""]
        lines += [
            f"{count} multiply activations by each other or normalise each image by itself (attention, LayerNorm),",
            "which has no exact conversion, whatever is replaced. LayerNorm and GroupNorm are not replaced on request:",
            "BatchNorm in their place has statistics of training data, which only a training can give.",
            "",
            "| network | why, with all replaced that can be: obstacle (how often) |",
            "| --- | --- |",
        ]
        lines += [f"| {name} | {'; '.join(f'{why} ({n})' for why, n in reasons)} |" for name, reasons in bad.items()]
    return lines + (["", f"Not tried: {', '.join(missing)}."] if missing else [])


def _table(results: dict[str, Any]) -> list[str]:
    head, rule = (
        "| network | neurons | firing rate | differing spikes | worst layer |",
        "| --- | ---: | ---: | ---: | --- |",
    )
    on_request = any(r.get("replaced") for r in results.values())
    lines = [f"{head} replaced |", f"{rule} --- |"] if on_request else [head, rule]
    for name, r in results.items():
        layer, most = r["worst"]
        worst = f"{layer} {most:.0e}" if most else ""
        replaced = f" {', '.join(r['replaced'])} |" if on_request else ""
        lines.append(f"| {name} | {r['neurons']} | {r['rate']:.2f} | {r['share']:.1e} | {worst} |{replaced}")
    return lines


if __name__ == "__main__":
    import resource  # which Windows lacks

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY << 30, MEMORY << 30))
    print(json.dumps(tried(sys.argv[1])))

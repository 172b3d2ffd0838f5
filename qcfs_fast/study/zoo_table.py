"""Which of torchvision's classifiers convert: every one is tried, and a page says what came of it (docs/zoo.md).

Weights are random, since only the graph matters here: BatchNorm takes its statistics from one batch of noise,
thresholds are calibrated on another. Each layer of the converted network is then compared with float64 on the same
spikes (conversion/checking.py). Images are small; no layer depends on their size.

A network takes seconds to minutes. Its result goes into a JSON file beside the page at once, and a run that was stopped
goes on with the networks that are missing there.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..conversion.builder import convert
from ..conversion.checking import layer_differences, share
from ..conversion.preparation import prepare
from ..errors import ConversionError
from ..files import write_text_atomically
from ..model.calibration import calibrate
from .zoo import torchvision_models

SIDE = {"inception_v3": 96}  # pixels; 64 elsewhere
IMAGES, T, LEVELS = 2, 4, 4
_NEVER_LINEAR = ("multiplies two activations", "result of sigmoid", "LayerNorm")  # obstacles of gates and norms


def every_classifier() -> list[str]:
    models = torchvision_models()
    return sorted(models.list_models(module=models))


def tried(name: str) -> dict[str, Any]:
    """What came of one network: "share" and "neurons" if it converts, "obstacles" if not."""
    options = {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}
    torch.manual_seed(0)
    network: nn.Module = torchvision_models().get_model(name, weights=None, num_classes=10, **options)
    side = SIDE.get(name, 64)
    try:
        model = prepare(network.eval(), levels=LEVELS)
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None
                m.train()
        with torch.no_grad():
            model(torch.randn(4, 3, side, side))
        calibrate(model.eval(), [torch.randn(4, 3, side, side)], progress=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # few bits for a layer: the share shows what it is worth
            snn = convert(model, T=T)
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
    }


def _single(message: str) -> list[tuple[str, tuple[str, ...]]]:
    place, _, why = message.partition(": ")
    return [(why, (place,))]


def _reason(why: str, places: Sequence[str]) -> list[Any]:
    """An obstacle in few words, and how often it was met."""
    short = why.partition(". ")[0].partition(" (attention")[0]
    if short.startswith("has no"):  # a function: its name stands with the place
        short = f"{', '.join(sorted({p.partition(' in ')[0] for p in places}))} {short}"
    return [short, len(places)]


def check_zoo(page: Path, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Try networks, those first of which nothing is known, and write the page and the results beside it."""
    kept = page.with_suffix(".json")
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for i, name in enumerate(names):
        if name in results:
            continue
        start = time.perf_counter()
        results[name] = tried(name)
        say(f"[{i + 1}/{len(names)}] {name}: {_outcome(results[name])} ({time.perf_counter() - start:.0f} s)")
        write_text_atomically(kept, json.dumps(results, indent=1, sort_keys=True) + "\n")
        write_text_atomically(page, _page(results))
    return results


def _outcome(result: dict[str, Any]) -> str:
    if "share" in result:
        return f"converts, {result['share']:.1e} of the spikes differ"
    return "; ".join(f"{why} ({n}x)" if n > 1 else why for why, n in result["obstacles"])


def _page(results: dict[str, Any]) -> str:
    """The page in Markdown."""
    good = {name: r for name, r in sorted(results.items()) if "share" in r}
    lines = [
        "# torchvision's classifiers",
        "",
        "`qcfs-fast zoo --check` wrote this page about the classifiers of torchvision. Weights are random,",
        f"thresholds calibrated, L = {LEVELS}, T = {T}, {IMAGES} images of noise, 64x64 pixels (inception_v3: 96x96).",
        "Each layer is compared with float64 on the same spikes: the share is of all spikes, that of the worst layer",
        "of its own.",
        "",
        f"**{len(good)} of {len(results)} convert.**",
        "",
        "| network | neurons | firing rate | differing spikes | worst layer |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, r in good.items():
        layer, most = r["worst"]
        worst = f"{layer} {most:.0e}" if most else ""
        lines.append(f"| {name} | {r['neurons']} | {r['rate']:.2f} | {r['share']:.1e} | {worst} |")
    bad = [r["obstacles"] for name, r in results.items() if name not in good]
    barred = sum(any(word in why for why, _ in reasons for word in _NEVER_LINEAR) for reasons in bad)
    lines += ["", "## Those that do not", ""]
    if bad:
        count = f"All {len(bad)}" if barred == len(bad) else f"{barred} of the {len(bad)}"
        lines += [f"{count} multiply activations by gates or normalise each image by itself (squeeze-and-excitation,"]
        lines += ["LayerNorm), which has no exact conversion, whatever else is replaced.", ""]
    lines += ["| network | why: obstacle (how often) |", "| --- | --- |"]
    for name, r in sorted(results.items()):
        if name not in good:
            lines.append(f"| {name} | {'; '.join(f'{why} ({n})' for why, n in r['obstacles'])} |")
    missing = [name for name in every_classifier() if name not in results]
    lines += ["", f"Not tried: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, ""])

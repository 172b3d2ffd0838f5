"""python -m qcfs_fast: the demo and facts about the installation."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .demo import EPOCHS, demo
from .information import info


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qcfs_fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    about = commands.add_parser("info", help="print versions, instruction sets and the kernels in use")
    about.add_argument("--json", action="store_true", help="machine-readable output")

    run = commands.add_parser(
        "demo",
        help="train, convert and evaluate a network on scikit-learn's digits",
        epilog="example: python -m qcfs_fast demo --output /tmp/digits",
    )
    run.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the plot and the network")
    run.add_argument("--epochs", type=int, default=EPOCHS, help=f"training epochs (default {EPOCHS})")
    run.add_argument("--json", action="store_true", help="print the table as JSON")
    run.add_argument("--quiet", action="store_true", help="no progress bars")

    options = parser.parse_args(arguments)
    if options.command == "info":
        facts = info()
        if options.json:
            print(json.dumps(facts, indent=2))
        else:
            width = max(len(k) for k in facts)
            for key, value in facts.items():
                print(f"{key.ljust(width)}  {', '.join(value) if isinstance(value, list) else value}")
        return 0
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    try:
        demo(options.output, options.epochs, progress=not options.quiet, as_json=options.json)
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m fuzz KIND.. [--cases N] [--seconds S] [--seed K], in tests/: the counts, and an exit status of 1 for any
crash, hang or wrong answer."""

import argparse
import sys

from .harness import BAD, fuzz


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+")
    parser.add_argument("--cases", type=int, default=10**9)
    parser.add_argument("--seconds", type=float, default=1e9, help="for each kind")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    a = parser.parse_args()
    failed = False
    for kind in a.kinds:
        seen = fuzz(kind, a.seed, a.cases, a.seconds)
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(seen.items()))
        print(f"{kind}: {sum(seen.values())} cases from {a.seed}: {counts}", flush=True)
        failed |= bool(BAD & set(seen))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

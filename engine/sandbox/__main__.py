"""python -m athanor.sandbox [--attack] [--bench]: what this machine's sandbox is worth."""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from athanor.errors import UserError
from athanor.sandbox.attacks import attacks, run_attacks
from athanor.sandbox.pool import Sandbox, why_not


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m athanor.sandbox", description="Try the sandbox for untrusted programs on this machine.")
    parser.add_argument("--attack", action="store_true", help="run the attack suite and print its table; exit code 1 when one gets through")
    parser.add_argument("--bench", action="store_true", help="measure short Python programs per second")
    parser.add_argument("--workers", type=int, default=0, help="sandboxes at a time; 0 = one per usable core")
    options = parser.parse_args()
    print(f"isolation: {why_not() or 'bubblewrap, tried out'}")
    try:
        sandbox = Sandbox(workers=options.workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    if options.attack:
        failed = _print_attacks(sandbox)
    if options.bench:
        _bench(sandbox)
    return 1 if failed else 0


def _print_attacks(sandbox: Sandbox) -> int:
    failed = total = 0
    for outcome in run_attacks(sandbox, attacks()):
        total += 1
        failed += bool(outcome.complaint)
        print(f"{'FAILED' if outcome.complaint else 'contained':9}  {outcome.status:8} {outcome.seconds:6.2f} s  {outcome.attack.name}", flush=True)
        if outcome.complaint:
            print(f"           {outcome.complaint}")
    print(f"{total - failed} of {total} contained")
    return failed


def _bench(sandbox: Sandbox, num_programs: int = 300) -> None:
    program = "n = int(input())\nprint(sum(i * i for i in range(n)))\n"
    sandbox.run(program, stdin="10")
    began = time.monotonic()
    with ThreadPoolExecutor(sandbox.workers) as pool:
        results = list(pool.map(lambda i: sandbox.run(program, stdin=str(i)), range(num_programs)))
    seconds = time.monotonic() - began
    assert all(result.stdout == f"{sum(k * k for k in range(i))}\n" for i, result in enumerate(results))
    print(f"{num_programs / seconds:.1f} programs/s, {sandbox.workers} at a time, each in a sandbox of its own")


if __name__ == "__main__":
    sys.exit(main())

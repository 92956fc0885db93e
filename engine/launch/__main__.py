"""python -m athanor.launch NAME: print a packaged launch file."""

import argparse
import sys
from pathlib import Path

FILES = {"slurm": "slurm.sbatch", "kubernetes": "kubernetes.yaml", "environment": "environment.sh"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m athanor.launch", description="Print a launch file for many nodes, to be copied and filled in.")
    parser.add_argument("name", choices=FILES, help="slurm: for sbatch; kubernetes: a Job and a Service; environment: variables for a shell's eval")
    sys.stdout.write((Path(__file__).parent / FILES[parser.parse_args().name]).read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

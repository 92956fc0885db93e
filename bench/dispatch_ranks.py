"""Ranks that sample together, in processes that wait for their turn: `python dispatch_ranks.py ARGUMENTS` is one of them."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gate import Verdict

from athanor import dispatch
from athanor.config import SamplingConfig
from athanor.decode import DecodeRows
from athanor.generate import Completion, Generator, Request
from athanor.parallel import Ranks

MEANS = 256, 24  # tokens of a long sample, of another one


def requests_of(vocab_size: int, prompts: int, group_size: int, length: int, run: int) -> list[Request]:
    """Prompts whose samples end at one of so many end tokens that they have the wanted mean length if all tokens are about as likely."""
    rng = np.random.default_rng(run)
    is_long = set(rng.permutation(prompts)[: prompts // 4].tolist())
    eos = [frozenset(range(max(1, round(vocab_size / MEANS[i not in is_long])))) for i in range(prompts)]
    return [
        Request(rng.integers(vocab_size, size=length), np.arange(group_size) + i * group_size, eos_ids=eos[i]) for i in range(prompts)
    ]


def digest(completion: Completion) -> str:
    return hashlib.sha256(completion.token_ids.tobytes() + completion.logps.tobytes()).hexdigest()


class Rollout:
    """One rank's part."""

    def __init__(self, model: dict, prompts: int, G: int, prompt: int, rows: int, new: int, mode: str, **_):
        from rollout_engine import random_model

        self.ranks = Ranks("cpu", threads=1, dispatch=mode)
        model = random_model(model, "cpu", torch.float32).requires_grad_(False)
        self.asked, self.num_runs = (model.config.vocab_size, prompts, G, prompt), 0
        self.sampling = SamplingConfig(max_tokens=new, temperature=8.0)  # so that all tokens are about as likely
        self.generator = Generator(model, {0}, max_rows=rows)
        self.row_steps = 0
        decode = DecodeRows.decode

        def counted(rows: DecodeRows, n: int, longest: int):
            self.row_steps += max(n, dispatch.FEW_ROWS) * rows.window
            return decode(rows, n, longest)

        DecodeRows.decode = counted

    def run(self) -> dict:
        """Samples by digest, and what it took: over all ranks where there are several."""
        requests, self.num_runs = requests_of(*self.asked, self.num_runs), self.num_runs + 1
        self.ranks.barrier()
        self.row_steps, prefilled, handed_over = 0, self.generator.num_prefill_tokens, self.generator.dispatched["handed_over"]
        start = time.perf_counter()
        work = dispatch.Dispatch(self.generator, requests, self.sampling, self.ranks)
        own = [(f"{i}/{member}", digest(completion), len(completion.token_ids)) for i, member, completion in work]
        busy = self.row_steps + dispatch.PREFILL_COST * (self.generator.num_prefill_tokens - prefilled)
        own, facts = self.ranks.concatenate(own)[0], self.ranks.concatenate([(busy, self.generator.dispatched["handed_over"] - handed_over)])[0]
        seconds = time.perf_counter() - start
        work.clear()
        steps = [steps for steps, _ in facts]
        return {
            "samples": {name: found for name, found, _ in own}, "tokens": sum(n for *_, n in own), "seconds": seconds,
            "slowest_row_steps": max(steps), "mean_row_steps": sum(steps) / len(steps), "handed_over": sum(given for _, given in facts),
        }  # fmt: skip


class RankedRollout:
    """The processes of one contender."""

    def __init__(self, device: str, **arguments):
        self.arguments, world = arguments, arguments["ranks"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(Path(__file__).resolve()), json.dumps(arguments)]
        self.workers = [subprocess.Popen(command, env=environment | {"RANK": str(r)}, **pipes) for r in range(world)]

    def __del__(self):
        for worker in self.workers:
            worker.stdin.close()  # which ends it
            worker.wait(60)

    def _all(self) -> dict:
        for worker in self.workers:
            worker.stdin.write("run\n")
            worker.stdin.flush()
        return json.loads([worker.stdout.readline() for worker in self.workers][0])

    def check(self) -> Verdict:
        alone = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), json.dumps(self.arguments)], input="run\n", text=True, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}, check=True,
        )  # fmt: skip
        equal = json.loads(alone.stdout)["samples"] == self._all()["samples"]
        return Verdict(None if equal else "samples differ from those of one process")

    def run(self) -> dict[str, float]:
        found = self._all()
        del found["samples"]
        return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    rollout = Rollout(**json.loads(sys.argv[1]))
    for _ in sys.stdin:
        print(json.dumps(rollout.run()), flush=True)

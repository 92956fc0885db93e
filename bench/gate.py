"""The correctness gate: no speed without a result that errs no more than twice plain PyTorch's own error against fp64, plus a few ulp.

The oracle is the case's eager function in fp64 on the same rounded inputs, on the device at hand.  Where fp64 at full size would not fit, the rule
is applied to the case's smaller `gate` instead (or, on a GPU, to the CPU-sized case of the same operation), and the full size is checked
for finite values and, where the case names independent `rows`, on a random sample of rows by the same rule.  While a backend runs, memory that
torch hands out uninitialised holds NaN, so that an element nobody wrote shows.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

CPU_ORACLE_BYTES = 2 << 30  # fp64 temporaries that the gate may take on a CPU; on a GPU 80 % of what is free
TEMPORARIES = 8  # fp64 tensors of the largest size that eager forward and backward hold at once; logprob's, which needs most, has seven
SAMPLED_ROWS = 64


@dataclass
class Verdict:
    """What the gate found: `wrong` is None or the reason; `errors` hold [largest error, allowed error] of each output against fp64."""

    wrong: str | None = None
    errors: list[list[float]] = field(default_factory=list)
    finite: bool = True  # False: NaN, infinity, or the wrong shape; the error says nothing then


def inputs_of(case, device: str) -> dict:
    """The case's inputs in its dtype, made on the device: 1e9 random numbers take the GPU milliseconds and one CPU thread ten seconds."""
    with torch.device(device):
        made = case.make(torch.Generator(device).manual_seed(0))
    return {k: v.to(torch.float32 if k in case.fp32 else case.dtype) if v.is_floating_point() else v for k, v in made.items()}


def in_fp64(inputs: dict) -> dict:
    """The same rounded numbers, for the oracle."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill whatever torch.empty and its relatives return with NaN (the largest integer for integers) inside the block."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it also asks for deterministic algorithms, and warns where there is none
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


def compare(got: tuple, plain: tuple, oracle: tuple, slack: float | tuple[float, ...]) -> Verdict:
    """The rule, output by output; an output that is None in `got` was not computed and is passed over."""
    verdict = Verdict()
    if len(got) != len(oracle):
        return Verdict(f"{len(got)} outputs; wanted {len(oracle)}", finite=False)
    for i, (a, b, c) in enumerate(zip(got, plain, oracle, strict=True)):
        if a is None:
            continue
        if a.shape != c.shape:
            return Verdict(f"output {i}: shape {tuple(a.shape)}; wanted {tuple(c.shape)}", finite=False)
        if not a.is_floating_point():
            if not torch.equal(a, c.to(a.dtype)):
                verdict.wrong = verdict.wrong or f"output {i}: {int((a != c).sum())} of {a.numel()} integers differ"
            continue
        if not torch.isfinite(a).all():
            return Verdict(f"output {i}: {int((~torch.isfinite(a)).sum())} of {a.numel()} values are not finite", finite=False)
        if a.numel() == 0:
            continue
        c = c.double()
        error, rivals = (a.double() - c).abs().max().item(), (b.double() - c).abs().max().item()
        ulps = slack[i] if isinstance(slack, tuple) else slack
        allowed = 2 * rivals + ulps * torch.finfo(a.dtype).eps * c.abs().max().item()
        verdict.errors.append([error, allowed])
        if not error <= allowed:
            verdict.wrong = verdict.wrong or f"output {i}: error {error:.3e}, allowed {allowed:.3e}"
    if all(x is None for x in got):
        return Verdict("none of the outputs is given, so nothing was compared", finite=False)
    return verdict


def oracle_bytes(case, inputs: dict) -> int:
    """Upper guess of what eager forward and backward take in fp64; T x V counts as a tensor where both are sizes, because logits are no input."""
    largest = max([*(x.numel() for x in inputs.values()), case.sizes.get("T", 1) * case.sizes.get("V", 1)])
    return 8 * TEMPORARIES * largest


def affordable(case, inputs: dict, device: str) -> bool:
    budget = 0.8 * torch.cuda.mem_get_info()[0] if device == "cuda" else CPU_ORACLE_BYTES
    return oracle_bytes(case, inputs) <= budget


class Gate:
    """The oracle of one case, computed once, held against any number of contenders."""

    def __init__(self, case, device: str, counterpart=None):
        """counterpart: () -> a case of the same operation at a smaller size, or None; asked only when it is needed."""
        self.case, self.device = case, device
        self.inputs = inputs_of(case, device)
        self.small = None
        if not affordable(case, self.inputs, device):
            small = case.gate or (counterpart() if counterpart else None)
            if small is None:
                raise ValueError(f"{case.op} {case.sizes}: the fp64 oracle does not fit and the case names no smaller `gate`")
            self.small = Gate(replace(small, dtype=case.dtype), device)
            self.sample()
            return
        self.plain = self.compared(case.eager(**self.inputs), self.inputs)
        self.oracle = self.compared(case.eager(**in_fp64(self.inputs)), in_fp64(self.inputs))

    def sample(self) -> None:
        """The oracle of a few rows of the full size: first, last, and random ones between."""
        self.chosen = None
        if not self.case.rows:
            return
        count = self.inputs[self.case.rows[0]].shape[0]
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: SAMPLED_ROWS - 2]
        self.chosen = torch.cat([torch.tensor([0, count - 1]), drawn]).unique().to(self.device)
        part = {k: v[self.chosen] if k in self.case.rows else v for k, v in self.inputs.items()}
        self.plain = self.case.eager(**part)
        self.oracle = self.case.eager(**in_fp64(part))

    @property
    def scope(self) -> str:
        """What a green verdict covers, for the row."""
        if self.small is None:
            return "fp64 at this size"
        sizes = " ".join(f"{k}={v}" for k, v in self.small.case.sizes.items())
        return f"fp64 at {sizes}; here finite" + ("" if self.chosen is None else f" and {len(self.chosen)} rows in fp64")

    def compared(self, outputs: tuple, inputs: dict) -> tuple:
        return self.case.compared(outputs, **inputs) if self.case.compared else outputs

    def call(self, function: Callable[..., tuple]) -> tuple:
        copies = {k: v.clone() for k, v in self.inputs.items()}  # some peers work in place
        with poisoned():
            return function(**copies)

    def check(self, function: Callable[..., tuple]) -> Verdict:
        """function: (**inputs) -> outputs, in the case's dtype."""
        if self.small is None:
            got = self.compared(self.call(function), self.inputs)
            return compare(got, self.plain, self.oracle, self.case.slack)
        verdict = self.small.check(function)
        if verdict.wrong:
            return verdict
        got = self.call(function)
        for i, x in enumerate(got):
            if x is not None and x.is_floating_point() and not torch.isfinite(x).all():
                return Verdict(f"output {i} at full size: not finite", finite=False)
        if self.chosen is None:
            return verdict
        count = self.inputs[self.case.rows[0]].shape[0]
        by_row = [x is not None and x.ndim > 0 and x.shape[0] == count and y.shape[0] == len(self.chosen)
                  for x, y in zip(got, self.oracle, strict=True)]  # fmt: skip
        if not any(by_row):
            return verdict
        rows = compare(*(tuple(x for x, keep in zip(values, by_row, strict=True) if keep)
                         for values in ([x[self.chosen] if keep else x for x, keep in zip(got, by_row, strict=True)], self.plain, self.oracle)),
                       self.case.slack)  # fmt: skip
        return rows if rows.wrong else verdict

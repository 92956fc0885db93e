"""Whether FP8 experts change the loss of a training run: pairs of runs from `fp8_numerics --documents language`, several seeds.

    OMP_NUM_THREADS=1 python bench/fp8_numerics.py --documents language --seed 0 1 2 3 4 5 --json FILE
    python bench/fp8_loss.py FILE [--plot PNG]

A pair is two runs of one seed: the same first weights, the same documents in the same order, all in FP8 experts or none; its figure is the relative
difference of the held-out loss, d = loss / loss without FP8 - 1.  Over the seeds: the mean of d, its standard error, and the 95 % interval by
Student's t.  `disturbed`, two runs without FP8 that begin 1e-6 apart, is the control.

Settled before the runs: the loss is within 0.25 % where the whole interval is, and the experiment can tell where the control's interval is within
0.25 %, too.  Expected: control below 0.05 %, dgrad 0 to 0.1 %, wgrad 0 to 0.15 %.

A file of `--documents falling` holds several runs (draws) of each kind for each seed, and the question is whether FP8 moves a fall more than noise of
its size does:

    OMP_NUM_THREADS=1 python bench/fp8_numerics.py --documents falling --lr 3e-3 --draws 4 --seed 0 1 2 3 --modes off noise dgrad --json FILE
    OMP_NUM_THREADS=1 python bench/fp8_numerics.py --documents falling --lr 3e-3 --draws 4 --seed 0 1 2 3 --modes noise_wgrad wgrad --json FILE

Kinds: `off` (no FP8), `noise` and `noise_wgrad` (errors of FP8's size with random signs, fp8_products.py), `dgrad` and `wgrad` (FP8).  Draw n of
every kind begins from the same weights, 2^-9 apart from those of another draw.  Figures: the held-out loss relative to the mean of its seed's `off`,
and the step of the fall, where the mean loss of ten steps first passes half way from that of steps 51 to 100 to that of the last 50, both of the
seed's `off` runs.  Settled before the runs:

- The difference of two kinds is the mean over seeds of the difference of their means.  Its standard error is the larger of two: from the spread of
  the draws within seeds, and from the spread of that difference between seeds.  (FP8's draws alone would not do: they share the roundings of one
  trajectory as long as they stay together.)
- FP8 has a bias on falls if dgrad - noise or wgrad - noise_wgrad is beyond two standard errors in either figure, and is again, to the same side, in
  as many fresh seeds: of four tests one passes two standard errors by luck in six.
- Noise moves the fall as FP8 does if noise - off and dgrad - off (noise_wgrad, wgrad) have spreads between draws of one size: the ratio of standard
  deviations within a factor of 2.
- That the difference is below 0.25 % of the loss can be said only if two standard errors are.
- Seeds 0 to 3 and on, four draws, as many whole seeds as the machine's time allows, in order; nothing is looked at before.
"""

import argparse
import json
import math
from pathlib import Path

LIMIT = 0.0025
# Student's t at 97.5 % for n - 1 = 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
MODES = ("disturbed", "dgrad", "wgrad")
PIECE = 10  # steps for each number of a curve, as fp8_numerics writes them
KINDS = ("off", "noise", "dgrad", "noise_wgrad", "wgrad")
PAIRS = (("noise", "off"), ("dgrad", "off"), ("dgrad", "noise"), ("noise_wgrad", "off"), ("wgrad", "off"), ("wgrad", "noise_wgrad"))


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, standard error, and half of the 95 % interval."""
    n = len(values)
    if not 2 <= n <= len(STUDENT) + 1:
        raise ValueError(f"interval: {n} values, wanted 2 to {len(STUDENT) + 1}")
    mean = math.fsum(values) / n
    error = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, error, STUDENT[n - 2] * error


def summary(rows: list[dict]) -> dict[str, dict]:
    """By mode and figure: the relative differences to the run without FP8 of the same seed, and what they say."""
    runs, found = {(row["mode"], row["seed"]): row for row in rows}, {}
    for mode in MODES:
        seeds = sorted(seed for one, seed in runs if one == mode)
        for figure in ("held_out", "last_steps"):
            values = [runs[mode, seed][figure] / runs["off", seed][figure] - 1 for seed in seeds]
            mean, error, half = interval(values)
            found[f"{mode}, {figure}"] = {"values": values, "mean": mean, "error": error, "half": half, "within": abs(mean) + half < LIMIT}
    return found


def variance(values: list[float]) -> float:
    """Of one value, estimated from several."""
    mean = math.fsum(values) / len(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)


def figures_of_falls(rows: list[dict]) -> dict[tuple[str, int], dict[str, list[float]]]:
    """By kind and seed, over the draws: the held-out loss relative to the mean of the seed's runs without FP8, and the step of the fall."""
    runs, found = {}, {}
    for row in sorted(rows, key=lambda row: row["draw"]):
        runs.setdefault((row["mode"], row["seed"]), []).append(row)
    for (kind, seed), some in runs.items():
        plain = runs["off", seed]
        loss = math.fsum(row["held_out"] for row in plain) / len(plain)
        curve = [sum(piece) / len(piece) for piece in zip(*(row["curve"] for row in plain), strict=True)]
        before, after = curve[50 // PIECE : 100 // PIECE], curve[-50 // PIECE :]
        level = (sum(before) / len(before) + sum(after) / len(after)) / 2
        steps = [next((i for i, value in enumerate(row["curve"]) if value < level), len(curve)) * PIECE + PIECE for row in some]
        found[kind, seed] = {"held_out": [row["held_out"] / loss - 1 for row in some], "step": steps}
    return found


def compare(figures: dict, kind: str, other: str, figure: str) -> dict:
    """The difference of two kinds over the seeds, with the larger of the standard errors within seeds and between them."""
    seeds = [seed for one, seed in figures if one == kind and (other, seed) in figures]
    if len(seeds) < 2:
        raise ValueError(f"compare: {len(seeds)} seeds of {kind} and {other}, wanted at least 2")
    pairs = [(figures[kind, seed][figure], figures[other, seed][figure]) for seed in seeds]
    by_seed = [sum(a) / len(a) - sum(b) / len(b) for a, b in pairs]
    within = math.sqrt(math.fsum(variance(a) / len(a) + variance(b) / len(b) for a, b in pairs)) / len(seeds)
    difference, error = math.fsum(by_seed) / len(seeds), max(within, math.sqrt(variance(by_seed) / len(seeds)))
    return {"by_seed": by_seed, "difference": difference, "error": error, "beyond": abs(difference) > 2 * error}


def spread(figures: dict, kind: str, figure: str) -> float:
    """Standard deviation between the draws of a seed, over all seeds."""
    some = [variance(values[figure]) for (one, _), values in figures.items() if one == kind]
    return math.sqrt(math.fsum(some) / len(some))


def report_falls(rows: list[dict]) -> None:
    figures, run = figures_of_falls(rows), {row["mode"] for row in rows}
    for figure, form in (("held_out", "{:+.3%}"), ("step", "{:+.1f}")):
        print({"held_out": "held-out loss, relative", "step": "step of the fall"}[figure])
        for kind in filter(run.__contains__, KINDS):
            values = "  ".join(f"seed {seed}: " + " ".join((form if figure == "held_out" else "{:.0f}").format(v) for v in one[figure])
                               for (other, seed), one in sorted(figures.items()) if other == kind)  # fmt: skip
            print(f"  {kind:12} spread {form.format(spread(figures, kind, figure))[1:]:>7}   {values}")
        for kind, other in (pair for pair in PAIRS if run.issuperset(pair)):
            one = compare(figures, kind, other, figure)
            print(f"  {kind} - {other}: {form.format(one['difference'])}, two standard errors {form.format(2 * one['error'])[1:]}, "
                  f"{'BEYOND' if one['beyond'] else 'not beyond'} them   {' '.join(map(form.format, one['by_seed']))}")  # fmt: skip


def plot_falls(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures, seeds = figures_of_falls(rows), sorted({row["seed"] for row in rows})
    kinds = [kind for kind in KINDS if any(row["mode"] == kind for row in rows)]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for row in rows:
        if row["seed"] == seeds[0]:
            steps = [PIECE * (i + 1) for i in range(len(row["curve"]))]
            left.plot(steps, row["curve"], color=f"C{kinds.index(row['mode'])}", linewidth=0.7, label=row["mode"] if row["draw"] == 0 else None)
    left.set(xlabel="step", ylabel="training loss, nats", title=f"all runs of seed {seeds[0]}")
    left.legend(fontsize=7)
    right.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.92")
    for (kind, seed), one in figures.items():
        at = kinds.index(kind) + 0.16 * (seeds.index(seed) - (len(seeds) - 1) / 2)
        right.plot([at] * len(one["held_out"]), [100 * v for v in one["held_out"]], ".", color=f"C{kinds.index(kind)}", alpha=0.7)
    right.set_xticks(range(len(kinds)), kinds, fontsize=8)
    right.set(ylabel="held-out loss relative to off, %", title=f"{len(seeds)} seeds side by side")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def plot(rows: list[dict], found: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    axis.axhspan(-100 * LIMIT, 100 * LIMIT, color="0.92", label="0.25 %")
    axis.axhline(0, color="0.6", linewidth=0.8)
    labels = []
    for at, mode in enumerate(MODES):
        for shift, kind, color in ((-0.15, "held_out", "tab:blue"), (0.15, "last_steps", "tab:orange")):
            one = found[f"{mode}, {kind}"]
            axis.plot([at + shift] * len(one["values"]), [100 * v for v in one["values"]], ".", color=color, alpha=0.5)
            name = {"held_out": "held out", "last_steps": "last 50 steps"}[kind] + ", mean and 95 %" if at == 0 else None
            axis.errorbar(at + shift + 0.07, 100 * one["mean"], 100 * one["half"], fmt="_", color=color, capsize=4, label=name)
        labels.append({"disturbed": "control: no FP8,\n1e-6 apart"}.get(mode, f"FP8, {mode}"))
    axis.set_xticks(range(len(MODES)), labels)
    axis.set_ylabel("loss relative to no FP8, %")
    axis.set_title(f"pairs of runs of {rows[0]['steps']} steps, one for each seed", fontsize=10)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("rows", type=Path, metavar="FILE", help="JSON lines of fp8_numerics")
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the pairs")
    arguments = p.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    if any(row["documents"] == "falling" for row in rows):
        report_falls(rows)
        return plot_falls(rows, arguments.plot) if arguments.plot else None
    found = summary(rows)
    for name, one in found.items():
        values = " ".join(f"{v:+.3%}" for v in one["values"])
        print(f"{name:22} {one['mean']:+.3%}  standard error {one['error']:.3%}  95 % within {one['half']:.3%}  "
              f"{'inside' if one['within'] else 'NOT inside'} {LIMIT:.2%}   {values}")  # fmt: skip
    if arguments.plot:
        plot(rows, found, arguments.plot)


if __name__ == "__main__":
    main()

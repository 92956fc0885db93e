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

    OMP_NUM_THREADS=1 python bench/fp8_numerics.py --documents falling --lr 3e-3 --draws 4 --seed 0 1 2 3 \
        --modes noise dgrad noise_wgrad wgrad --json FILE

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
- Seeds 0 to 3, four draws, as many whole seeds as the machine's time allows, in order; nothing is looked at before.
"""

import argparse
import json
import math
from pathlib import Path

LIMIT = 0.0025
# Student's t at 97.5 % for n - 1 = 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)
MODES = ("disturbed", "dgrad", "wgrad")


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
    found = summary(rows)
    for name, one in found.items():
        values = " ".join(f"{v:+.3%}" for v in one["values"])
        print(f"{name:22} {one['mean']:+.3%}  standard error {one['error']:.3%}  95 % within {one['half']:.3%}  "
              f"{'inside' if one['within'] else 'NOT inside'} {LIMIT:.2%}   {values}")  # fmt: skip
    if arguments.plot:
        plot(rows, found, arguments.plot)


if __name__ == "__main__":
    main()

"""A picture of a run: the roofline, and every row's share of the machine's ceiling."""

from pathlib import Path


def roofline(rows: list[dict], ceiling: dict, title: str, path: Path) -> None:
    """Draw timed rows to a PNG: left those with bytes and flops over arithmetic intensity, right all as percent of the ceiling that binds them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    timed = [row for row in rows if "median_us" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, max(5, 0.22 * len(timed) + 2)), layout="constrained")
    figure.suptitle(title)
    copy, matmul = ceiling["copy_gb_s"] / 1e3, ceiling["matmul_tflop_s"]  # TB/s, TFLOP/s
    ridge = matmul / copy
    spread = [ridge / 1000, ridge, ridge * 1000]
    left.loglog(spread, [min(matmul, copy * x) for x in spread], "k-", label=f"copy {1e3 * copy:.3g} GB/s, matmul {matmul:.3g} TFLOP/s")
    if "fp8_tflop_s" in ceiling:
        left.axhline(ceiling["fp8_tflop_s"], color="k", linestyle=":", label=f"fp8 matmul {ceiling['fp8_tflop_s']:.3g} TFLOP/s")
    marks = {}
    for row in timed:
        if row["bytes"] and row["flops"]:
            key = f"{row['op']} {row['backend']}"
            marker = marks.setdefault(key, "osD^vP*X<>hp"[len(marks) % 12])
            left.loglog(row["flops"] / row["bytes"], row["tflop_s"], marker, label=key)
    left.set(xlabel="flop / byte that the operation cannot avoid", ylabel="TFLOP/s", title="Roofline (cases that declare bytes and flops)")
    left.legend(fontsize="small")
    names = [f"{row['op']} {' '.join(f'{k}={v}' for k, v in row['sizes'].items())} {row['backend']}" for row in timed]
    right.barh(range(len(timed)), [row["percent_of_ceiling"] for row in timed])
    right.set_yticks(range(len(timed)), names, fontsize="x-small")
    right.invert_yaxis()
    right.axvline(100, color="k", linewidth=0.8)
    right.set(xlabel="% of the ceiling measured in the same run (copy or matmul, whichever binds)")
    figure.savefig(path, dpi=110)
    plt.close(figure)

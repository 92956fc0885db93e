"""Curves as SVG that lives inside a page: its colours are the page's CSS variables (light and dark), its text is the page's font.

matplotlib draws with marker colours which are then replaced: the ink by currentColor, the grid by --grid, series i by --series-i.
"""

import io
import math
import re
from dataclasses import dataclass

NUM_SERIES = 6
INK, GRID = "#0a0b0c", "#0d0e0f"
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 2)), (0, (8, 2)))


@dataclass(frozen=True)
class Series:
    """One line of a chart.  Values that are None are gaps."""

    name: str
    steps: list[float]
    values: list[float | None]
    slot: int  # which colour and dash


def line_chart(series: list[Series], *, label: str, log_scale: bool = False, percent: bool = False, key: str = "chart") -> str:
    """Draw lines over steps and return an <svg> element for inlining.

    label: what a screen reader says.  key: makes the ids inside differ from those of the page's other charts.
    Each line is drawn thin, with its running mean over a tenth of its points on top.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

    positive = [value for value in _finite_values(series) if value > 0]
    log_scale = log_scale and bool(positive)  # a gap that is zero throughout is a line at zero
    settings = {"svg.fonttype": "none", "svg.hashsalt": key, "text.parse_math": False, "font.size": 9, "axes.unicode_minus": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(3.9, 2.35))
        axes = figure.add_axes((0.125, 0.125, 0.855, 0.83))
        for line in series:
            values = [math.nan if value is None or (log_scale and value <= 0) else float(value) for value in line.values]
            color = f"#0000{16 + line.slot % NUM_SERIES:02x}"
            mean = running_mean(values, max(1, len(values) // 10))
            if len(values) > 20:
                axes.plot(line.steps, values, color=color, linewidth=0.7, alpha=0.35)
            marker = "o" if len(values) == 1 else None
            axes.plot(line.steps, mean, color=color, linewidth=1.7, linestyle=DASHES[line.slot % NUM_SERIES], marker=marker, markersize=4)
        if log_scale:
            axes.set_yscale("log")
            axes.set_ylim(10 ** math.floor(math.log10(min(positive))), 10 ** (math.floor(math.log10(max(positive))) + 1))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-"))  # the default one needs math text
            axes.yaxis.set_minor_formatter(NullFormatter())
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.set_ylim(-0.02, max(0.1, min(1.02, 1.08 * max(_finite_values(series), default=1.0))))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if not log_scale:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(True, axis="y", color=GRID, linewidth=0.8)
        axes.tick_params(which="both", colors=INK, length=0, pad=5)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_inlining(text.getvalue(), label)


def running_mean(values: list[float], width: int) -> list[float]:
    """Centred mean over up to `width` neighbours; NaN is left out, and stays where there is nothing else."""
    result = []
    for index, value in enumerate(values):
        near = [v for v in values[max(0, index - width // 2) : index + (width + 1) // 2] if not math.isnan(v)]
        result.append(math.nan if math.isnan(value) or not near else sum(near) / len(near))
    return result


def _finite_values(series: list[Series]) -> list[float]:
    return [value for line in series for value in line.values if value is not None and math.isfinite(value)]


def _for_inlining(svg: str, label: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.S)
    used = set(re.findall(r"""(?:url\(#|href="#)([^")]+)""", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for slot in range(NUM_SERIES):
        svg = svg.replace(f"#0000{16 + slot:02x}", f"var(--series-{slot})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font); fill: currentColor", svg)
    view_box = re.search(r'viewBox="([^"]*)"', svg)[1]
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r"<svg[^>]*>", lambda _: f'<svg viewBox="{view_box}" role="img" aria-label="{label}">', svg, count=1)

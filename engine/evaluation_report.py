"""Tables of an evaluation folder: OUT/results.json, results.csv and results.html, from the metrics.json of every task that lies in it.

A task's table has one row measured here and, where the R1 report has the benchmark, its rows (published.py) below.
"""

import csv
import io
import json
from pathlib import Path

from athanor.atomic import read_json, write_file
from athanor.console import format_figure
from athanor.published import SOURCE, published_rows

METRICS_NAME = "metrics.json"
TEMPLATE = Path(__file__).parent / "evaluation.html.j2"
FIELDS = ("task", "model", "source", "num_problems", "k", "metric", "value", "standard_error")


def write_results(out: Path) -> Path:
    """Write the three files; return the path of results.html."""
    tables = [_table(read_json(path, "eval")) for path in sorted(out.glob(f"*/{METRICS_NAME}"))]
    write_file(out / "results.json", json.dumps({"tasks": tables}, indent=2, ensure_ascii=False) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        writer.writerows(_long_rows(table))
    write_file(out / "results.csv", text.getvalue())
    write_file(out / "results.html", _page(out, tables))
    return out / "results.html"


def _table(row: dict) -> dict:
    """One task: what was measured, its protocol, and the report's rows."""
    settings = row["settings"]
    return {
        "task": row["task"], "model": settings["model"], "num_problems": row["metrics"]["num_problems"], "k": settings["k"], "settings": settings,
        "metrics": row["metrics"], "breakdowns": row["breakdowns"], "published": published_rows(row["kind"]), "published_source": SOURCE,
    }  # fmt: skip


def _long_rows(table: dict) -> list[dict]:
    """One line per model and metric."""
    start = {"task": table["task"], "model": table["model"], "source": "measured", "num_problems": table["num_problems"], "k": table["k"]}
    metrics = table["metrics"]
    rows = [
        start | {"metric": name, "value": value, "standard_error": metrics.get(f"{name}_se")}
        for name, value in metrics.items()
        if not name.endswith("_se")
    ]
    for row in table["published"]:
        for name in ("pass@1", "cons@64", "rating"):
            if name in row:
                rows.append({"task": table["task"], "model": row["model"], "source": SOURCE, "metric": name, "value": row[name]})
    return rows


def _page(out: Path, tables: list[dict]) -> str:
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": format_figure, "rate": _rate}
    shown = [table | {"columns": _columns(table), "others": _others(table["metrics"])} for table in tables]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(name=out.name, tables=shown, source=SOURCE)


def _columns(table: dict) -> list[str]:
    """Columns of a task's table: the rates over problems, and the rating."""
    names = [name for name in table["metrics"] if name.startswith(("pass@", "cons@")) and not name.endswith("_se")]
    names += [name for row in table["published"] for name in row if name == "cons@64"]
    return [*dict.fromkeys(names), *(["rating"] if "rating" in table["metrics"] else [])]


def _others(metrics: dict) -> dict:
    skipped = ("pass@", "cons@", "rating", "num_")
    return {name.replace("_", " "): value for name, value in metrics.items() if not name.startswith(skipped) and not name.endswith("_se")}


def _rate(value) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

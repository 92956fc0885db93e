"""Progress for people, on stderr: a live line per stage on a terminal, a plain line every few seconds in a log file, nothing on other ranks.

stdout is left to the one JSON line at the end of a run.
"""

import contextlib
import sys
import time

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from athanor.metrics import rank_from_environment

LABELS = {"mean_tokens": "length", "reflection_rate": "reflection", "logp_gap_max": "logp gap", "tokens_per_s": "tokens/s",
          "rollout_idle_share": "idle"}  # of a step's figures
TABLE_COLUMNS = ("pass@1", "pass@1_t1", "cons@16", "mean_tokens", "reflection_rate", "format_rate", "language_consistency", "wall_s")


def format_duration(seconds: float) -> str:
    """Seconds for people: 8.3 s, 2:05, 1:02:05."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(round(seconds)), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_figure(value) -> str:
    """A figure in four characters or so: 0.53, 47.6, 1.2e-05, 12800; a dash for what is not there."""
    if value is None or value != value:
        return "-"
    if isinstance(value, int) or abs(value) >= 10000:
        return f"{value:.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


class Console:
    """Everything that a run tells the person who started it.  `num_stages` counts the stages; `every_s` spaces the plain lines."""

    def __init__(self, num_stages: int = 1, *, rank: int | None = None, every_s: float = 10.0, file=None):
        self._quiet = (rank_from_environment() if rank is None else rank) != 0
        self._rich = RichConsole(file=file or sys.stderr, quiet=self._quiet, highlight=False, soft_wrap=True)
        self._num_stages = num_stages
        self._every_s = every_s
        self._seen: dict[str, int] = {}  # stage -> its number
        self._warned: set[str] = set()

    def note(self, text: str) -> None:
        """One line of information."""
        self._rich.print(escape(text))

    def warn(self, text: str) -> None:
        """One line that the user should not miss, once however often it comes up."""
        if text in self._warned:
            return
        self._warned.add(text)
        self._rich.print(f"[yellow]warning:[/yellow] {escape(text)}")

    def skip(self, stage: str, reason: str) -> None:
        """Say that a stage needs no work (it is done already, or another run lent it)."""
        self._rich.print(f"[dim]{escape(self._label(stage))}  {escape(reason)}[/dim]")

    @contextlib.contextmanager
    def stage(self, name: str, total_steps: int, *, first_step: int = 0):
        """Show one stage while the block runs; yields an object whose `step(done, figures)` is called after every step.

        total_steps: of the whole stage; 0 = not known.  first_step: steps that a resumed stage has behind it, for rate and time left.
        """
        progress = _StageProgress(self._rich, self._label(name), total_steps, first_step, self._every_s)
        try:
            with progress:
                yield progress
        except BaseException:
            self._rich.print(f"[red]{escape(self._label(name))}  stopped at step {progress.done} after {format_duration(progress.seconds)}[/red]")
            raise
        self._rich.print(f"[green]{escape(self._label(name))}[/green]  done in {format_duration(progress.seconds)}{progress.last_figures}")

    def table(self, stages: dict[str, dict], columns: tuple[str, ...] = TABLE_COLUMNS) -> None:
        """The final table: one row per stage, the columns that at least one stage has."""
        shown = [column for column in columns if any(metrics.get(column) is not None for metrics in stages.values())]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("stage")
        for column in shown:
            table.add_column(column, justify="right")
        for name, metrics in stages.items():
            table.add_row(escape(name), *(_format_cell(column, metrics.get(column)) for column in shown))
        self._rich.print(table, soft_wrap=False)

    def _label(self, stage: str) -> str:
        number = self._seen.setdefault(stage, len(self._seen) + 1)  # a stage may show several rounds of work under one number
        return f"[{number}/{max(self._num_stages, number)}] {stage}"


class _StageProgress:
    def __init__(self, rich: RichConsole, label: str, total_steps: int, first_step: int, every_s: float):
        self._rich, self._label, self._total, self._first, self._every_s = rich, label, total_steps, first_step, every_s
        self.done = first_step
        self.last_figures = ""
        self._start = self._last_line = time.perf_counter()
        self._bar = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def __enter__(self):
        if self._rich.is_terminal and not self._rich.quiet:
            columns = (TextColumn("[bold]{task.description}[/bold]"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, console=self._rich, transient=True, refresh_per_second=4)
            self._task = self._bar.add_task(escape(self._label), total=self._total or None, completed=self._first, text="")
            self._bar.start()
        return self

    def __exit__(self, *_):
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, figures: dict | None = None) -> None:
        """Tell that `done` steps of the stage are behind us, with up to seven figures to show."""
        self.done = done
        shown = list((figures or {}).items())[:7]
        self.last_figures = "".join(f"  {LABELS.get(name, name)} {format_figure(value)}" for name, value in shown)
        now = time.perf_counter()
        text = self._describe(now) + self.last_figures
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=escape(text))
        elif done == self._first + 1 or done == self._total or now - self._last_line >= self._every_s:
            self._last_line = now
            self._rich.print(escape(f"{self._label}  {text}"))

    def _describe(self, now: float) -> str:
        steps = f"step {self.done}/{self._total}" if self._total else f"step {self.done}"
        ran = self.done - self._first
        if ran <= 0:
            return steps
        seconds_per_step = (now - self._start) / ran
        rate = f"{seconds_per_step:.2f} s/step" if seconds_per_step >= 0.1 else f"{1 / max(seconds_per_step, 1e-9):.0f} steps/s"
        left = f"  {format_duration((self._total - self.done) * seconds_per_step)} left" if self._total > self.done else ""
        return f"{steps}  {rate}{left}"


def _format_cell(column: str, value) -> str:
    return format_duration(value) if column == "wall_s" and value is not None else format_figure(value)

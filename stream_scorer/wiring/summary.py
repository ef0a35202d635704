"""The demo in a terminal: one live table on a screen, one line every five seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from stream_scorer.wiring.processes import Child

LINE_EVERY_S = 5.0


class Summary:
    """Shows the children's last status lines; call `tick` often."""

    def __init__(self, live: bool, duration_s: float, heading: str, children: Mapping[str, Child]) -> None:
        """``live`` draws a table when standard error is a terminal; ``duration_s`` 0 means until stopped."""
        self._duration_s = duration_s
        self._heading = heading
        self._children = children
        self._started_s = time.monotonic()
        self._said_s = self._started_s
        self._live = Live(console=Console(stderr=True), auto_refresh=False) if live and sys.stderr.isatty() else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def tick(self) -> None:
        """Redraw, or print the next line when it is time."""
        now_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._table(now_s - self._started_s), refresh=True)
        elif now_s - self._said_s >= LINE_EVERY_S:
            self._said_s = now_s
            typer.echo(self._line(now_s - self._started_s), err=True)

    def _line(self, elapsed_s: float) -> str:
        market, scorer, trainer = (self._children[name].status for name in ("simulator", "scorer", "trainer"))
        loss = (trainer.get("ctr") or {}).get("logloss_last")
        clock = f"{elapsed_s:4.0f} s" + (f" of {self._duration_s:.0f}" if self._duration_s else "")
        return (
            f"{clock}  {market.get('scored', 0)} of {market.get('requests', 0)} scored  "
            f"model v{scorer.get('model_version') or 0}  CTR logloss {_show(loss)}"
        )

    def _table(self, elapsed_s: float) -> Table:
        market, scorer, trainer = (self._children[name].status for name in ("simulator", "scorer", "trainer"))
        latency = market.get("latency_ms") or {}
        table = Table(title=self._heading, caption="Ctrl-C stops", min_width=64)
        for column in ("", "now", ""):
            table.add_column(column, justify="right" if column else "left")
        total = f" of {self._duration_s:.0f}" if self._duration_s else ""
        table.add_row("time", f"{elapsed_s:.0f} s{total}", _bar(elapsed_s, self._duration_s))
        table.add_row("scored", f"{market.get('scored', 0)}", f"of {market.get('requests', 0)} requests")
        table.add_row("candidates/s", _show(market.get("candidates_per_s"), 0), f"{scorer.get('rejected', 0)} rejected")
        table.add_row("latency p50 / p99", f"{_show(latency.get('p50'), 1)} / {_show(latency.get('p99'), 1)} ms", "")
        table.add_row(
            "model version", f"{scorer.get('model_version', '-')}", f"{trainer.get('versions_published', 0)} published"
        )
        for task in ("ctr", "ctcvr"):
            values = trainer.get(task) or {}
            table.add_row(
                f"{task.upper()} logloss",
                _show(values.get("logloss_last")),
                f"first {_show(values.get('logloss_first'))}, AUC {_show(values.get('auc_last'))}",
            )
        table.add_row("CTR AUC to the truth", _show(market.get("truth_auc_ctr")), "")
        return table


def _bar(elapsed_s: float, total_s: float, width: int = 24) -> str:
    if not total_s:
        return ""
    done = min(width, int(width * elapsed_s / total_s))
    return "█" * done + "░" * (width - done)


def _show(value: Any, digits: int = 4) -> str:
    return "-" if not isinstance(value, int | float) else f"{value:.{digits}f}"

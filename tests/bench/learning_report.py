"""What the learning benchmark found, as tables, CSV files and a plot."""

from __future__ import annotations

import csv
import html
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esmm.delay import DEFAULT
from tests.bench.learning_stream import METRICS, TASKS

COLUMNS = ("setting", "method", "seed", "task", *METRICS, "ri_auc", "ri_nll")
VALUES = COLUMNS[4:]
TITLES = {
    "labels": "against eventual labels",
    "truth": "against the truth (each label replaced by its probability)",
}
Rates = dict[str, dict[str, float]]  # setting -> method -> rate
Tried = dict[str, dict[str, dict[float, float]]]  # setting -> method -> rate -> mean log loss on the tuning seeds
Found = dict[tuple[str, float], dict[str, dict[str, dict[str, float]]]]


@dataclass(frozen=True)
class Measured:
    """One world: (method, rate) -> labels or truth -> task -> metric; sync interval -> task -> metric; facts of it."""

    setting: str
    seed: int
    found: Found
    days: dict[str, list[float]]  # method -> predicted over true CTCVR, a value a day
    sync: dict[str, dict[str, dict[str, float]]]
    facts: dict[str, float]


def table(done: list[Measured], kind: str) -> list[dict[str, object]]:
    """A row a setting, method, seed and task."""
    rows = []
    for one in done:
        by = {method: found[kind] for (method, _), found in one.found.items()}
        for method, tasks in by.items():
            for task in TASKS:
                row = {"setting": one.setting, "method": method, "seed": one.seed, "task": task, **tasks[task]}
                for metric in ("auc", "nll"):
                    low, high = by["pretrained"][task][metric], by["oracle"][task][metric]
                    row[f"ri_{metric}"] = relative_improvement(tasks[task][metric], low, high)
                rows.append(row)
    return sorted(rows, key=lambda row: (row["setting"], TASKS.index(row["task"]), row["seed"]))


def relative_improvement(value: float, pretrained: float, oracle: float) -> float:
    """In %: 0 is the frozen model, 100 the oracle; also for metrics of which less is better. nan if those two tie."""
    return 100 * (value - pretrained) / (oracle - pretrained) if oracle != pretrained else math.nan


def write(out: Path, done: list[Measured], tried: Tried) -> None:
    """learning.csv, learning_{truth,sync,days,facts,rates}.csv and learning.svg."""
    for name, kind in (("learning.csv", "labels"), ("learning_truth.csv", "truth")):
        write_csv(out / name, COLUMNS, table(done, kind))
    sync = [
        {"seed": one.seed, "interval": interval, "task": task, **tasks[task]}
        for one in done
        for interval, tasks in one.sync.items()
        for task in TASKS
    ]
    write_csv(out / "learning_sync.csv", ("seed", "interval", "task", *METRICS), sync)
    days = [
        {"setting": one.setting, "method": method, "seed": one.seed, "day": day, "pcoc": pcoc}
        for one in done
        for method, by_day in one.days.items()
        for day, pcoc in enumerate(by_day)
    ]
    write_csv(out / "learning_days.csv", ("setting", "method", "seed", "day", "pcoc"), days)
    facts = [{"setting": one.setting, "seed": one.seed, **one.facts} for one in done]
    write_csv(out / "learning_facts.csv", tuple(facts[0]), facts)
    tuned = [
        {"setting": setting, "method": method, "rate": rate, "nll": nll, "chosen": int(nll == min(losses.values()))}
        for setting, of in tried.items()
        for method, losses in of.items()
        for rate, nll in sorted(losses.items())
    ]
    if tuned:
        write_csv(out / "learning_rates.csv", ("setting", "method", "rate", "nll", "chosen"), tuned)
    (out / "learning.svg").write_text(svg(done))


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def mean_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, nan from a single value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def paired(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Mean and standard error of the differences ours - theirs, seed by seed."""
    return mean_error([mine - other for mine, other in zip(ours, theirs, strict=True)])


def settings_of(done: list[Measured]) -> list[str]:
    return list(dict.fromkeys(sorted((one.setting for one in done), key=("short", "default", "long").index)))


def methods_of(done: list[Measured]) -> list[str]:
    return [method for method, _ in done[0].found]


def text(done: list[Measured], rates: Rates, tried: Tried) -> str:
    """All tables, what the worlds are like, the sync intervals and what the default method is held to."""
    lines: list[str] = []
    for kind, title in TITLES.items():
        rows = table(done, kind)
        for setting in settings_of(done):
            for task in TASKS:
                lines += ["", f"{setting} delays, {task}, {title}: mean and standard error over seeds", _header()]
                for method in methods_of(done):
                    picked = [r for r in rows if (r["setting"], r["task"], r["method"]) == (setting, task, method)]
                    lines.append(_line(method, picked, rates[setting].get(method)))
    parts = (lines, fact_lines(done), edge_lines(tried), short_table(done), sync_lines(done), targets(done))
    return "\n".join(line for part in parts for line in [*part, ""])


def fact_lines(done: list[Measured]) -> list[str]:
    """What there was to find: see `learning_world.facts_of`; and how far CTCVR's PCOC strays from day to day."""
    lines = []
    for setting in settings_of(done):
        of = [one for one in done if one.setting == setting]
        means = {name: float(np.mean([one.facts[name] for one in of])) for name in of[0].facts}
        lines.append(f"{setting}: " + ", ".join(f"{name} {value:.3f}" for name, value in means.items()))
        for method in ("oracle", DEFAULT):
            days = [pcoc for one in of for pcoc in one.days[method]]
            lines.append(f"  {method}: PCOC of a day (truth) from {min(days):.3f} to {max(days):.3f}")
    return lines


def edge_lines(tried: Tried) -> list[str]:
    """Whose best rate is the lowest or highest tried."""
    at_edge = [
        f"{setting} {method}"
        for setting, of in tried.items()
        for method, losses in of.items()
        if min(losses, key=losses.__getitem__) in (min(losses), max(losses))
    ]
    return [f"rate at the edge of those tried: {', '.join(at_edge) or 'none'}"] if tried else []


def short_table(done: list[Measured]) -> list[str]:
    """Markdown for the README: CTCVR on the default setting against eventual labels."""
    rows = [row for row in table(done, "labels") if (row["setting"], row["task"]) == ("default", "ctcvr")]
    if not rows:
        return []
    lines = [
        "| method | AUC | log loss | less vanilla-dup's | PCOC | RI-AUC | RI-log loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in methods_of(done):

        def values(name: str, method: str = method) -> list[float]:
            return [float(row[name]) for row in rows if row["method"] == method]

        cells = [
            mean_error(values("auc")),
            mean_error(values("nll")),
            paired(values("nll"), values("nll", "vanilla-dup")),
            *(mean_error(values(name)) for name in ("pcoc", "ri_auc", "ri_nll")),
        ]
        formats = ("{:.4f} ±{:.4f}", "{:.5f} ±{:.5f}", "{:+.5f} ±{:.5f}", "{:.3f} ±{:.3f}", *["{:.1f} ±{:.1f}"] * 2)
        lines.append(f"| {method} | " + " | ".join(f.format(*c) for f, c in zip(formats, cells, strict=True)) + " |")
    return lines


def _header() -> str:
    return f"{'method':<15}{'rate':>5}" + "".join(f"{name:>18}" for name in VALUES)


def _line(method: str, rows: list[dict[str, object]], rate: float | None) -> str:
    cells = []
    for name in VALUES:
        mean, error = mean_error([float(row[name]) for row in rows])
        digits = 1 if name.startswith("ri_") else 5 if name in ("nll", "ece") else 4
        cells.append(f"{mean:.{digits}f} ±{error:.{digits}f}")
    return f"{method:<15}{'-' if rate is None else f'{rate:.3g}':>5}" + "".join(f"{cell:>18}" for cell in cells)


def sync_lines(done: list[Measured]) -> list[str]:
    """How much worse older weights are, on the same impressions."""
    with_sync = [one.sync for one in done if one.sync]
    if not with_sync:
        return []
    lines = [f"{DEFAULT}, one step a minute; how old the served weights may be (truth, paired over seeds)"]
    for task in TASKS:
        for fresh, old in (("minute", "hour"), ("hour", "day")):
            parts = []
            for metric, digits in (("nll", 6), ("auc", 5)):
                now, _ = mean_error([sync[fresh][task][metric] for sync in with_sync])
                mean, error = mean_error([sync[old][task][metric] - sync[fresh][task][metric] for sync in with_sync])
                parts.append(f"{metric} {now:.{digits}f}, {old} {mean:+.{digits}f} ±{error:.{digits}f}")
            lines.append(f"  {task:<6} {fresh}: " + "; ".join(parts))
    return lines


def targets(done: list[Measured]) -> list[str]:
    """What the default method must reach on the default setting."""
    lines = []
    for kind, title in TITLES.items():
        rows = [row for row in table(done, kind) if row["setting"] == "default"]
        if not rows:
            continue

        def values(method: str, task: str, name: str, rows: list = rows) -> list[float]:
            return [float(row[name]) for row in rows if (row["method"], row["task"]) == (method, task)]

        ctcvr, _ = mean_error(values(DEFAULT, "ctcvr", "pcoc"))
        ctr, _ = mean_error(values(DEFAULT, "ctr", "pcoc"))
        auc, _ = mean_error(values(DEFAULT, "ctcvr", "ri_auc"))
        nll, _ = mean_error(values(DEFAULT, "ctcvr", "ri_nll"))
        gap, error = paired(values(DEFAULT, "ctcvr", "nll"), values("vanilla-dup", "ctcvr", "nll"))
        checks = (
            (f"CTCVR PCOC {ctcvr:.4f}, within .03 of 1", abs(ctcvr - 1) <= 0.03),
            (f"CTR PCOC {ctr:.4f}, within .01 of 1", abs(ctr - 1) <= 0.01),
            (f"RI-AUC {auc:.1f} >= 75", auc >= 75),
            (f"RI-NLL {nll:.1f} >= 75", nll >= 75),
            (f"NLL less vanilla-dup's {gap:+.6f} ±{error:.6f}, below by 2 errors", gap < -2 * error),
        )
        lines.append(f"{DEFAULT} on the default setting, {title}:")
        lines += [f"  {'yes' if reached else 'NO '} {what}" for what, reached in checks]
    return lines


LEFT, WIDE, ROW, TOP, LOW, HIGH = 120, 240, 22, 64, -50.0, 110.0
SERIES = (("ri_auc", "RI-AUC", "#1f6fb2", -4), ("ri_nll", "RI-NLL", "#c2571a", 4))


def svg(done: list[Measured]) -> str:
    """A panel a setting, a line a method: relative improvement of CTCVR with two standard errors to each side."""
    rows = [row for row in table(done, "truth") if row["task"] == "ctcvr"]
    settings = settings_of(done)
    methods = [method for method in methods_of(done) if method not in ("pretrained", "oracle")]
    width, height = LEFT + len(settings) * (WIDE + 24) + 8, TOP + ROW * len(methods) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        label(8, 18, "Relative improvement of CTCVR, %: 0 is frozen, 100 knows the future (two standard errors)", 13),
    ]
    for at, (_, title, colour, _) in enumerate(SERIES):
        parts.append(f'<circle cx="{LEFT + at * 80}" cy="34" r="4" fill="{colour}"/>')
        parts.append(label(LEFT + 8 + at * 80, 38, title))
    parts += [label(8, TOP + ROW * i + 15, method) for i, method in enumerate(methods)]
    for at, setting in enumerate(settings):
        left = LEFT + at * (WIDE + 24)
        parts += _panel(left, setting, methods, [row for row in rows if row["setting"] == setting])
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, setting: str, methods: list[str], rows: list[dict[str, object]]) -> list[str]:
    bottom = TOP + ROW * len(methods)
    parts = [label(left, TOP - 8, f"{setting} delays", 12)]
    for tick in (-50, 0, 50, 100):
        x = _x(left, tick)
        parts.append(f'<path d="M{x} {TOP}V{bottom}" stroke="{"#999" if tick in (0, 100) else "#ddd"}"/>')
        parts.append(label(x, bottom + 16, str(tick), anchor="middle"))
    for i, method in enumerate(methods):
        for name, _, colour, shift in SERIES:
            mean, error = mean_error([float(row[name]) for row in rows if row["method"] == method])
            y, error = TOP + ROW * i + 11 + shift, 0.0 if math.isnan(error) else 2 * error
            ends = f"M{_x(left, mean - error)} {y}H{_x(left, mean + error)}"
            parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2"/>')
            if LOW <= mean <= HIGH:
                parts.append(f'<circle cx="{_x(left, mean)}" cy="{y}" r="3.5" fill="{colour}"/>')
            else:  # off the scale: an arrow head and the figure
                edge = _x(left, mean)
                parts.append(label(edge, y + 4, f"◀ {mean:.0f}" if mean < LOW else f"{mean:.0f} ▶", colour=colour))
    return parts


def _x(left: int, value: float) -> float:
    return round(left + (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW) * WIDE, 1)


def label(x: float, y: float, words: str, size: int = 11, anchor: str = "start", colour: str = "#222") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{html.escape(words)}</text>'
    )

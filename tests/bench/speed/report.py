"""Numbers as a table, as ratios and as a picture."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

QUIX, HAND = "Quix + DeepCTR-Torch", "hand-written"


def head(out: dict[str, Any]) -> None:
    versions = " ".join(f"{name} {version}" for name, version in out["versions"].items())
    print(
        f"{out['processor']}, {out['cores']} cores; {' '.join(out['flags'])}\n{out['broker']}; {versions}\n{out['command']}",
        flush=True,
    )


def line(name: str, result: dict[str, Any]) -> None:
    """One run as it ends."""
    notes = "".join(
        f"  {key} {result[key]:.2g}" if isinstance(result[key], float) else f"  {key} {result[key]}"
        for key in ("max_error", "first_half_share", "machine_busy", "cpu_s_per_s")
        if key in result
    )
    print(f"  {name:40}{result['candidates_per_s'] / 1e3:9.0f}{notes}", flush=True)


def _median(contenders: dict[str, Any], name: str) -> float | None:
    return contenders[name]["candidates_per_s"]["median"] if name in contenders else None


def ratios(contenders: dict[str, Any]) -> dict[str, float]:
    """Of medians: ours against one process of Quix and the best hand-written one, and against what its thread can do."""
    out: dict[str, float] = {}
    by_hand = [_median(contenders, name) for name in contenders if name.startswith(HAND)]
    for precision in ("float32", "bfloat16"):
        mine = _median(contenders, f"stream-scorer {precision}")
        best = max(
            (
                v
                for n in (f"stream-scorer {precision}", f"stream-scorer {precision}, 2 workers")
                if (v := _median(contenders, n))
            ),
            default=None,
        )
        limit = _median(contenders, f"predictor alone {precision}")
        products = _median(contenders, f"matrix products {precision}")
        quix, quix2 = _median(contenders, QUIX), _median(contenders, f"{QUIX}, 2 processes")
        pairs = {
            f"{precision} one worker / {QUIX} one process": (mine, quix),
            f"{precision} best / {QUIX} best": (best, max((v for v in (quix, quix2) if v), default=None)),
            f"{precision} one worker / hand-written best": (mine, max(by_hand, default=None)),
            f"{precision} best / hand-written best": (best, max(by_hand, default=None)),
            f"{precision} one worker / predictor alone": (mine, limit),
            f"predictor alone / matrix products, {precision}": (limit, products),
        }
        out |= {name: a / b for name, (a, b) in pairs.items() if a and b}
    return out


def show(out: dict[str, Any]) -> None:
    print(f"\n{'thousand candidates a second':42}{'min':>9}{'median':>9}{'max':>9}")
    for name, value in out["contenders"].items():
        print(
            f"{name:42}" + "".join(f"{value['candidates_per_s'][key] / 1e3:9.0f}" for key in ("min", "median", "max"))
        )
    print()
    for name, value in out["ratios"].items():
        print(f"{name:62}{value:7.2f}")


def svg(out: dict[str, Any]) -> str:
    """Medians as bars on a logarithmic axis would mislead: a linear axis, what is off it is cut and says its number."""
    rows = sorted(out["contenders"].items(), key=lambda pair: pair[1]["candidates_per_s"]["median"])
    shown = [v["candidates_per_s"]["median"] for n, v in rows if not n.startswith(("consume", "matrix", "predictor"))]
    most = 1.1 * max(shown or [v["candidates_per_s"]["median"] for _, v in rows])
    left, width, step = 290, 560, 26
    parts = []
    for at, (name, value) in enumerate(rows):
        rate = value["candidates_per_s"]
        y, cut = 46 + at * step, min(rate["median"], most) / most * width
        colour = (
            "#2563eb"
            if name.startswith("stream-scorer")
            else "#9ca3af"
            if name.startswith(("Quix", "hand"))
            else "#e5e7eb"
        )
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{cut:.1f}" height="18" fill="{colour}"/>')
        if rate["max"] <= most:
            low, high = (left + rate[key] / most * width for key in ("min", "max"))
            parts.append(f'<path d="M{low:.1f} {y + 9}H{high:.1f}" stroke="#111827"/>')
        end = left + max(cut, min(rate["max"], most) / most * width)
        more = " \N{RIGHTWARDS ARROW}" if rate["median"] > most else ""
        parts.append(f'<text x="{end + 6:.1f}" y="{y + 13}">{rate["median"] / 1e3:,.0f}{more}</text>')
    height = 60 + len(rows) * step
    title = escape(
        f"Thousand candidates a second, median with minimum and maximum: {out['processor']}, {out['cores']} cores"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{height}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="12" y="24" font-size="14">{title}</text>{"".join(parts)}</svg>\n'
    )

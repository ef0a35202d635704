"""``stream-scorer demo``: start a world, run the loop in it, show it, stop everything, say what happened.

Broker, Redis, scorer, trainer and simulator are separate processes; this one starts them, reads their status lines,
feeds the page and writes the report.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson
import typer

from stream_scorer.core.errors import FatalError
from stream_scorer.wiring.page import Page
from stream_scorer.wiring.processes import Child
from stream_scorer.wiring.report import Report, build_report
from stream_scorer.wiring.summary import Summary
from stream_scorer.wiring.world import World, WorldOptions, prepare_world

READY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 30.0
TICK_S = 0.25


@dataclass(frozen=True)
class DemoOptions:
    """The command's options."""

    duration_s: float
    headless: bool
    as_json: bool
    rate: float
    seed: int
    bootstrap: str | None
    kafka_home: Path | None
    redis: str | None
    port: int
    keep: Path | None


def run_demo(options: DemoOptions, stop: threading.Event) -> int:
    """0 when nothing was lost and a version was swapped in while scoring, else 1."""
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(options.keep))
        where = WorldOptions(options.bootstrap, options.kafka_home, options.redis, f"demo-{uuid.uuid4().hex[:8]}")
        world = stack.enter_context(prepare_world(folder, where))
        report = _run(options, world, stack, stop)
    for line in report.lines():
        typer.echo(line, err=options.as_json)
    if options.as_json:
        typer.echo(orjson.dumps(report.fields()).decode())
    return 0 if report.ok else 1


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    folder = Path(tempfile.mkdtemp(prefix="stream-scorer-demo-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(options: DemoOptions, world: World, stack: ExitStack, stop: threading.Event) -> Report:
    config = ["--config", str(world.config), "--status-json"]
    trainer = _child(stack, world, "train", [*config])
    scorer = _child(stack, world, "score", [*config])
    with _progress("starting scorer and trainer"):
        _await_ready([trainer, scorer], stop)
    numbers = {"--rate": options.rate, "--seed": options.seed, "--duration": options.duration_s}
    asked = [word for name, value in numbers.items() for word in (name, str(value))]
    simulator = _child(stack, world, "simulate", [*config, *asked])
    children = {"scorer": scorer, "trainer": trainer, "simulator": simulator}
    page = None if options.headless else stack.enter_context(Page(options.port, world.profile, children))
    heading = f"stream-scorer on {world.profile}" + (f"  {page.url}" if page else "")
    live = not options.headless and not options.as_json
    if page is not None:
        typer.echo(f"watch it at {page.url}", err=True)
    summary = stack.enter_context(Summary(live, options.duration_s, heading, children))
    while simulator.alive:
        if stop.wait(TICK_S):
            simulator.signal()
            simulator.wait(DRAIN_TIMEOUT_S)
            break
        _require_alive([scorer, trainer])
        summary.tick()
    _finish([simulator, scorer, trainer])
    return build_report(world.profile, children)


def _child(stack: ExitStack, world: World, command: str, args: list[str]) -> Child:
    child = Child(command, [command, *args], world.folder / f"{command}.log")
    stack.callback(child.close)
    stack.callback(child.stop, DRAIN_TIMEOUT_S)
    return child


def _await_ready(children: list[Child], stop: threading.Event) -> None:
    give_up = time.monotonic() + READY_TIMEOUT_S
    while not all(child.status.get("ready") for child in children):
        _require_alive(children)
        if stop.wait(TICK_S):
            raise KeyboardInterrupt
        if time.monotonic() > give_up:
            waiting = ", ".join(child.name for child in children if not child.status.get("ready"))
            raise FatalError(f"{waiting} not ready after {READY_TIMEOUT_S:.0f} s: {children[0].tail()}")


def _require_alive(children: list[Child]) -> None:
    for child in children:
        if not child.alive:
            raise FatalError(f"{child.name} stopped with status {child.exit_code}: {child.tail()}")


def _finish(children: list[Child]) -> None:
    """Stop in the order of the stream, so that what was asked is scored and what was scored is learned."""
    for child in children:
        child.stop(DRAIN_TIMEOUT_S)
        lossy = child.name == "simulate" and child.exit_code == 1  # it lost something: the report says what
        if (child.exit_code != 0 and not lossy) or child.final is None:
            raise FatalError(f"{child.name} ended with status {child.exit_code}: {child.tail(8)}")


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    started = time.monotonic()
    typer.echo(f"{text} ...", err=True, nl=not sys.stderr.isatty())
    yield
    if sys.stderr.isatty():
        typer.echo(f" {time.monotonic() - started:.1f} s", err=True)

"""The command line: parse, read settings once, call the composition root, turn errors into one line and an exit status.

Exit status: 0 fine, 1 failure, 2 usage, 78 configuration. Heavy imports happen inside the commands, so that
``--help`` is quick.
"""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import orjson
import structlog
import typer

from stream_scorer import __version__
from stream_scorer.core.errors import ConfigurationError, StreamScorerError
from stream_scorer.settings import Settings, SettingsError, load, masked
from stream_scorer.wiring.logs import configure_logs
from stream_scorer.wiring.processes import die_with_parent

FAILURE, USAGE, CONFIGURATION = 1, 2, 78
DATASET_NAMES = "taobao, open-bandit, criteo-conversions, criteo-attribution or ali-ccp"  # a test holds it true
# typer carries a click of its own, whose root of usage errors it does not export
USAGE_ERRORS: tuple[type[Exception], ...] = tuple(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="A streaming recommendation scorer: requests in, CTR, CVR and CTCVR out, labels back, new versions live.",
)
features_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The feature store.")
topics_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The topics.")
models_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Model versions: list, show, promote, roll back."
)
app.add_typer(features_app, name="features")
app.add_typer(topics_app, name="topics")
app.add_typer(models_app, name="models")

Config = Annotated[
    Path | None, typer.Option("--config", "-c", help="Settings file (TOML). Environment: STREAM_SCORER_*.")
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print the settings in force, secrets masked, and stop.")
]
StatusJson = Annotated[bool, typer.Option("--status-json", help="One JSON status line a second on standard output.")]


def _settings(config: Path | None, print_config: bool = False, **overrides: Any) -> Settings:
    settings = load(config, overrides={name.replace("__", "."): value for name, value in overrides.items()})
    configure_logs(settings.log_level, settings.log_json)
    if print_config:
        typer.echo(orjson.dumps(masked(settings), option=orjson.OPT_INDENT_2).decode())
        raise typer.Exit
    return settings


def _stop_on_signals() -> threading.Event:
    """An event set by SIGTERM and SIGINT; a second SIGINT interrupts at once."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


@app.command(epilog="Example: stream-scorer demo --duration 60 --headless --json")
def demo(
    duration: Annotated[float, typer.Option(help="Seconds of traffic; 0 runs until Ctrl-C.")] = 120.0,
    headless: Annotated[bool, typer.Option("--headless", help="No live summary and no page.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    rate: Annotated[float, typer.Option(help="Score requests a second.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated market.")] = 7,
    bootstrap: Annotated[
        str | None, typer.Option(help="Your own Kafka, host:port,... (topics of its own are created).")
    ] = None,
    kafka_home: Annotated[
        Path | None, typer.Option(help="Start a real broker from this Apache Kafka download (needs Java 17).")
    ] = None,
    redis: Annotated[str | None, typer.Option(help="Your own Redis, redis://host:port/db.")] = None,
    port: Annotated[int, typer.Option(help="Port of the page; 0 picks a free one.")] = 8765,
    keep: Annotated[Path | None, typer.Option(help="Keep models, checkpoints and logs in this directory.")] = None,
) -> None:
    """See the whole loop on this machine: requests, scores, labels back, new versions swapped in."""
    from stream_scorer.wiring.demo import DemoOptions, run_demo

    if bootstrap is not None and kafka_home is not None:
        raise typer.BadParameter(
            "--bootstrap and --kafka-home exclude each other: your own broker, or one started here"
        )
    configure_logs("WARNING", as_json=False)
    options = DemoOptions(duration, headless, as_json, rate, seed, bootstrap, kafka_home, redis, port, keep)
    raise typer.Exit(run_demo(options, _stop_on_signals()))


@app.command(epilog="Example: stream-scorer score --config stream-scorer.toml --workers 2")
def score(
    config: Config = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, all in one consumer group.")] = 1,
    print_config: PrintConfig = False,
    status_json: StatusJson = False,
) -> None:
    """Read score requests, fetch features, score, publish; swap in new model versions as they appear."""
    die_with_parent()
    settings = _settings(config, print_config)
    from stream_scorer.wiring.run import run_score

    raise typer.Exit(run_score(settings, config, workers, _stop_on_signals(), status_json))


@app.command(epilog="Example: stream-scorer train --config stream-scorer.toml")
def train(config: Config = None, print_config: PrintConfig = False, status_json: StatusJson = False) -> None:
    """Join what was served with feedback, keep the model learning, publish versions."""
    die_with_parent()
    settings = _settings(config, print_config)
    from stream_scorer.wiring.run import run_train

    raise typer.Exit(run_train(settings, _stop_on_signals(), status_json))


@app.command(
    epilog="Example: stream-scorer pretrain impressions.parquet --config stream-scorer.toml, "
    "or: stream-scorer pretrain data.txt.gz --dataset criteo-conversions --limit 1000000"
)
def pretrain(
    file: Annotated[
        Path,
        typer.Argument(
            help="A .parquet file: a column a feature, click, conversion (0 or 1), maybe time; with --dataset, the log."
        ),
    ],
    config: Config = None,
    epochs: Annotated[int, typer.Option(min=1, help="At most this many passes over the file.")] = 20,
    patience: Annotated[int, typer.Option(min=1, help="Stop after this many epochs without a lower log loss.")] = 2,
    held_out: Annotated[float, typer.Option(min=0.001, max=0.9, help="Share of the rows to judge on.")] = 0.1,
    dataset: Annotated[str | None, typer.Option(help=f"The file is a public log: {DATASET_NAMES}.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Stop after this many rows of the log; 0 is all.")] = 0,
) -> None:
    """Learn from matured impressions and publish a first version; `train` goes on from it."""
    settings = _settings(config)
    from stream_scorer.wiring.pretrain import PretrainOptions, run_pretrain

    raise typer.Exit(run_pretrain(settings, PretrainOptions(file, epochs, patience, held_out, dataset, limit)))


@app.command(epilog="Example: stream-scorer simulate --config stream-scorer.toml --rate 50 --duration 60")
def simulate(
    config: Config = None,
    rate: Annotated[float, typer.Option(help="Score requests a second.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Seed of the simulated market.")] = 7,
    duration: Annotated[float, typer.Option(help="Seconds; 0 runs until stopped.")] = 0.0,
    print_config: PrintConfig = False,
    status_json: StatusJson = False,
) -> None:
    """Be the market: users who ask, a ranking service that shows, clicks and late conversions with known truth."""
    die_with_parent()
    settings = _settings(config, print_config)
    from stream_scorer.wiring.simulate import run_simulate

    raise typer.Exit(run_simulate(settings, rate, seed, duration, _stop_on_signals(), status_json))


@app.command(
    epilog="Example: stream-scorer replay taobao UserBehavior.csv.gz --speed 60 --config stream-scorer.toml, "
    "or: stream-scorer replay criteo-conversions data.txt --limit 100000, "
    "or: stream-scorer replay criteo-attribution criteo_attribution_dataset.tsv.gz, "
    "or: stream-scorer replay ali-ccp sample_skeleton_train.csv (common_features_train.csv beside it)"
)
def replay(
    dataset: Annotated[str, typer.Argument(help=f"{DATASET_NAMES}.")],
    path: Annotated[Path, typer.Argument(help="The log file, plain or gzipped (open-bandit: its directory).")],
    config: Config = None,
    speed: Annotated[float, typer.Option(help="Log seconds a second; 0 is as fast as it goes.")] = 0.0,
    limit: Annotated[int, typer.Option(help="Stop after this many log rows; 0 is all.")] = 0,
    candidates: Annotated[int, typer.Option(min=1, help="Items a request: the one shown, and others seen before.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")] = False,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print the log's schema and stop.")] = False,
) -> None:
    """Turn a public log into features, score requests and feedback, and wait for the scores."""
    from stream_scorer.wiring.replay import ReplayCommand, run_replay, schema_text

    if print_schema:
        typer.echo(schema_text(dataset), nl=False)
        raise typer.Exit
    command = ReplayCommand(dataset, path, speed, limit, candidates, as_json)
    raise typer.Exit(run_replay(_settings(config), command, _stop_on_signals()))


@app.command(epilog="Example: stream-scorer check --config stream-scorer.toml")
def check(config: Config = None, print_config: PrintConfig = False) -> None:
    """Look at settings, Kafka, topics, Redis, schema and model; say what to fix."""
    settings = _settings(config, print_config)
    from stream_scorer.wiring.check import run_check

    raise typer.Exit(run_check(settings))


@features_app.command(
    "load", epilog="Example: stream-scorer features load --entity item items.parquet --id-column item_id"
)
def features_load(
    file: Annotated[Path, typer.Argument(help="A .parquet (needs pyarrow) or .jsonl file, one entity a row.")],
    entity: Annotated[str, typer.Option(help="user or item.")],
    id_column: Annotated[str, typer.Option(help="Column with the entity's id.")] = "id",
    time_column: Annotated[str | None, typer.Option(help="Column with the event time in ms; default: now.")] = None,
    config: Config = None,
) -> None:
    """Write packed feature records to Redis."""
    settings = _settings(config)
    from stream_scorer.wiring.load import run_features_load

    raise typer.Exit(run_features_load(settings, file, entity, id_column, time_column))


@topics_app.command("create", epilog="Example: stream-scorer topics create --config stream-scorer.toml")
def topics_create(config: Config = None) -> None:
    """Create the five topics that do not exist yet."""
    settings = _settings(config)
    from stream_scorer.wiring.check import run_topics_create

    raise typer.Exit(run_topics_create(settings))


@models_app.command("list", epilog="Example: stream-scorer models list --config stream-scorer.toml")
def models_list(config: Config = None) -> None:
    """One line a version; the star marks the one that scorers serve."""
    from stream_scorer.wiring.models import run_models_list

    raise typer.Exit(run_models_list(_settings(config)))


@models_app.command("show", epilog="Example: stream-scorer models show 12 --config stream-scorer.toml")
def models_show(version: int, config: Config = None) -> None:
    """The manifest of one version, after verifying it."""
    from stream_scorer.wiring.models import run_models_show

    raise typer.Exit(run_models_show(_settings(config), version))


@models_app.command("promote", epilog="Example: stream-scorer models promote 12 --config stream-scorer.toml")
def models_promote(version: int, config: Config = None) -> None:
    """Verify a version and make every scorer serve it."""
    from stream_scorer.wiring.models import run_models_promote

    raise typer.Exit(run_models_promote(_settings(config), version))


@models_app.command("rollback", epilog="Example: stream-scorer models rollback --config stream-scorer.toml")
def models_rollback(config: Config = None) -> None:
    """Go back to the newest version older than the current one."""
    from stream_scorer.wiring.models import run_models_rollback

    raise typer.Exit(run_models_rollback(_settings(config)))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Options before any command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> NoReturn:
    """The console script."""
    try:
        code = app(standalone_mode=False)
    except USAGE_ERRORS as error:
        cast("Any", error).show()
        sys.exit(USAGE)
    except (SettingsError, ConfigurationError) as error:
        _complain(error)
        sys.exit(CONFIGURATION)
    except StreamScorerError as error:
        _complain(error)
        sys.exit(FAILURE)
    except (KeyboardInterrupt, typer.Abort):
        _complain("interrupted")
        sys.exit(FAILURE)
    except BrokenPipeError:
        sys.exit(FAILURE)
    except Exception as error:  # noqa: BLE001 - the last line of defence says what happened
        structlog.get_logger().exception("unexpected")
        _complain(f"unexpected {type(error).__name__}: {error} (a bug: please report it with the trace above)")
        sys.exit(FAILURE)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: object) -> None:
    for line in str(message).splitlines():
        typer.echo(f"stream-scorer: {line}", err=True)


if __name__ == "__main__":
    main()

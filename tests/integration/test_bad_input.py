"""Bad input: one line that says what is wrong and how to fix it, and an exit status that a script can read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stream_scorer.embedded.broker import EmbeddedBroker
from stream_scorer.embedded.market_features import MARKET_TOML
from stream_scorer.embedded.redis import EmbeddedRedis
from stream_scorer.settings import Topics
from tests.servers import free_ports

FAILURE, USAGE, CONFIGURATION = 1, 2, 78


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STREAM_SCORER_")}
    command = [sys.executable, "-m", "stream_scorer.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=clean | env, stdin=subprocess.DEVNULL
    )


def says(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """One line on standard error, with these parts, and no traceback."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def servers():
    with EmbeddedBroker(dict.fromkeys(Topics().model_dump().values(), 1)) as broker, EmbeddedRedis() as redis:
        yield broker.bootstrap, redis.url


@pytest.fixture
def config(tmp_path, servers):
    """A settings file that works, to be spoilt."""

    def write(**changes: str) -> str:
        values = {
            "bootstrap": servers[0],
            "url": servers[1],
            "schema": str(tmp_path / "features.toml"),
            "requests": "score-requests",
            "prefix": "bad",
            **changes,
        }
        (tmp_path / "features.toml").write_text(changes.get("schema_text", MARKET_TOML))
        path = tmp_path / "s.toml"
        path.write_text(
            f"[kafka]\nbootstrap = '{values['bootstrap']}'\nconnect_timeout_s = 2.0\n"
            f"[kafka.topics]\nrequests = '{values['requests']}'\n"
            f"[redis]\nurl = '{values['url']}'\nprefix = '{values['prefix']}'\n"
            f"[model]\nschema_file = '{values['schema']}'\nstore = '{tmp_path / 'models'}'\n"
        )
        return str(path)

    return write


@pytest.mark.parametrize("command", ["score", "train", "simulate", "check"])
def test_unknown_setting(tmp_path, command):
    path = tmp_path / "s.toml"
    path.write_text("[scorer]\nmax_row = 3\n")
    says(run(command, "--config", str(path)), CONFIGURATION, "unknown setting 'scorer.max_row'", "max_rows")


def test_wrong_type_in_the_environment():
    done = run("score", STREAM_SCORER_SCORER__LINGER_MS="soon")
    says(done, CONFIGURATION, "scorer.linger_ms", "STREAM_SCORER_SCORER__LINGER_MS")


def test_no_settings_file(tmp_path):
    says(run("score", "--config", str(tmp_path / "none.toml")), CONFIGURATION, "none.toml", "does not exist")


def test_unreachable_kafka(config):
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    for command in ("score", "train", "simulate", "topics"):
        words = [command, "create"] if command == "topics" else [command]
        says(run(*words, "--config", config(bootstrap=nobody)), CONFIGURATION, f"no Kafka at {nobody}", ".bootstrap")


def test_unreachable_redis(config):
    nobody = f"redis://:hunter2@127.0.0.1:{free_ports(1)[0]}/0"
    for command in ("score", "simulate"):
        done = run(command, "--config", config(url=nobody))
        says(done, CONFIGURATION, "no Redis at redis://:********@127.0.0.1", "redis.url")
        assert "hunter2" not in done.stderr + done.stdout


def test_missing_topic(config):
    done = run("score", "--config", config(requests="not-there"))
    says(done, CONFIGURATION, "has no topic not-there", "stream-scorer topics create")


def test_features_of_another_schema(config, tmp_path):
    from stream_scorer.settings import load
    from stream_scorer.wiring.world import announce

    announce(load(Path(config(prefix="other")), {}))
    changed = MARKET_TOML.replace("dimension = 4", "dimension = 5")
    assert changed != MARKET_TOML
    done = run("score", "--config", config(prefix="other", schema_text=changed))
    says(done, CONFIGURATION, "were written under another feature schema", "features load")


def test_no_features_at_all(config):
    says(run("score", "--config", config(prefix="empty")), CONFIGURATION, "holds no user features", "features load")


def test_schema_that_is_not_one(config, tmp_path):
    path = config(schema_text="[[features]]\nname = 'a'\nkind = 'sparse'\nvocabulary = 3\n")
    says(run("score", "--config", path), CONFIGURATION, "features.toml", "unknown key 'vocabulary'")


def test_schema_file_that_is_not_there(config):
    says(run("score", "--config", config(schema="/nowhere.toml")), CONFIGURATION, "/nowhere.toml", "model.schema_file")


def test_unknown_dataset_and_missing_log(config, tmp_path):
    says(run("replay", "movielens", "x", "--print-schema"), CONFIGURATION, "'movielens'", "taobao, open-bandit")


def test_replay_under_another_schema(config, tmp_path):
    done = run("replay", "taobao", "log.csv", "--config", config())
    says(done, CONFIGURATION, "is not the schema of taobao", "--print-schema")


def test_usage_errors_are_two():
    done = run("demo", "--bootstrap", "a:1", "--kafka-home", "b")
    assert done.returncode == USAGE
    assert "exclude each other" in done.stderr
    assert run("scor").returncode == USAGE
    assert run("models", "show", "one").returncode == USAGE


def test_a_version_that_does_not_exist(config):
    done = run("models", "show", "7", "--config", config())
    says(done, FAILURE, "version 7")


def test_nothing_to_roll_back_to(config):
    says(run("models", "rollback", "--config", config()), FAILURE, "nothing to roll back to")


def test_print_config_masks_secrets(config):
    done = run("score", "--config", config(), "--print-config", STREAM_SCORER_KAFKA__PASSWORD="hunter2")
    assert done.returncode == 0
    assert "hunter2" not in done.stdout + done.stderr
    assert "********" in done.stdout


def test_check_lists_every_problem(config):
    nobody = f"127.0.0.1:{free_ports(1)[0]}"
    done = run("check", "--config", config(bootstrap=nobody, prefix="empty"))
    assert done.returncode == CONFIGURATION
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == ["kafka", "topics", "redis"]


@pytest.mark.parametrize(
    "words",
    [
        [], ["demo"], ["score"], ["train"], ["simulate"], ["replay"], ["check"], ["features", "load"],
        ["topics", "create"], ["models", "list"], ["models", "show"], ["models", "promote"], ["models", "rollback"],
    ],
)  # fmt: skip
def test_every_command_has_help_with_an_example(words):
    done = run(*words, "--help")
    assert done.returncode == 0
    if words:
        assert f"Example: stream-scorer {' '.join(words)}" in done.stdout

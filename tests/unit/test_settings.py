"""Settings: order of sources, errors that say what to fix, secrets masked."""

from pathlib import Path

import pytest

from stream_scorer.core.secrets import mask_url
from stream_scorer.settings import Settings, SettingsError, load, masked


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return path


def test_environment_wins_over_file_and_overrides_win_over_both(tmp_path):
    path = write(tmp_path, "[scorer]\nmax_rows = 1\nlinger_ms = 9\nmax_items = 3\n")
    env = {"STREAM_SCORER_SCORER__LINGER_MS": "4", "STREAM_SCORER_SCORER__MAX_ITEMS": "5", "OTHER": "x"}
    settings = load(path, env, {"scorer.max_items": 6, "scorer.served": None})
    assert (settings.scorer.max_rows, settings.scorer.linger_ms, settings.scorer.max_items) == (1, 4, 6)
    assert settings.scorer.served is True


@pytest.mark.parametrize(
    ("text", "env", "expect"),
    [
        ("[kafka]\nbotstrap = 'x'\n", {}, "unknown setting 'kafka.botstrap'; known here: bootstrap"),
        ("colour = 1\n", {}, "unknown setting 'colour'"),
        ("[scorer]\nmax_rows = 'many'\n", {}, "setting 'scorer.max_rows' is wrong"),
        ("[scorer]\nmax_rows = 0\n", {}, "STREAM_SCORER_SCORER__MAX_ROWS"),
        ("[scorer\n", {}, "not valid TOML"),
        ("", {"STREAM_SCORER_NOPE": "1"}, "unknown setting 'nope'"),
        ("kafka = 3\n", {"STREAM_SCORER_KAFKA__BOOTSTRAP": "a:1"}, "'kafka' is a table"),
    ],
)
def test_bad_settings_name_the_setting_and_the_fix(tmp_path, text, env, expect):
    with pytest.raises(SettingsError, match=r"setting|TOML") as caught:
        load(write(tmp_path, text), env)
    assert expect in str(caught.value)


def test_missing_file_says_so(tmp_path):
    with pytest.raises(SettingsError, match="does not exist"):
        load(tmp_path / "none.toml", {})


def test_secrets_never_show(tmp_path):
    path = write(
        tmp_path,
        "[kafka]\npassword = 'hunter2'\n[kafka.options]\n'ssl.key.password' = 'hunter2'\n'client.id' = 'me'\n"
        "[redis]\nurl = 'rediss://bob:hunter2@r:1/0'\n",
    )
    settings = load(path, {})
    assert masked(settings)["redis"]["url"] == "rediss://bob:********@r:1/0"
    assert masked(settings)["kafka"]["options"]["client.id"] == "me"
    assert "hunter2" not in str(masked(settings))
    assert "hunter2" not in f"{settings!r}{settings}"
    assert settings.kafka.password.get_secret_value() == "hunter2"


def test_a_wrong_secret_is_not_echoed(tmp_path):
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, "[kafka]\npassword = ['hunter2']\n"), {})
    assert "hunter2" not in str(caught.value)


def test_a_password_of_digits_and_one_in_a_query():
    settings = load(None, {"STREAM_SCORER_KAFKA__PASSWORD": "12345"})
    assert settings.kafka.password.get_secret_value() == "12345"
    assert mask_url("redis://h/0?password=hunter2&x=1") == "redis://h/0?password=********&x=1"


@pytest.mark.parametrize("url", ["redis://h:1/0", "unix:///tmp/s"])
def test_urls_without_a_password_stay(url):
    assert mask_url(url) == url


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().scorer.max_rows = 3  # type: ignore[misc]

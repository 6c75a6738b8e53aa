"""Redis's password is nowhere that others can read: not in a dump, a command line, a message or a report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.runs import MINIMAL, make_run
from vaopd.config import QueueConfig, load_config, to_toml
from vaopd.errors import ConfigError
from vaopd.launch.up import make_environment, make_service_argv
from vaopd.net.passwords import add_password, remove_passwords, split_password
from vaopd.queue.connection import Connection, find_problem
from vaopd.run.records import read_run

URLS = (
    "redis://me:s3cret%2F@db:6380/1",
    "redis://:s3cret%2F@db:6380/1",
    "rediss://db:6380/1?password=s3cret%2F",
    "unix://:s3cret%2F@/run/redis.sock?db=1",
    "unix:///run/redis.sock?password=s3cret%2F&db=1",
)
ENDED = ("pa ss", "pa#ss", "pa/ss", "pa?ss", "pa[ss", "pa\tss", "pa\u2100ss")
"""Passwords with a character that ends them in a URL, or that a URL can't have: the rest was shown, or lost."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(MINIMAL)
    return tmp_path / "run.toml"


@pytest.mark.parametrize("url", URLS)
def test_a_password_in_the_url_reaches_redis_and_nothing_else(url: str, file: Path) -> None:
    config = load_config(file, [f"queue.url={url}"])
    argv = make_service_argv("trainer", file, [f"queue.url={url}", f'queue.url="{url}"'])
    for shown in (to_toml(config), repr(config), str(config.model_dump()), " ".join(argv)):
        assert "s3cret" not in shown
    assert make_environment(config, devices=None)["VAOPD_QUEUE_PASSWORD"] == "s3cret/"
    connection = Connection(url=config.queue.find_url(), job="test", patience_s=0.0)
    assert connection.redis.connection_pool.connection_kwargs["password"] == "s3cret/"
    assert "s3cret" not in connection.where


def test_a_child_finds_the_password_in_its_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = load_config(file, [f"queue.url={URLS[0]}"])
    argv = make_service_argv("trainer", file, [f"queue.url={URLS[0]}"])
    monkeypatch.setattr(os, "environ", os.environ | make_environment(parent, devices=None))
    child = load_config(file, [argv[argv.index("--set") + 1]])
    assert child.queue.url == "redis://me@db:6380/1"
    assert child.queue.find_url() == URLS[0]


@pytest.mark.parametrize("password", ["it's", 'a"b', "pässwörd", "p@ss", "p%zz", "a:b"])
def test_a_password_may_have_any_other_character(password: str, file: Path) -> None:
    url = f"redis://me:{password}@db:6380/1"
    config = load_config(file, [f"queue.url={url}"])
    shown = [
        to_toml(config),
        *make_service_argv("trainer", file, [f"queue.url={url}"]),
        remove_passwords(f"got {url!r}"),
    ]
    assert not [text for text in shown if password in text]
    assert split_password(config.queue.find_url()) == ("redis://me@db:6380/1", password)


@pytest.mark.parametrize("password", ENDED)
@pytest.mark.parametrize("url", ["redis://me:{}@db:6380/1", "unix://:{}@/run/redis.sock"])
def test_one_that_would_end_the_url_is_refused_unquoted(url: str, password: str, file: Path) -> None:
    with pytest.raises(ConfigError, match=r"queue: url can't be used: .*%2F for /.*queue\.password_file") as refused:
        load_config(file, ["queue.url=" + url.format(password)])
    assert "ss@" not in str(refused.value)
    with pytest.raises(ValueError) as library:  # noqa: PT011
        QueueConfig(url=url.format(password))
    assert "ss@" not in str(library.value)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", None])
def test_a_file_without_a_password_is_named(content: bytes | None, tmp_path: Path) -> None:
    secret = tmp_path / "redis.password"
    if content is None:
        os.mkfifo(secret, 0o600)
    else:
        secret.write_bytes(content)
        secret.chmod(0o600)
    with pytest.raises(ConfigError, match=rf"queue.password_file '{secret}' (is empty|can't be read \((it is )?not)"):
        QueueConfig(url="redis://db/0", password_file=secret).find_url()


@pytest.mark.parametrize("by", ["the configuration", "the environment"])
def test_a_file_holds_the_password(by: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = file.with_name("redis.password")
    secret.write_text("s3cret/\n")
    secret.chmod(0o600)
    overrides = ["queue.url=redis://db:6380/1"]
    if by == "the configuration":
        overrides.append(f"queue.password_file={secret}")
    else:
        monkeypatch.setenv("VAOPD_QUEUE_PASSWORD_FILE", str(secret))
    config = load_config(file, overrides)
    assert config.queue.find_url() == "redis://:s3cret%2F@db:6380/1"
    assert "s3cret" not in to_toml(config)
    secret.chmod(0o644)
    with pytest.raises(
        ConfigError, match=rf"password file '{secret}' has mode 0644 and may be .*; chmod go-w,o-r {secret}"
    ):
        config.queue.find_url()
    secret.unlink()
    with pytest.raises(ConfigError, match="can't be read"):
        config.queue.find_url()


@pytest.mark.parametrize(
    "url",
    [
        *("http://me:s3cret@db/0", "redis://me:s3cret@db:port/0", "redis://[me:s3cret@db", "s3cret://x:s3cret@"),
        *("redis://me:s3cret@db?nosuch=1", "redis://db?Password=:s3cret"),
    ],
)
def test_no_message_about_a_wrong_url_quotes_the_password(url: str, file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        Connection(url=load_config(file, [f"queue.url={url}"]).queue.find_url(), job="test", patience_s=0.0)
    assert ":s3cret" not in str(refused.value)


def test_the_report_of_an_old_run_shows_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "config.toml").open("a") as config:
        config.write(f'[queue]\nurl = "{URLS[0]}"\n')
    found = read_run(run)
    assert found.config["queue"]["url"] == "redis://me@db:6380/1"
    assert "s3cret" not in found.config_text


def test_a_url_comes_together_as_it_was_split() -> None:
    assert split_password("redis://db/0") == ("redis://db/0", None)
    assert split_password(URLS[0]) == ("redis://me@db:6380/1", "s3cret/")
    assert add_password("redis://me@db:6380/1", "s3cret/") == URLS[0]
    assert add_password("unix:///run/redis.sock", "a b") == "unix://:a%20b@/run/redis.sock"
    assert remove_passwords("no address: at all") == "no address: at all"
    assert split_password("REDIS://me:s3cret@db") == ("REDIS://me@db", "s3cret")
    assert remove_passwords("http://a/b,redis://u:p@q@h 'redis://:s3cret@h'") == "http://a/b,redis://u@h 'redis://h'"


def test_a_socket_on_which_nothing_listens_is_named(tmp_path: Path) -> None:
    assert f"no Redis listens on {tmp_path / 'none'}" in (find_problem(f"unix://{tmp_path / 'none'}") or "")
    connection = Connection(url="unix:///run/redis.sock?db=1", job="test", patience_s=0.0)
    assert connection.where == "/run/redis.sock"
    connection.redis.connection_pool.make_connection()  # takes the options that it is given

"""The settings: defaults, sources, and one clear line for each bad value."""

import json
from urllib.parse import quote

import pytest
from conftest import TOKEN

import config
from config import ConfigError, RateLimit, from_values, load


def test_only_the_token_is_required(tmp_path):
    made = from_values({"CHUTES_API_TOKEN": TOKEN}, tmp_path)
    assert made.chutes_api_url == "https://image.chutes.ai/generate"
    assert made.default_model == "qwen-image"
    assert (made.host, made.port) == ("127.0.0.1", 3000)
    assert made.threads == 16
    assert made.database_path == tmp_path / "tasks.sqlite3"
    assert made.output_dir == tmp_path / "outputs"
    assert (made.concurrency, made.rate_limit, made.task_timeout) == (4, None, 600)
    assert (made.max_attempts, made.retry_backoff, made.task_ttl) == (3, 5, 604800)
    assert (made.interrupted, made.shutdown_grace, made.max_image_mb) == ("retry", 25, 50)
    assert (made.log_format, made.allow_anonymous) == ("text", False)


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 2), (16, 2), (None, 1)])
def test_workers_follow_the_cores_up_to_two(tmp_path, monkeypatch, cores, workers):
    monkeypatch.setattr(config.os, "cpu_count", lambda: cores)
    assert from_values({"CHUTES_API_TOKEN": TOKEN}, tmp_path).workers == workers


def test_without_a_token_one_line_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError) as error:
        load({}, tmp_path)
    assert "CHUTES_API_TOKEN" in str(error.value)
    assert "script/demo" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_environment_wins_over_the_file_and_empty_means_not_set(tmp_path):
    (tmp_path / ".env").write_text(
        f"CHUTES_API_TOKEN={TOKEN}\nPORT=4000\nCONCURRENCY=7\nTHREADS=\nMAX_ATTEMPTS=9\n"
    )
    made = load({"PORT": "5000", "CONCURRENCY": "", "MAX_ATTEMPTS": " "}, tmp_path)
    assert (made.port, made.concurrency, made.threads, made.max_attempts) == (5000, 7, 16, 9)


def test_a_dollar_in_the_file_is_a_dollar(tmp_path):
    (tmp_path / ".env").write_text("CHUTES_API_TOKEN=a${PORT}b\n")
    assert load({"PORT": "4000"}, tmp_path).chutes_api_token == "a${PORT}b"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("CONCURENCY", "CONCURRENCY"), ("port", "PORT"), ("MODEL", "MODELS"), ("API_KEY", "API_KEYS")],
)
def test_a_name_that_is_nearly_a_settings_stops_the_start(tmp_path, name, meant):
    (tmp_path / ".env").write_text(f"CHUTES_API_TOKEN={TOKEN}\n{name}=7\n")
    with pytest.raises(ConfigError) as error:
        load({}, tmp_path)
    assert str(error.value).startswith(f"{name} in ")
    assert str(error.value).endswith(f"did you mean {meant}?")


def test_another_name_in_the_file_is_logged_once_and_ignored(tmp_path, caplog):
    (tmp_path / ".env").write_text(f"CHUTES_API_TOKEN={TOKEN}\nHTTP_PROXY=http://there\n")
    assert load({"LANGUAGE": "en", "CONCURENCY": "7"}, tmp_path).port == 3000
    (line,) = caplog.messages
    assert line.startswith("HTTP_PROXY in ") and "http://there" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "0"),
        ("PORT", "65536"),
        ("PORT", "3e3"),
        ("PORT", "-1"),
        ("PORT", "²"),
        ("WORKERS", "33"),
        ("WORKERS", "0"),
        ("THREADS", "1"),
        ("THREADS", "257"),
        ("CONCURRENCY", "0"),
        ("CONCURRENCY", "65"),
        ("CONCURRENCY", "1_0"),
        ("RATE_LIMIT", "60"),
        ("RATE_LIMIT", "0/60"),
        ("RATE_LIMIT", "60/0"),
        ("RATE_LIMIT", "60/minute"),
        ("TASK_TIMEOUT", "0.9"),
        ("TASK_TIMEOUT", "nan"),
        ("TASK_TIMEOUT", "inf"),
        ("MAX_ATTEMPTS", "0"),
        ("MAX_ATTEMPTS", "101"),
        ("RETRY_BACKOFF", "0.001"),
        ("RETRY_BACKOFF", "3601"),
        ("TASK_TTL", "-1"),
        ("TASK_TTL", "1.5"),
        ("INTERRUPTED", "maybe"),
        ("SHUTDOWN_GRACE", "-1"),
        ("SHUTDOWN_GRACE", "3601"),
        ("MAX_IMAGE_MB", "0"),
        ("LOG_FORMAT", "xml"),
        ("ALLOW_ANONYMOUS", "yes"),
        ("DEFAULT_MODEL", "../etc"),
        ("HOST", "not a host"),
        ("DATABASE_PATH", "no/such/folder/tasks.sqlite3"),
        ("DATABASE_PATH", "folder"),
        ("OUTPUT_DIR", "file"),
        ("OUTPUT_DIR", "file/below"),
        ("MIN_FREE_MB", "-1"),
        ("RETENTION_DAYS", "1.5"),
        ("MAX_PENDING", "0"),
        ("MAX_PER_DAY", "-1"),
        ("MODELS", "qwen-image,../etc"),
        ("TRUSTED_PROXIES", "-1"),
        ("PUBLIC_URL", "pictures.example"),
        ("PUBLIC_URL", "https://pictures.example/path"),
        ("PUBLIC_URL", "https://user@pictures.example"),
        ("PUBLIC_URL", "https://pictures.example:port"),
        ("PUBLIC_URL", "https://pictures.example:"),
        ("PUBLIC_URL", "https://..."),
        ("MODELS", ","),
        ("TASK_TTL", "99999999999"),
        ("TASK_TIMEOUT", "4294968"),
        ("CHUTES_API_URL", "http://image.chutes.ai/generate"),
        ("CHUTES_API_URL", "https://user:word@image.chutes.ai/generate"),
        ("CHUTES_API_URL", "https://image.chutes.ai/generate#x"),
        ("CHUTES_API_URL", "https://image.chutes.ai:port/generate"),
        ("CHUTES_API_URL", "ftp://127.0.0.1/generate"),
        ("CHUTES_API_URL", "http://127.0.0.1.example.com/generate"),
        ("CHUTES_API_URL", "image.chutes.ai"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(tmp_path, name, value):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    sentence = str(error.value)
    assert sentence.startswith(f"{name}=")
    assert value.rpartition(",")[2] in sentence
    assert "must" in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CHUTES_API_TOKEN", "geheim\u00e9"),
        ("API_KEYS", "geheim und geheim"),
        ("API_KEYS", "geheim\u00e9,good"),
        ("API_KEYS", " , "),
    ],
)
def test_a_bad_secret_is_named_but_not_shown(tmp_path, name, value):
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert name in str(error.value)
    assert "geheim" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "read"),
    [
        ("RATE_LIMIT", "60/60", RateLimit(60, 60)),
        ("API_KEYS", "a, b,,c", ("a", "b", "c")),
        ("PUBLIC_URL", "https://Pictures.example:8443/", "https://pictures.example:8443"),
        ("PUBLIC_URL", "https://pictures.example:443", "https://pictures.example"),
        ("PUBLIC_URL", "http://pictures.example:80/", "http://pictures.example"),
        ("PUBLIC_URL", "http://pictures.example:443", "http://pictures.example:443"),
        ("PUBLIC_URL", "http://[::1]:3000", "http://[::1]:3000"),
        ("TRUSTED_PROXIES", "2", 2),
        ("RATE_LIMIT", "5/0.5", RateLimit(5, 0.5)),
        ("TASK_TIMEOUT", "1", 1.0),
        ("TASK_TIMEOUT", "2.5", 2.5),
        ("RETRY_BACKOFF", "0.01", 0.01),
        ("TASK_TTL", "0", 0),
        ("SHUTDOWN_GRACE", "0", 0.0),
        ("CHUTES_API_URL", "http://[::1]:9/generate", "http://[::1]:9/generate"),
        ("CHUTES_API_URL", "http://127.8.9.1:9/x", "http://127.8.9.1:9/x"),
        ("CHUTES_API_URL", "https://{model}.chutes.ai/g", "https://{model}.chutes.ai/g"),
    ],
)
def test_a_good_value_is_read(tmp_path, name, value, read):
    made = from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert getattr(made, name.lower()) == read


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "pictures.example"])
def test_listening_beyond_loopback_must_be_asked_for(tmp_path, host):
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, "HOST": host}, tmp_path)
    for name in ("HOST", "API_KEYS", "ALLOW_ANONYMOUS"):
        assert name in str(error.value)
    values = {"CHUTES_API_TOKEN": TOKEN, "HOST": host, "ALLOW_ANONYMOUS": "1"}
    assert from_values(values, tmp_path).host == host
    values = {"CHUTES_API_TOKEN": TOKEN, "HOST": host, "API_KEYS": "a-key"}
    assert from_values(values, tmp_path).host == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_needs_no_permission(tmp_path, host):
    made = from_values({"CHUTES_API_TOKEN": TOKEN, "HOST": host}, tmp_path)
    assert made.host == host.strip("[]")


@pytest.mark.parametrize("model", ["a", "Qwen/Qwen-Image:v1.2_x", "a" * 100])
def test_a_models_name_may_be(model):
    assert config.model_fault(model, one_label=False) is None


@pytest.mark.parametrize(
    "model", ["", "-a", ".a", "a..b", "a//b", "a b", "a\n", "a?b", "a@b", "ä", "a" * 101]
)
def test_a_models_name_may_not_be(model):
    assert "letter" in config.model_fault(model, one_label=False)


@pytest.mark.parametrize("model", ["a.b", "a/b", "evil.com/", "a_b", "a:b", "a-", "a" * 64, "a\n"])
def test_a_model_in_the_address_is_one_label(tmp_path, model):
    assert "DNS label" in config.model_fault(model, one_label=True)
    with pytest.raises(ConfigError, match="DEFAULT_MODEL"):
        from_values(
            {
                "CHUTES_API_TOKEN": TOKEN,
                "CHUTES_API_URL": "https://{model}.chutes.ai/generate",
                "DEFAULT_MODEL": model,
            },
            tmp_path,
        )


def test_the_token_is_not_in_the_settings_own_text(tmp_path):
    assert TOKEN not in repr(from_values({"CHUTES_API_TOKEN": TOKEN}, tmp_path))


def test_bad_settings_at_a_reload_leave_those_in_force(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(config, "_in_force", None)
    monkeypatch.setattr(config, "load", lambda: from_values({}, tmp_path))
    with pytest.raises(ConfigError):
        config.reload()
    monkeypatch.setattr(config, "load", lambda: from_values({"CHUTES_API_TOKEN": "a"}, tmp_path))
    good = config.reload()
    monkeypatch.setattr(config, "load", lambda: from_values({}, tmp_path))
    assert config.reload() is good
    monkeypatch.setattr(config, "load", lambda: from_values({"CHUTES_API_TOKEN": "b"}, tmp_path))

    def refuse(settings):
        raise ConfigError("DATABASE_PATH is of another program")

    assert config.reload(refuse) is good
    assert config.in_force() is good
    said = capsys.readouterr().err
    assert "CHUTES_API_TOKEN" in said and "DATABASE_PATH" in said


def test_the_default_model_must_be_allowed(tmp_path):
    values = {"CHUTES_API_TOKEN": TOKEN, "MODELS": "a,b"}
    with pytest.raises(ConfigError, match="DEFAULT_MODEL=qwen-image: must be one of MODELS, a, b"):
        from_values(values, tmp_path)
    assert from_values({**values, "DEFAULT_MODEL": "b"}, tmp_path).models == ("a", "b")


def test_a_public_address_is_no_leave_to_listen_there(tmp_path):
    values = {"CHUTES_API_TOKEN": TOKEN, "PUBLIC_URL": "https://pictures.example"}
    with pytest.raises(ConfigError, match=r"HOST=0\.0\.0\.0"):
        from_values({**values, "HOST": "0.0.0.0"}, tmp_path)


def test_a_secret_is_scrubbed_however_it_is_spelt(tmp_path):
    key = 'a+b/c==\\d"e'
    made = from_values({"CHUTES_API_TOKEN": TOKEN, "API_KEYS": key}, tmp_path)
    for spelt in (key, key.upper(), quote(key), quote(key, safe=""), json.dumps(key), repr(key)):
        assert made.scrub(f"1 {spelt} 2").replace('"', "").replace("'", "") == "1 *** 2"

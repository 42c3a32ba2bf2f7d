"""The settings: defaults, sources, and one clear line for each bad value."""

import json
import traceback
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
        "OPENAI_WAIT=' '\n"
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
    assert load({"LANGUAGE": "en", "CONCURENCY": "7", "port": "7"}, tmp_path).port == 3000
    (line,) = caplog.messages
    assert line.startswith("HTTP_PROXY in ") and "http://there" not in line


MODEL = "a letter or digit, then at most 99 letters, digits or . _ : / - without '..' or '//'"
ORIGIN = "an http or https address without a path, such as https://pictures.example"
UPSTREAM = "an https address, or http on loopback, without user, query or fragment"
RULES = [
    ("PORT", "an integer from 1 to 65535", ["0", "65536", "3e3", "-1", "²", "٣", "1_0"]),
    ("PORT", "an integer from 1 to 65535", [" 5", "5\n", "+5", ""]),
    ("WORKERS", "an integer from 1 to 32", ["0", "33"]),
    ("THREADS", "an integer from 2 to 256", ["1", "257"]),
    ("CONCURRENCY", "an integer from 1 to 64", ["0", "65", "4.0"]),
    ("RATE_LIMIT", "CALLS/SECONDS, for example 60/60", ["60", "0/60", "60/0", "60/minute"]),
    ("TASK_TIMEOUT", "seconds, from 1 to 1000000", ["0.9", "nan", "inf", "1e3", "1000000.1"]),
    ("MAX_ATTEMPTS", "an integer from 1 to 100", ["0", "101"]),
    ("RETRY_BACKOFF", "seconds, from 0.01 to 3600", ["0.001", "3601"]),
    ("TASK_TTL", "an integer from 0 to 3000000000", ["-1", "1.5", "3000000001"]),
    ("INTERRUPTED", "retry or fail", ["maybe", "Retry"]),
    ("SHUTDOWN_GRACE", "seconds, from 0 to 3600", ["-1", "3601"]),
    ("MAX_IMAGE_MB", "an integer from 1 to 1000000", ["0", "1000001"]),
    ("LOG_FORMAT", "text or json", ["xml"]),
    ("ALLOW_ANONYMOUS", "0 or 1", ["yes", "true", "2"]),
    ("DEFAULT_MODEL", MODEL, ["../etc"]),
    ("HOST", "a host name or an address", ["not a host", "a/b"]),
    ("MAX_PENDING", "an integer from 1 to 1000000000", ["0", "1000000001"]),
    ("MAX_UPLOAD_MB", "an integer from 1 to 200", ["0", "201", "1.5"]),
    ("DEFAULT_EDIT_MODEL", MODEL, ["a b", "../etc"]),
    ("MAX_PER_DAY", "an integer from 0 to 1000000000", ["-1", "1000000001"]),
    ("MODELS", "names, separated by commas", [",", " , "]),
    ("MIN_FREE_MB", "an integer from 0 to 1000000000", ["-1", "1000000001"]),
    ("RETENTION_DAYS", "an integer from 0 to 36500", ["1.5", "36501"]),
    ("OPENAI_WAIT", "seconds, from 1 to 86400", ["0", "86401"]),
    ("TRUSTED_PROXIES", "an integer from 0 to 10", ["-1", "11"]),
    ("PUBLIC_URL", ORIGIN, ["pictures.example", "https://a.example/path", "https://..."]),
    ("PUBLIC_URL", ORIGIN, ["https://u@a.example", "https://a.example:port", "https://a.example:"]),
    ("CHUTES_API_URL", UPSTREAM, ["http://a.example/", "https://u:w@a.example/", "a.example"]),
    ("CHUTES_API_URL", UPSTREAM, ["https://a.example/#x", "https://a.example:port/", "https://"]),
    ("CATALOGUE_URL", f"off, or {UPSTREAM}", ["http://a.example/", "OFF", "https://{x}.example/"]),
    ("CHUTE_URL", f"{UPSTREAM}, with {{slug}} in it", ["https://a.example", "http://{slug}.a"]),
    ("CHUTES_API_URL", UPSTREAM, ["ftp://127.0.0.1/", "http://127.0.0.1.a.example/", "https://é/"]),
]


@pytest.mark.parametrize(
    ("name", "rule", "value"), [(name, rule, value) for name, rule, bad in RULES for value in bad]
)
def test_a_bad_value_is_named_with_its_rule(tmp_path, name, rule, value):
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert str(error.value) == f"{name}={value}: must be {rule}"


def test_a_bad_name_in_the_list_of_models_is_the_one_that_is_shown(tmp_path):
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, "MODELS": "qwen-image,../etc"}, tmp_path)
    assert str(error.value) == f"MODELS=../etc: must be {MODEL}"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("DATABASE_PATH", "no/tasks", "a file, in a folder that exists and is writable"),
        ("DATABASE_PATH", "folder", "a file, in a folder that exists and is writable"),
        ("OUTPUT_DIR", "file", "a folder (File exists)"),
        ("OUTPUT_DIR", "file/below", "a folder (Not a directory)"),
        ("INPUT_DIR", "file", "a folder (File exists)"),
        ("INPUT_DIR", "file/below", "a folder (Not a directory)"),
    ],
)
def test_a_path_that_cannot_be_used_is_named_in_full(tmp_path, name, value, rule):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert str(error.value) == f"{name}={tmp_path / value}: must be {rule}"


def test_a_whole_path_is_taken_as_it_is(tmp_path):
    path = tmp_path / "elsewhere.sqlite3"
    values = {"CHUTES_API_TOKEN": TOKEN, "DATABASE_PATH": str(path)}
    assert from_values(values, tmp_path / "root").database_path == path


def test_of_two_bad_values_the_first_setting_is_named_and_a_long_one_is_cut(tmp_path):
    with pytest.raises(ConfigError) as error:
        from_values({"PORT": "0", "CHUTES_API_TOKEN": TOKEN, "HOST": " " * 300}, tmp_path)
    assert str(error.value) == f"HOST={' ' * 200}: must be a host name or an address"


def test_every_setting_has_words_for_its_rule():
    assert all(field.description for field in config.Config.model_fields.values())


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("CHUTES_API_TOKEN", "geheim\u00e9", "printable ASCII"),
        ("API_KEYS", "geheim und geheim", "keys of printable ASCII without spaces"),
        ("API_KEYS", "geheim\u00e9,good", "keys of printable ASCII without spaces"),
        ("API_KEYS", "geheim\u00e9\n", "keys of printable ASCII without spaces"),
        ("API_KEYS", " , ", "keys of printable ASCII without spaces"),
    ],
)
def test_a_bad_secret_is_named_but_not_shown(tmp_path, name, value, rule):
    with pytest.raises(ConfigError) as error:
        from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert str(error.value).startswith(f"{name}: must be {rule}")
    assert "geheim" not in "".join(traceback.format_exception(error.value))


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
        ("TASK_TTL", "3000000000", 3000000000),
        ("PORT", "0065535", 65535),
        ("ALLOW_ANONYMOUS", "0", False),
        ("ALLOW_ANONYMOUS", "1", True),
        ("SHUTDOWN_GRACE", "0", 0.0),
        ("SHUTDOWN_GRACE", "3600.000000000", 3600.0),
        ("CHUTES_API_URL", "http://[::1]:9/generate", "http://[::1]:9/generate"),
        ("CHUTES_API_URL", "http://127.8.9.1:9/x", "http://127.8.9.1:9/x"),
        ("CHUTES_API_URL", "https://{model}.chutes.ai/g", "https://{model}.chutes.ai/g"),
    ],
)
def test_a_good_value_is_read(tmp_path, name, value, read):
    made = from_values({"CHUTES_API_TOKEN": TOKEN, name: value}, tmp_path)
    assert getattr(made, name.lower()) == read
    assert type(getattr(made, name.lower())) is type(read)


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
def test_a_models_name_may_be(configure, model):
    assert config.model_name_error(model, configure()) is None


@pytest.mark.parametrize(
    "model", ["", "-a", ".a", "a..b", "a//b", "a b", "a\n", "a?b", "a@b", "ä", "a" * 101]
)
def test_a_models_name_may_not_be(configure, model):
    assert "letter" in config.model_name_error(model, configure())


@pytest.mark.parametrize("model", ["a.b", "a/b", "evil.com/", "a_b", "a:b", "a-", "a" * 64])
def test_a_model_in_the_address_is_one_label(tmp_path, model):
    with pytest.raises(ConfigError, match=r"DEFAULT_MODEL.*DNS label"):
        from_values(
            {
                "CHUTES_API_TOKEN": TOKEN,
                "CHUTES_API_URL": "https://{model}.chutes.ai/generate",
                "DEFAULT_MODEL": model,
            },
            tmp_path,
        )


def test_no_secret_is_in_the_settings_own_text(tmp_path):
    made = from_values({"CHUTES_API_TOKEN": TOKEN, "API_KEYS": "a-key,b-key"}, tmp_path)
    for text in (repr(made), str(made)):
        assert TOKEN not in text and "-key" not in text
    assert "port=3000" in repr(made)


def test_the_settings_are_values_that_stay(tmp_path):
    values = {"CHUTES_API_TOKEN": TOKEN, "RATE_LIMIT": "60/60", "API_KEYS": "a,b", "MODELS": "a"}
    made, same = (from_values({**values, "DEFAULT_MODEL": "a"}, tmp_path) for _ in range(2))
    assert made == same and len({made, same}) == 1
    with pytest.raises(ValueError, match="frozen"):
        made.port = 1


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


def test_a_list_of_models_with_a_fault_leaves_the_one_in_force(tmp_path, monkeypatch, capsys):
    file = tmp_path / "my.toml"
    values = {"CHUTES_API_TOKEN": TOKEN, "MODELS_FILE": str(file), "DEFAULT_MODEL": "a"}
    monkeypatch.setattr(config, "_in_force", None)
    monkeypatch.setattr(config, "load", lambda: from_values(values, tmp_path))
    with pytest.raises(ConfigError, match=r"MODELS_FILE=.*my\.toml: cannot be read"):
        config.reload()
    file.write_text('[a]\nurl = "https://m.example/"\n')
    good = config.reload()
    file.write_text('[a]\nurl = "https://m.example/"\nurls = 1\n')
    assert config.reload() is good
    assert list(good.file_models) == ["a"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"MODELS_FILE={file}: a: urls is not a key")


def test_an_alias_may_stand_for_a_model_in_the_settings(tmp_path):
    (tmp_path / "my.toml").write_text('[a]\nurl = "https://m.example/"\naliases = ["b"]\n')
    values = {"CHUTES_API_TOKEN": TOKEN, "MODELS_FILE": str(tmp_path / "my.toml")}
    for default, allowed in (("b", "a"), ("a", "b,c"), ("b", "b")):
        made = from_values({**values, "DEFAULT_MODEL": default, "MODELS": allowed}, tmp_path)
        assert made.canonical(made.default_model) == "a"


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

import argparse
from dataclasses import FrozenInstanceError, fields

import pytest

from service.config import Settings, add_flags, describe, load_settings
from service.errors import ConfigError

NAMES = [field.name for field in fields(Settings)]


def parse(*argv: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    add_flags(parser, NAMES)
    return vars(parser.parse_args(argv))


def test_nothing_given_is_the_defaults():
    assert load_settings({}, {}) == Settings()


def test_every_setting_is_a_flag_and_says_what_it_is():
    parser = argparse.ArgumentParser()
    add_flags(parser, NAMES)
    text = parser.format_help()
    for name in NAMES:
        assert describe(name)
        assert f"--{name.replace('_', '-')} " in text
        assert f"[ATTND_{name.upper()}]" in "".join(text.split("\n")).replace(" ", "")


def test_flags_that_were_not_given_are_not_seen():
    assert parse() == {}


def test_a_flag_wins_over_its_variable_which_wins_over_the_default():
    environ = {"ATTND_HTTP_PORT": "8001", "ATTND_GRPC_PORT": "50052"}
    settings = load_settings(parse("--http-port", "8002"), environ)
    assert (settings.http_port, settings.grpc_port, settings.metrics_port) == (8002, 50052, Settings.metrics_port)


def test_other_programs_variables_are_none_of_ours():
    assert load_settings({}, {"HOME": "/root", "HTTP_PORT": "1", "attnd_http_port": "2"}) == Settings()


@pytest.mark.parametrize("key", ["ATTND_HTTP_PROT", "ATTND_", "ATTND_http_port", "ATTND_HTTP-PORT"])
def test_an_unknown_variable_is_an_error_that_names_it_and_the_known_ones(key):
    with pytest.raises(ConfigError, match="is not a setting") as caught:
        load_settings({}, {key: "8001"})
    assert caught.value.param == key
    assert key in caught.value.message
    assert "ATTND_HTTP_PORT" in caught.value.message


MALFORMED = [
    ("host", ""),
    ("host", "  "),
    ("http_port", "eighty"),
    ("http_port", ""),
    ("http_port", "-1"),
    ("http_port", "65536"),
    ("threads", "-1"),
    ("threads", "1.5"),
    ("max_batch_tokens", "0"),
    ("max_queue", "0"),
    ("request_timeout", "0"),
    ("request_timeout", "inf"),
    ("request_timeout", "nan"),
    ("drain_timeout", "-1"),
    ("worker", "nowhere"),
    ("worker", "a:1,b"),
    ("worker", "a:"),
    ("worker", "a:0"),
    ("worker", "a:65536"),
    ("worker", "b:1,localhost:99999"),
    ("worker", "http://localhost:1"),
    ("worker", "localhost/x:1"),
    ("worker", "::1:50051"),
    ("worker", "[::1:50051"),
    ("worker", ":50051"),
    ("provider", "tpu"),
    ("provider_fallback", "perhaps"),
    ("log_level", "loud"),
    ("latency_buckets", "0.1,wide"),
    ("latency_buckets", "0,1"),
    ("latency_buckets", "-1"),
    ("latency_buckets", "0.1,nan"),
    ("latency_buckets", "1,inf"),
    ("latency_buckets", "1,1e999"),
    ("latency_buckets", "0.5,0.1"),
    ("latency_buckets", "0.1,0.1"),
    ("token_buckets", "0.1,0.1"),
    ("token_buckets", "0,1"),
    ("token_buckets", "1,inf"),
    ("vllm_metrics", "perhaps"),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_a_malformed_value_is_an_error_that_names_setting_and_value(name, text):
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {"ATTND_" + name.upper(): text})
    assert name in caught.value.message.lower()
    with pytest.raises(ConfigError) as caught:
        load_settings({name: text}, {})
    assert name.replace("_", "-") in caught.value.message.replace("_", "-")


def test_the_error_shows_the_value_and_where_it_came_from():
    with pytest.raises(ConfigError, match=r"ATTND_HTTP_PORT='eighty' is not valid") as caught:
        load_settings({}, {"ATTND_HTTP_PORT": "eighty"})
    assert caught.value.param == "http_port"
    with pytest.raises(ConfigError, match=r"--http-port='eighty' is not valid"):
        load_settings({"http_port": "eighty"}, {})
    with pytest.raises(ConfigError, match=r"is not valid: an address is HOST:PORT.* got 'b:99999'"):
        load_settings({"worker": "a:1,b:99999"}, {})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("host", " 0.0.0.0 ", "0.0.0.0"),
        ("http_port", "0", 0),
        ("models", "sentiment, ./my-bundle ,", ("sentiment", "./my-bundle")),
        ("models", "", ()),
        ("worker", "a:1,b:2", ("a:1", "b:2")),
        ("worker", "[::1]:50051", ("[::1]:50051",)),
        ("worker", "my_worker-1.a.b:1,127.0.0.1:65535", ("my_worker-1.a.b:1", "127.0.0.1:65535")),
        ("provider", "cuda", "cuda"),
        ("provider_fallback", "true", True),
        ("log_requests", "0", False),
        ("request_timeout", "0.25", 0.25),
        ("latency_buckets", "0.001,0.1,5", (0.001, 0.1, 5.0)),
        ("vllm_metrics", "true", True),
    ],
)
def test_text_becomes_the_settings_own_type(name, text, value):
    got = getattr(load_settings({name: text}, {}), name)
    assert got == value
    assert type(got) is type(value)


def test_a_request_larger_than_the_queue_could_never_be_admitted():
    with pytest.raises(ConfigError, match=r"max_inputs \(20\) must not be over max_queue \(10\)"):
        load_settings({"max_inputs": "20", "max_queue": "10"}, {})


def test_an_api_key_is_not_repeated_in_an_error():
    with pytest.raises(ConfigError) as caught:
        load_settings({}, {"ATTND_API_KEY": "s3cret", "ATTND_HTTP_PORT": "x"})
    assert "s3cret" not in caught.value.message


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Settings().http_port = 1  # type: ignore[misc]

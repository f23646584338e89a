from __future__ import annotations

from urllib.parse import quote

import pytest

from tracking.redaction import (
    MASK,
    collect_argument_secrets,
    collect_secrets,
    has_secret_settings,
    is_secret_name,
    mask_arguments,
    redact,
    redact_address,
    redact_code,
    redact_value,
    strip_url,
)


def test_redact_removes_the_credentials_of_every_url():
    text = "a https://u:p@h/x?y=1 'postgresql://me:p%40w@db' and http://tok@h"
    assert redact(text) == "a https://h/x?y=1 'postgresql://db' and http://h"


def test_redact_removes_a_password_with_an_at_sign():
    assert redact("https://me:p@ss@example.org/x") == "https://example.org/x"


def test_redact_leaves_text_without_credentials_as_it_is():
    text = "git@host:me/x.git http://h/a@b mail me@x.org sqlite:////tmp/a.db"
    assert redact(text) == text


def test_redact_masks_values_of_variables_named_like_secrets():
    environment = {
        "MLFLOW_TRACKING_PASSWORD": "hunter22",
        "AWS_SECRET_ACCESS_KEY": "hunter22-long",
        "MY_TOKEN": "abc",  # so short that it would mask half a text
        "HOME": "/home/me",
    }
    secrets = collect_secrets(environment)
    assert secrets == ("hunter22-long", "hunter22")
    assert redact("x hunter22-long y hunter22", secrets) == "x *** y ***"


def test_mask_arguments_hides_values_of_arguments_named_like_secrets():
    line = ["x.py", "--api-key", "k", "--hub_token=t", "PASSWORD=p", "--lr", "0.1"]
    assert mask_arguments(line) == [
        *("x.py", "--api-key", "***", "--hub_token=***", "PASSWORD=***", "--lr", "0.1")
    ]
    assert mask_arguments(["--token", "--lr"]) == ["--token", "--lr"]
    assert mask_arguments(["http://u:p@h/x"]) == ["http://h/x"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@example.org:8080/x", "https://example.org:8080/x"),
        ("https://token@example.org/x?key=1", "https://example.org/x"),
        ("sqlite:///mlflow.db", "sqlite:///mlflow.db"),
        ("no url", "no url"),
        ("http://[broken", "***"),
    ],
)
def test_strip_url_keeps_scheme_host_and_path(text, shown):
    assert strip_url(text) == shown


@pytest.mark.parametrize(
    "name",
    ["API_KEY", "--hub-token", "hubToken", "DB_PASSWORD", "aws_secret_access_key"],
)
def test_name_with_a_word_of_secrets_is_secret(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("num_tokens", "max_token", "TOKENIZER_DIR", "token_dim", "pad_token"),
        *("TOKEN_FILE", "secretary", "key", "keys", "passes", "author", "monkey"),
    ],
)
def test_name_that_only_resembles_a_secret_is_none(name):
    assert not is_secret_name(name)


def test_path_in_a_variable_of_a_secret_is_no_secret(tmp_path):
    assert collect_secrets({"TOKEN": str(tmp_path), "MY_SECRET": "./folder"}) == ()


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--set", "num_tokens=8"], ["--set", "num_tokens=8"]),
        (["--tokenizer", "gpt2"], ["--tokenizer", "gpt2"]),
        (["--set", "token=None"], ["--set", "token=None"]),
        (["db=postgres://u:pw@h/x"], ["db=postgres://h/x"]),
        (["-H", "Authorization: Bearer abc def"], ["-H", "Authorization: ***"]),
        (["--header=X-Api-Key: abc"], ["--header=X-Api-Key: ***"]),
        (["-p", "hunter2"], ["-p", "***"]),
        (["-p", "8080"], ["-p", "8080"]),
        (["-u", "me:pw"], ["-u", "***"]),
        (["-u", "train.py"], ["-u", "train.py"]),
        (["http://h/?password=X&a=1"], ["http://h/?password=***&a=1"]),
        (['{"api_key": "abc", "n": 1}'], ['{"api_key": "***", "n": 1}']),
    ],
)
def test_mask_arguments_of_many_forms(words, shown):
    assert mask_arguments(words) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("login {'password': 'x1', 'user': 'me'}", "login {'password': '***', 'user': 'me'}"),
        ("connect(host='h', api_key='x1')", "connect(host='h', api_key='***')"),
        ("401 for http://h/?token=x1&n=2", "401 for http://h/?token=***&n=2"),
        ("--token x1 failed", "--token *** failed"),
        ("key hf_abcdefghijklmnopqrst is old", "key *** is old"),
        ("Authorization: Basic dTpw", "Authorization: ***"),
        ("expected num_tokens=8, got 9", "expected num_tokens=8, got 9"),
        ("unexpected token: foo", "unexpected token: foo"),
        ("KeyError: 'api_key'", "KeyError: 'api_key'"),
    ],
)  # fmt: skip
def test_redact_of_secrets_quoted_in_messages(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize(
    "words",
    [
        ["--token", 'hun"ter/2 x'],
        ["api_key=hunter22"],
        ["db=postgres://u:hunter22@h"],
        ["-H", "Authorization: Bearer hunter22"],
        ["-p", "hun"],
    ],
)
def test_masked_argument_is_masked_in_messages_too(words):
    secrets = collect_argument_secrets(words)
    value = words[-1].removeprefix("api_key=").removeprefix("db=postgres://u:")
    value = value.removesuffix("@h").removeprefix("Authorization: Bearer ")
    for text in (
        f"got {value}.",
        f"got {value!r}.",
        f"at http://h/{quote(value, '')} x",
    ):
        assert value not in redact(text, secrets)
        assert quote(value, "") not in redact(text, secrets)
        assert MASK in redact(text, secrets)
    assert redact("the hunt", secrets) == "the hunt"


def test_address_that_is_a_path_is_never_masked():
    assert redact_address("sqlite:////home/alice7/x.db", ["alice7"]) == (
        "sqlite:////home/alice7/x.db"
    )
    assert redact_address("http://u:p@h/alice7", ["alice7"]) == "http://h/***"


def test_redact_code_masks_texts_and_leaves_names():
    code = (
        'api_key = "x1"\nlogin(token=read_token(), password=PASSWORD)\nnum_tokens = 8'
    )
    assert redact_code(code) == code.replace("x1", MASK)


@pytest.mark.parametrize(
    ("text", "has_some"),
    [
        ("+api_key: abc", True),
        ("+  token = abc", True),
        ('+ "password": "x1",', True),
        ("+num_tokens: 8", False),
        ("+password: ${PASSWORD}", False),
        ("+token: null", False),
    ],
)
def test_settings_with_secrets_are_found(text, has_some):
    assert has_secret_settings(text) is has_some


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("api_key", "abc", "***"),
        ("api_key", "", ""),
        ("num_tokens", "8", "8"),
        ("token", "<eos>", "<eos>"),
        ("token", "[CLS]", "[CLS]"),
        ("token", 7, 7),
        ("password", None, None),
        ("auth", True, True),
        ("url", "https://me:pw@h/x?password=X&n=1", "https://h/x?password=***&n=1"),
        ("command", ["x", "--token", "abc"], ["x", "--token", "***"]),
        ("command", ["x", "-Dpassword=abc"], ["x", "-Dpassword=***"]),
        ("db", {"user": "me", "password": "p"}, {"user": "me", "password": "***"}),
        ("many", [{"secret": "p"}, ("a", 1)], [{"secret": "***"}, ("a", 1)]),
        ("text", "the key is hunter22", "the key is ***"),
        ("tokenizer", "gpt2", "gpt2"),
    ],
)
def test_redact_value_masks_secrets_and_nothing_else(name, value, shown):
    assert redact_value(name, value, ["hunter22"]) == shown


@pytest.mark.parametrize(
    "text", ["a", "a.", "x-", "-", "a b ", "a=' ", "x-key-", "://a"]
)
def test_redact_of_a_long_text_costs_its_length(text):
    # A cost by the square of the length would take minutes.
    long = text * (200_000 // len(text))
    assert redact(f"{long} password=hunter2") == redact(long) + f" password={MASK}"

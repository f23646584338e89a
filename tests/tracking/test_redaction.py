from __future__ import annotations

import pytest

from tracking.redaction import collect_secrets, mask_arguments, redact, strip_url


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

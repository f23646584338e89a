from __future__ import annotations

from tracking.redaction import redacted, secrets_in


def test_credentials_of_every_url_are_taken_out():
    text = "a https://u:p@h/x?y=1 'postgresql://me:p%40w@db' and http://tok@h"
    assert redacted(text) == "a https://h/x?y=1 'postgresql://db' and http://h"


def test_text_without_credentials_stays_as_it_is():
    text = "git@host:me/x.git http://h/a@b mail me@x.org sqlite:////tmp/a.db"
    assert redacted(text) == text


def test_values_of_variables_named_like_secrets_are_masked():
    environment = {
        "MLFLOW_TRACKING_PASSWORD": "hunter22",
        "AWS_SECRET_ACCESS_KEY": "hunter22-long",
        "MY_TOKEN": "abc",  # so short that it would mask half a text
        "HOME": "/home/me",
    }
    secrets = secrets_in(environment)
    assert secrets == ("hunter22-long", "hunter22")
    assert redacted("x hunter22-long y hunter22", secrets) == "x *** y ***"

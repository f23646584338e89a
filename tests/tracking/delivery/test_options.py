from __future__ import annotations

import pytest

import tracking
from tracking.delivery.options import DeliveryOptions, check_options, read_options
from tracking.errors import InvalidFileError


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (
            {"per_kay": 3},
            ValueError,
            "expected per_key, patience_s or wait_s, got 'per_kay'",
        ),
        ({"per_key": 1}, ValueError, "a whole number of at least 2, got 1"),
        ({"per_key": 2.5}, TypeError, "a whole number of at least 2, got 2.5"),
        ({"patience_s": -1}, ValueError, "a number of at least 0, got -1"),
        ({"wait_s": "long"}, TypeError, "a number of at least 0, got 'long'"),
    ],
)
def test_wrong_options_are_refused_at_the_start(options, error, match):
    with pytest.raises(error, match=match):
        check_options(options)


def test_defaults_are_ten_thousand_points_and_a_minute():
    assert check_options(None) == DeliveryOptions(per_key=10_000, patience_s=60.0)
    assert check_options({"per_key": None}).per_key is None


def test_options_that_somebody_wrote_into_a_manifest_are_an_error_of_that_run(record):
    manifest = tracking.open(record().path).manifest
    manifest.delivery = {"per_key": "x"}
    with pytest.raises(InvalidFileError, match=f"run {manifest.id}: .* got 'x'"):
        read_options(manifest)

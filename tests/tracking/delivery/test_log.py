from __future__ import annotations

import logging
import re

import pytest

from tracking.delivery.log import MAX_BYTES, log_to_file

_log = logging.getLogger("tracking.delivery.test")


@pytest.fixture
def run_path(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "delivery").mkdir()
    return tmp_path


def redact(text):
    return text.replace("hunter2", "***")


def test_record_becomes_a_line_with_time_and_level(run_path):
    with log_to_file(run_path, redact):
        _log.info("MLflow answers %s", "again")
    line = (run_path / "delivery" / "log.txt").read_text()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO MLflow answers again\n", line
    )


def test_secrets_are_masked_in_messages_arguments_and_tracebacks(run_path):
    with log_to_file(run_path, redact):
        _log.warning("the password is hunter2")
        _log.warning("the password is %s", "hunter2")
        try:
            raise ValueError("wrong password: hunter2")
        except ValueError:
            logging.getLogger("sqlalchemy").exception("failed")
    text = (run_path / "delivery" / "log.txt").read_text()
    assert "hunter2" not in text
    assert text.count("***") == 4  # the raise statement too


def test_large_log_is_rotated_once(run_path):
    line = "x" * 1000
    with log_to_file(run_path, redact):
        for _ in range(3 * MAX_BYTES // len(line)):
            _log.info(line)
    files = {path.name: path for path in (run_path / "delivery").iterdir()}
    assert files.keys() == {"log.txt", "log.txt.1"}
    assert all(path.stat().st_size <= MAX_BYTES for path in files.values())


def test_log_ends_with_the_block(run_path):
    with log_to_file(run_path, redact):
        _log.info("inside")
    _log.info("outside")
    assert "outside" not in (run_path / "delivery" / "log.txt").read_text()


def test_log_that_is_a_link_is_replaced(run_path, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (run_path / "delivery" / "log.txt").symlink_to(precious)
    with log_to_file(run_path, redact):
        _log.info("a line")
    assert precious.read_text() == "mine"
    assert "a line" in (run_path / "delivery" / "log.txt").read_text()

"""What the doctor finds, on this machine and where things are missing."""

from __future__ import annotations

import http.server
import socket
import threading
from pathlib import Path

import pytest

from harness.cli import doctor
from harness.cli.doctor import examine
from tracking.durable import FolderReport
from tracking.durable.filesystem import Filesystem


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, doctor.Check]:
    """All checks, by name."""
    folder = tmp_path_factory.mktemp("doctor")
    found = examine(folder / "runs", f"sqlite:///{folder}/mlflow.db")
    assert not (folder / "mlflow.db").exists()
    assert not (folder / "runs").exists()
    return {one.name: one for one in found}


@pytest.mark.slow
def test_examine_looks_at_everything(checks: dict[str, doctor.Check]) -> None:
    assert list(checks)[:10] == [
        "Python",
        "devices",
        "precision",
        "ranks",
        "DeepSpeed",
        "DeepSpeed's ops",
        "compiler",
        "MPI",
        "MLflow",
        "MLflow store",
    ]
    assert {"disk"} <= set(checks)


@pytest.mark.slow
def test_examine_says_what_to_do_about_each_limitation(
    checks: dict[str, doctor.Check],
) -> None:
    for one in checks.values():
        assert one.detail
        assert bool(one.advice) == (one.state != "ok"), one


@pytest.mark.slow
def test_examine_is_quiet(
    checks: dict[str, doctor.Check], capfd: pytest.CaptureFixture[str]
) -> None:
    list(doctor._deepspeed())
    assert capfd.readouterr() == ("", "")


def test_precision_says_how_to_take_bf16_at_zero_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    found = doctor._precision()
    assert found.state == "ok"
    assert "at ZeRO 0 use --precision" in found.detail


def test_ops_that_cannot_be_built_are_a_limitation() -> None:
    found = doctor._ops(
        {"built": ["async_io"], "can be built": [], "cannot be built": ["cpu_adam"]}
    )
    assert found.state == "limited"
    assert found.detail.startswith("built: async_io; cannot be built: cpu_adam")
    assert doctor._ops({"built": [], "can be built": ["cpu_adam"]}).state == "ok"


def test_store_in_a_missing_folder_is_broken(tmp_path: Path) -> None:
    found = doctor._store(f"sqlite:///{tmp_path}/none/mlflow.db")
    assert found.state == "broken"
    assert "does not exist" in found.detail


def test_server_that_does_not_answer_is_a_limitation() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        uri = f"http://someone:secret@127.0.0.1:{held.getsockname()[1]}"
        found = doctor._store(uri)
    assert found.state == "limited"
    assert "harness sync" in found.advice
    assert "secret" not in found.detail


@pytest.mark.parametrize(("path", "extra"), [("", ""), ("/closed", " (answers 404)")])
def test_server_that_answers_is_well(path: str, extra: str) -> None:
    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}{path}"
        found = doctor._store(uri)
        thread.join()
    assert (found.state, found.detail) == ("ok", uri + extra)


def test_little_disk_is_a_limitation(tmp_path: Path) -> None:
    found = doctor._disk(tmp_path / "runs", min_free_bytes=2**70)
    assert found.state == "limited"
    assert "GB free for" in found.detail


@pytest.mark.parametrize(
    ("name", "options", "problems", "state", "detail"),
    [
        (
            "ext4",
            [],
            {},
            "ok",
            "ext4: renames, locks, locks seen by other machines, maps",
        ),
        (
            "lustre",
            [],
            {"lock": "ENOSYS"},
            "limited",
            "lustre: renames; no locks, no maps",
        ),
        (
            "nfs",
            ["local_lock=all"],
            {},
            "limited",
            "nfs: renames, locks; no locks seen by other machines, no maps",
        ),
        (
            "ext4",
            [],
            {"write": "Read-only"},
            "broken",
            "ext4, to write fails: Read-only",
        ),
    ],
)
def test_runs_folder_is_described_by_what_works(name, options, problems, state, detail):
    filesystem = Filesystem(name, frozenset(options))
    found = doctor._runs_folder(FolderReport(filesystem, problems))
    assert (found.state, found.detail) == (state, detail)
    assert bool(found.advice) == (state != "ok")

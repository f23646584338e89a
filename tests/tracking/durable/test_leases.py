"""Who writes a run, where locks fail and where the writer is on another machine.

A library that is loaded before the C library answers in its place: the calls of Python are
the real ones.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

import tracking
from tracking.durable import LockHeldError, ProcessLock, find_holder, leases
from tracking.durable.filesystem import Filesystem
from tracking.durable.leases import STALE_S, Lease, ProcessId, judge
from tracking.durable.locks import get_lease_path

ROOT = Path(tracking.__file__).parents[1]

WRITER = """
import sys, tracking
with tracking.start(runs_dir=sys.argv[1], delivery=False) as run:
    for n in range(3):
        run.log_metric("loss", n / 2, index=n + 1)
    print(run.path, flush=True)
    sys.stdin.read()
"""

LOOKER = """
import json, sys, tracking
from click.testing import CliRunner
from tracking.cli.commands import runs
path, *words = sys.argv[1:]
name, folder = path.rpartition("/")[::-2]
def call(*words):
    done = CliRunner().invoke(runs, [*words, "--runs-dir", folder])
    return f"{done.exit_code} {done.output} {done.exception or ''}"
found = {"status": tracking.open(path).status}
found["rows"] = tracking.open(path).records(what="metrics").num_rows
if "release" in words:
    found["release"] = call("release", name, "--yes")
found["show"] = json.loads(call("show", name, "--json")[2:])["writer"]
try:
    with tracking.start(run_id=name, runs_dir=folder, delivery=False) as run:
        found["start"] = run.status
except tracking.RunBusyError as error:
    found["start"] = str(error)
if "delete" in words:
    found["delete"] = call("delete", name, "--yes")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def preloaded(tmp_path_factory):
    """The library; skipped where it cannot be made or loaded."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs cc and Linux")
    library = tmp_path_factory.mktemp("library") / "preloaded.so"
    source = Path(__file__).with_name("preloaded.c")
    command = [compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return str(library)


@pytest.fixture
def elsewhere(preloaded, tmp_path):
    """Environment of a process on another machine that has no locks."""
    (tmp_path / "boot").write_text("another-boot\n")
    return {
        "LD_PRELOAD": preloaded,
        "FAKE_LOCK_ERRNO": str(errno.ENOLCK),
        "FAKE_HOST": "node7",
        "FAKE_BOOT": str(tmp_path / "boot"),
    }


def run_python(script, *words, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def write_run(folder, **environment):
    """A process that writes a run, and the run's folder."""
    writer = run_python(WRITER, folder, **environment)
    path = Path(writer.stdout.readline().strip())
    assert path.is_dir()
    return writer, path


def kill(writer):
    writer.kill()
    writer.communicate()


def look(path, *words, **environment):
    output, _ = run_python(LOOKER, path, *words, **environment).communicate(timeout=120)
    return json.loads(output)


def lease_of(path):
    return path / "records" / "0" / "lock.lease"


def make_stale(path):
    then = time.time() - 2 * STALE_S
    os.utime(lease_of(path), (then, then))


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_run_without_locks_has_one_writer_until_that_is_killed(
    tmp_path, preloaded, number
):
    no_locks = {"LD_PRELOAD": preloaded, "FAKE_LOCK_ERRNO": str(number)}
    writer, path = write_run(tmp_path, **no_locks)
    writer.send_signal(signal.SIGSTOP)
    make_stale(path)  # it is slow, and lives all the same
    name = f"process {writer.pid} on "
    for environment in (no_locks, {}):
        found = look(path, "delete", **environment)
        assert (found["status"], found["rows"]) == ("running", 3)
        assert (
            "expected a run that no process is writing, got one held by " + name
            in (found["start"])
        )
        assert f"still being written by {name}" in found["delete"]
    kill(writer)
    found = look(path, "delete", **no_locks)
    assert (found["status"], found["rows"], found["start"]) == ("killed", 3, "running")
    assert found["delete"].startswith("0")
    assert not path.exists()


@pytest.mark.slow
def test_writer_on_another_machine_is_taken_for_ended_by_nobody_but_a_person(
    tmp_path, preloaded, elsewhere
):
    no_locks = {"LD_PRELOAD": preloaded, "FAKE_LOCK_ERRNO": str(errno.ENOSYS)}
    writer, path = write_run(tmp_path, **elsewhere)
    name = f"process {writer.pid} on node7"
    found = look(path, "delete", **no_locks)
    assert (found["status"], found["show"]) == ("running", None)
    assert f"got one held by {name}" in found["start"]
    assert f"still being written by {name}" in found["delete"]
    writer.send_signal(signal.SIGSTOP)
    make_stale(path)
    for environment in (no_locks, {}):  # locks that work here tell nothing of node7
        found = look(path, "delete", **environment)
        assert (found["status"], found["rows"]) == ("unknown", 3)
        assert found["show"].startswith(f"{name} (since 20")
        for text in (found["start"], found["delete"]):
            assert f"may still be written by {name} (since 20" in text
            assert f"then run 'harness runs release {path.name}'" in text
    assert tracking.list_runs(tmp_path)[0].status == "unknown"
    found = look(path, "release", **no_locks)
    assert found["release"].startswith("0")
    assert found["start"] == "running"
    assert tracking.open(path).status == "finished"
    kill(writer)


@pytest.mark.slow
def test_rows_survive_a_kill_where_files_are_not_mapped(tmp_path, elsewhere):
    mounts = tmp_path / "mounts"
    mounts.write_text("1 0 0:40 / / rw - lustre mgs@tcp:/work rw\n")
    writer, path = write_run(tmp_path, **elsewhere, FAKE_MOUNTS=str(mounts))
    maps = Path(f"/proc/{writer.pid}/maps").read_text()
    kill(writer)
    assert str(path) not in maps
    values = tracking.open(path).records(what="metrics")["value"].to_pylist()
    assert values == [0.0, 0.5, 1.0]


# ---------------------------------------------------------------------- what is judged

HERE = ProcessId.here()
AFAR = {"host": "node7", "boot": "other", "machine": "m7"}


@pytest.fixture
def leave(tmp_path):
    """Leave a lease, some of whose fields are another process's."""

    def leave(age_s=0.0, has_lock=True, **changes):
        path = tmp_path / "lock.lease"
        path.unlink(missing_ok=True)
        Lease(path, has_lock=has_lock)
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps(content))
        os.utime(path, (time.time() - age_s,) * 2)
        return path

    return leave


OLD = 2 * STALE_S
DEAD = {"pid": 2**22 + 1}


@pytest.mark.parametrize(
    ("lock", "lease", "state"),
    [
        ("held", {"age_s": OLD} | AFAR, "live"),
        # The same machine: its locks and its processes tell.
        ("free", {}, "ended"),
        ("missing", {"age_s": OLD}, "live"),
        ("missing", {"age_s": OLD} | DEAD, "ended"),
        ("missing", {"age_s": OLD, "began": 7}, "ended"),
        ("missing", {"age_s": OLD, "began": None}, "unknown"),
        ("free", {"age_s": OLD, "has_lock": False}, "live"),
        ("missing", {"namespace": "pid:[7]"}, "live"),
        ("missing", {"age_s": OLD, "namespace": "pid:[7]"}, "unknown"),
        # Another machine.
        ("free", AFAR, "live"),
        ("missing", AFAR, "live"),
        ("missing", {"age_s": OLD} | AFAR, "unknown"),
        ("missing", {"age_s": -OLD} | AFAR, "unknown"),  # its clock is wrong
        ("free", {"age_s": OLD, "has_lock": False} | AFAR, "unknown"),
        ("free", {"age_s": OLD} | AFAR, "ended"),  # on a disk of one machine
        # A machine of this name that was started again, if it is this one.
        ("missing", {"boot": "other"}, "live"),
        ("missing", {"age_s": OLD, "boot": "other", "machine": "m7"}, "unknown"),
        # Whatever somebody writes there says as much as an empty file.
        ("missing", {"host": 7}, "live"),
        ("missing", {"age_s": OLD, "pid": "../x"}, "unknown"),
        ("missing", {"age_s": OLD, "pid": 10**30}, "unknown"),
        ("missing", {"age_s": OLD, "pid": -1}, "unknown"),
        ("missing", {"age_s": OLD, "job": "/12", "restart": []} | AFAR, "unknown"),
        ("missing", {"age_s": OLD, "since": 10**400} | AFAR, "unknown"),
        ("missing", {"age_s": OLD, "since": float("nan")} | AFAR, "unknown"),
        ("missing", {"age_s": -1e10} | AFAR, "unknown"),
    ],
)
def test_lease_is_judged(leave, lock, lease, state):
    found = judge(leave(**lease), lock)
    assert found is not None
    assert found.state == state
    assert str(found)


def test_lease_that_nests_deeply_is_as_an_empty_one(leave):
    path = leave()
    path.write_text("[" * 9000)
    assert judge(path, "missing").state == "live"


def test_reboot_and_restart_of_the_job_end_a_stale_lease():
    place = ProcessId(host="node7", machine="m7", boot="first", job="/12", restart=0)
    again = ProcessId(host="node7", machine="m7", boot="second", job="/12", restart=0)
    other = ProcessId(host="node8", machine="m8", boot="third", job="/12", restart=1)
    assert place.was_rebooted(again)
    assert not place.was_rebooted(other)
    assert not place.was_restarted(again)
    assert place.was_restarted(other)
    assert not other.was_restarted(place)
    assert not ProcessId(host="a", boot="1").was_rebooted(ProcessId(host="a", boot="2"))
    inside = ProcessId(host="node7", machine="m7", boot="second", namespace="pid:[7]")
    assert not place.was_rebooted(inside)


def test_machine_that_was_cloned_while_it_ran_is_another_one():
    place = ProcessId(host="node7", machine="m7", boot="first", namespace="pid:[1]")
    assert place.has_same_kernel(replace(place, pid=7))
    assert not place.has_same_kernel(replace(place, host="node8"))
    assert place.has_same_kernel(replace(place, host="box", namespace="pid:[7]"))


def test_lease_of_a_copied_folder_is_that_of_an_ended_process(leave, tmp_path):
    path = leave(**AFAR)
    copy = tmp_path / "copy.lease"
    shutil.copy2(path, copy)
    assert judge(copy, "missing").state == "ended"
    assert judge(copy, "held") is None
    assert find_holder(tmp_path / "copy") is None
    ProcessLock(tmp_path / "copy").release()
    assert not copy.exists()
    path.rename(tmp_path / "moved.lease")
    assert judge(tmp_path / "moved.lease", "missing").state == "live"


@pytest.mark.parametrize("target", ["nowhere", "lock.lease", "precious"])
def test_lease_that_is_a_link_is_replaced_and_not_followed(tmp_path, target):
    (tmp_path / "precious").write_text("mine")
    get_lease_path(tmp_path / "lock").symlink_to(tmp_path / target)
    lock = ProcessLock(tmp_path / "lock")
    assert not get_lease_path(tmp_path / "lock").is_symlink()
    lock.release()
    assert [path.name for path in tmp_path.iterdir() if path.name != "lock"] == [
        "precious"
    ]


def test_lease_that_another_process_has_just_taken_is_not_removed(tmp_path):
    path = tmp_path / "lock.lease"
    lease = Lease(path, has_lock=False)
    leases.remove(path, "missing")  # it was found to be that of an ended process before
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert [one.name for one in tmp_path.iterdir()] == ["lock.lease"]
    assert lease.beat()
    lease.release()


def give_another_inode(path):
    """As sshfs does, where a file was not used for a while, or on another machine."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


@pytest.mark.parametrize("name", ["fuse", "cifs", ""])
def test_lease_stays_where_inodes_change(name, leave, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "get_filesystem", lambda folder: Filesystem(name))
    path = leave(**AFAR)
    give_another_inode(path)
    assert judge(path, "missing").process.host == AFAR["host"]
    lock = ProcessLock(tmp_path / "own")
    own = get_lease_path(tmp_path / "own")
    before = own.stat().st_ino
    give_another_inode(own)
    assert own.stat().st_ino != before
    lock._lease._due = 0.0
    os.utime(own, (1, 1))
    assert lock.beat()
    assert own.stat().st_mtime > 1
    lock.release()
    assert not own.exists()


def test_lease_that_another_process_took_over_is_lost_where_inodes_change(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(leases, "get_filesystem", lambda folder: Filesystem("fuse"))
    lock = ProcessLock(tmp_path / "own")
    own = get_lease_path(tmp_path / "own")
    own.write_text(json.dumps(json.loads(own.read_text()) | {"since": 1.0}))
    lock._lease._due = 0.0
    assert not lock.beat()
    lock.release()
    assert own.exists()


def test_empty_lease_is_live_while_it_is_made_and_ended_after_a_power_cut(leave):
    path = leave()
    path.write_text("")
    assert judge(path, "missing").state == "live"
    os.utime(path, (time.time() - OLD,) * 2)
    assert judge(path, "missing").state == "unknown"
    assert judge(path, "free").state == "ended"


def test_lock_waits_for_a_writer_that_was_killed_on_another_machine(leave, tmp_path):
    path = leave(age_s=STALE_S - 0.5, **AFAR)
    with pytest.warns(
        tracking.TrackingWarning,
        match="process .* on node7, which may have been killed",
    ):
        lock = ProcessLock(tmp_path / "lock")
    assert json.loads(path.read_text())["host"] == HERE.host
    assert find_holder(tmp_path / "lock").process == HERE
    lock.release()
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:.* may have been killed")
def test_one_thread_of_a_process_takes_a_lock(leave, tmp_path):
    leave(age_s=STALE_S - 1, **AFAR)
    path, taken = tmp_path / "lock", []
    first = threading.Thread(target=lambda: taken.append(ProcessLock(path)))
    first.start()
    while find_holder(path).process != HERE:
        time.sleep(0.001)
    with pytest.raises(LockHeldError, match="this one"):  # the first waits still
        ProcessLock(path)
    first.join()
    taken[0].release()
    second = ProcessLock(path)
    taken[0].release()
    assert find_holder(path).process == HERE
    second.release()


def test_lease_says_when_another_process_has_taken_it_over(leave, tmp_path):
    lock = ProcessLock(tmp_path / "lock")
    path = tmp_path / "lock.lease"
    lock._lease._due = 0.0
    path.unlink()
    assert lock.beat()  # written again
    assert path.exists()
    lock._lease._due = 0.0
    path.rename(tmp_path / "old")
    leave()
    assert not lock.beat()
    lock.release()
    assert path.exists()


SAVER = """
import pathlib, sys
from tracking.durable import replace_folder
with replace_folder(pathlib.Path(sys.argv[1])) as temporary:
    print(temporary.name, flush=True)
    sys.stdin.read(1)
"""


def test_folder_without_locks_is_removed_only_once_its_writer_has_ended(
    tmp_path, preloaded, elsewhere
):
    here = {"LD_PRELOAD": preloaded, "FAKE_LOCK_ERRNO": str(errno.ENOLCK)}
    killed, live = (run_python(SAVER, tmp_path / "model", **here) for _ in range(2))
    afar = run_python(SAVER, tmp_path / "model", **elsewhere)
    names = [one.stdout.readline().strip() for one in (killed, live, afar)]
    for one in (killed, afar):
        kill(one)
    run_python(SAVER, tmp_path / "model", **here).communicate("x", timeout=60)
    kept = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert kept == {"model", *names[1:]}
    live.communicate("x", timeout=60)

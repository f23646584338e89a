from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest

from tracking.durable import LockHeldError, ProcessLock, find_holder, hold_lock, locks
from tracking.durable.filesystem import Filesystem
from tracking.durable.locks import get_lease_path
from tracking.errors import TrackingWarning

TRY = """
import sys
from pathlib import Path
from tracking.durable import LockHeldError, ProcessLock, find_holder, hold_lock
path = Path(sys.argv[1])
print(find_holder(path) is not None)
try:
    ProcessLock(path)
except LockHeldError as error:
    print(error)
with hold_lock(path.with_name("other"), 0) as is_held:
    print(is_held)
"""


def run_script(script, path, cwd):
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()


def test_process_lock_is_seen_by_this_and_other_processes(tmp_path, root):
    path = tmp_path / "lock"
    assert not find_holder(path)
    lock = ProcessLock(path)
    assert find_holder(path)
    with pytest.raises(LockHeldError, match=r"process \d+ \(this one\)"):
        ProcessLock(path)
    seen, holder, _ = run_script(TRY, path, root)
    assert seen == "True"
    assert holder.startswith(f"process {os.getpid()} on ")
    lock.release()
    lock.release()
    assert not find_holder(path)
    assert run_script(TRY, path, root) == ["False", "True"]


FORKED = """
import os, sys
from pathlib import Path
from tracking.durable import ProcessLock, find_holder
paths = Path(sys.argv[1], "released"), Path(sys.argv[1], "held")
locks = [ProcessLock(path) for path in paths]
released, release = os.pipe()
pid = os.fork()
if not pid:
    os.read(released, 1)
    locks[0].release()  # does nothing in the child
    print([find_holder(path) is not None for path in paths], flush=True)
    os._exit(0)
locks[0].release()
os.write(release, b".")
os.waitpid(pid, 0)
"""


def test_process_lock_is_not_held_by_a_forked_child(tmp_path, root):
    assert run_script(FORKED, tmp_path, cwd=root) == ["[False, True]"]


def test_hold_lock_excludes_others_until_the_block_ends(tmp_path, root):
    path = tmp_path / "other"
    with hold_lock(path) as is_held:
        assert is_held
        with hold_lock(path, timeout_s=0) as is_held_twice:
            assert not is_held_twice
        assert run_script(TRY, tmp_path / "lock", root)[-1] == "False"
    assert run_script(TRY, tmp_path / "lock", root)[-1] == "True"


@pytest.mark.parametrize("timeout_s", [None, 60])
def test_hold_lock_waits_for_the_holder(tmp_path, timeout_s):
    path = tmp_path / "lock"
    holding, release = threading.Event(), threading.Event()

    def hold():
        with hold_lock(path):
            holding.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    holding.wait(60)
    threading.Timer(0.05, release.set).start()
    with hold_lock(path, timeout_s) as is_held:
        assert is_held
        assert release.is_set()
    holder.join()


def test_lock_file_that_is_a_link_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="lock"):
        ProcessLock(tmp_path / "lock")
    assert precious.read_text() == "mine"


def test_lock_file_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "lock")
    assert not find_holder(tmp_path / "lock")


AFAR = """
import fcntl, json, os, sys, time
from pathlib import Path
path, lives = Path(sys.argv[1]), sys.argv[2] == "lives"
lock, lease = path.open("w+"), path.with_name(path.name + ".lease")
fcntl.lockf(lock, fcntl.LOCK_EX)
place = {"host": "node7", "machine": "m7", "boot": "another", "pid": 12, "began": 1}
lease.touch()
text = {**place, "since": 0, "has_lock": True, "file": lease.stat().st_ino}
lease.write_text(json.dumps(text))
print("held", flush=True)
sys.stdin.readline()
time.sleep(1.5)
if lives:
    lease.write_text(lease.read_text())
    sys.stdin.readline()
lease.unlink()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lives", [False, True])
def test_lock_of_a_machine_that_is_gone_is_waited_for(lives, tmp_path, root):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", AFAR, str(path), "lives" if lives else "gone"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        holder.stdin.write("\n")
        holder.stdin.flush()
        told = r"on node7, which may have been killed\. This process waits up to 120 s"
        refused = pytest.raises(LockHeldError, match="process 12 on node7")
        with (
            pytest.warns(TrackingWarning, match=told),
            refused if lives else nullcontext(),
        ):
            ProcessLock(path).release()
        holder.communicate("\n")


def test_block_that_holds_a_lock_has_a_lease_where_locks_are_not_shared(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(locks, "get_filesystem", lambda folder: Filesystem("fuse"))
    path = tmp_path / "lock"
    with hold_lock(path, 0) as is_held:
        assert is_held
        assert get_lease_path(path).exists()
        with hold_lock(path, 0) as is_held_twice:
            assert not is_held_twice
    assert not get_lease_path(path).exists()

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import compute as pc

from tests.tracking.tables import floats, same
from tracking.errors import RunBusyError, RunClosedError, TrackingWarning
from tracking.journal import row_format
from tracking.journal.block import AutoIndex, Block, DiskBlock, KeyGroup
from tracking.journal.reader import JournalReader, read_block, read_records
from tracking.journal.segment import CAPACITY
from tracking.journal.writer import Journal
from tracking.schema import FLOAT, SCHEMA, flatten_value, parse_value
from tracking.store import is_being_written


@pytest.fixture
def rank_dir(tmp_path):
    return tmp_path / "a-run" / "records" / "0"


def put(journal, value, **counts):
    journal.write("metrics", "train", flatten_value(value, "test"), **counts)


def run_script(script, *args, cwd):
    return subprocess.run(
        # Python 3.12 and later warn of a fork beside threads.
        [sys.executable, "-W", "ignore:This process", "-c", script, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ------------------------------------------------------------------------ writing


def test_journal_rows_are_there_before_and_after_close(rank_dir):
    journal = Journal(rank_dir)
    put(journal, {"loss": 0.5, "name": "x"}, index=1, epoch=2, step=3)
    before, damage = read_records(rank_dir)
    journal.close()
    after, damage_after = read_records(rank_dir)
    assert same(before, after)
    assert damage == damage_after == []
    assert before.schema == SCHEMA
    row = before.to_pylist()[0]
    assert row.pop("time").timestamp() == pytest.approx(time.time(), abs=60)
    assert row == {
        "seq": 0,
        "rank": 0,
        "what": "metrics",
        "set": "train",
        "name": "loss",
        "index": 1,
        "epoch": 2,
        "step": 3,
        "value": 0.5,
        "payload": None,
        "kind": "float",
    }
    assert sorted(p.name for p in rank_dir.iterdir()) == ["000000.arrow", "lock"]


def test_journal_full_blocks_are_sealed_while_it_is_written(rank_dir, until):
    journal = Journal(rank_dir)
    journal.write("m", "s", (("x", FLOAT, float(i), None) for i in range(40_000)))
    until(lambda: (rank_dir / "000001.arrow").exists())
    assert not (rank_dir / "000000.rows").exists()
    assert floats(read_records(rank_dir)[0]) == list(range(40_000))
    journal.close()
    table, damage = read_records(rank_dir)
    assert floats(table) == list(range(40_000))
    assert table["seq"].to_pylist() == list(range(40_000))
    assert damage == []


def test_journal_reopened_continues_in_a_new_block(rank_dir):
    for value in (1.0, 2.0):
        journal = Journal(rank_dir)
        put(journal, value)
        journal.close()
    table, damage = read_records(rank_dir)
    assert table["seq"].to_pylist() == [0, CAPACITY]
    assert damage == []


def test_journal_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        Journal(tmp_path / "file" / "0")


def test_journal_write_after_close_is_refused(rank_dir):
    journal = Journal(rank_dir)
    journal.close()
    journal.close()
    with pytest.raises(RunClosedError, match=r"expected a run that is open.*a-run"):
        put(journal, 1.0)


def test_journal_that_begins_to_close_is_sealed_and_stays_locked_until_it_is_closed(
    rank_dir, until
):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    journal.begin_close()
    with pytest.raises(RunClosedError, match=r"expected a run that is open"):
        put(journal, 2.0)
    until(lambda: list(rank_dir.glob("*.arrow")))  # beside what the caller does
    assert is_being_written(rank_dir)
    journal.close()
    assert not is_being_written(rank_dir)
    assert floats(read_records(rank_dir)[0]) == [1.0]


def test_journal_second_writer_in_this_process_is_refused(rank_dir):
    journal = Journal(rank_dir)
    with pytest.raises(
        RunBusyError, match=r"expected a run that no process is writing"
    ):
        Journal(rank_dir)
    assert is_being_written(rank_dir)
    put(journal, 1.0)
    journal.close()
    assert not is_being_written(rank_dir)
    assert floats(read_records(rank_dir)[0]) == [1.0]


SECOND_WRITER = """
import sys
from pathlib import Path
from tracking.store import is_being_written
from tracking.journal.writer import Journal
print(is_being_written(Path(sys.argv[1])))
Journal(Path(sys.argv[1]))
"""


def test_journal_second_writer_elsewhere_is_refused(rank_dir, root):
    journal = Journal(rank_dir)
    done = run_script(SECOND_WRITER, rank_dir, cwd=root)
    assert done.stdout == "True\n"
    assert f"got one held by process {os.getpid()} on" in done.stderr
    assert "RunBusyError" in done.stderr
    journal.close()


def test_journal_threads_lose_and_mix_nothing(rank_dir):
    journal = Journal(rank_dir)

    def work(thread):
        for i in range(2500):
            put(journal, {"float": i + 0.5, "text": str(i)}, index=i, step=thread)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    table, damage = read_records(rank_dir)
    assert damage == []
    assert table.num_rows == 6 * 2500 * 2
    found = {
        (r["step"], r["index"], parse_value(r["kind"], r["value"], r["payload"]))
        for r in table.to_pylist()
    }
    wanted = {
        (thread, i, value)
        for thread in range(6)
        for i in range(2500)
        for value in (i + 0.5, str(i))
    }
    assert found == wanted


def test_auto_index_is_taken_once_among_threads():
    index = AutoIndex()
    taken: list[int] = []

    def work():
        taken.extend(index.next() for _ in range(5000))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 20_001))


def test_auto_index_continues_after_the_highest_index_given():
    index = AutoIndex()
    assert index.next() == 1
    assert index.choose(7, None) == 7
    assert index.choose(3, None) == 3
    assert [index.next(), index.next()] == [8, 9]
    assert index.choose(None, 5) == row_format.NO_COUNT


def test_block_slot_of_a_row_that_failed_is_no_hole(rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    with pytest.raises(struct.error):
        put(journal, 2.0, index="no integer")
    put(journal, 3.0)
    assert floats(JournalReader(rank_dir).read()) == [1.0, 3.0]
    journal.close()
    table, damage = read_records(rank_dir)
    assert (floats(table), damage) == ([1.0, 3.0], [])


def test_journal_many_texts_start_a_new_block(rank_dir, until):
    journal = Journal(rank_dir)
    text = "x" * 1_000_000
    for _ in range(40):
        put(journal, text)
    until(lambda: journal.block.number > 0)
    put(journal, "last")
    journal.close()
    table, damage = read_records(rank_dir)
    assert damage == []
    assert table["payload"].to_pylist() == [f'"{text}"'] * 40 + ['"last"']


def test_journal_synced_to_disk_waits_for_each_file_and_reads_the_same(
    rank_dir, disk_calls
):
    journal = Journal(rank_dir, durability="fsync")
    put(journal, {"a": 1.0, "b": "text"})
    assert read_records(rank_dir)[0].num_rows == 2
    inodes = [path.stat().st_ino for path in row_format.get_block_paths(rank_dir, 0)]
    assert {("fsync", inode) for inode in inodes} <= set(disk_calls)
    named = disk_calls.index(("replace", inodes[0]))
    assert disk_calls.index(("fsync", inodes[0])) < named
    assert ("fsync", rank_dir.stat().st_ino) in disk_calls[named:]
    journal.close()
    assert read_records(rank_dir)[0].num_rows == 2
    sealed = (rank_dir / "000000.arrow").stat().st_ino
    assert disk_calls[-2:] == [("fsync", sealed), ("replace", sealed)]


def test_unmapped_block_synced_to_disk_waits_for_each_row(tmp_path, disk_calls):
    block = DiskBlock(tmp_path, 0, is_synced=True, is_mapped=False)
    group = KeyGroup(AutoIndex())
    block.add_keys(group, "m", "s", ["x"])
    disk_calls.clear()
    block.put(*row_format.encode_row(0, 1, 2, 3, 0.5, 4, group.ids["x"], FLOAT, 0))
    rows, _ = row_format.get_block_paths(tmp_path, 0)
    assert disk_calls == [("fsync", rows.stat().st_ino)]
    block.close(unlink=True)


def test_disk_block_without_mapping_writes_by_call(tmp_path):
    block = DiskBlock(tmp_path, 0, is_synced=False, is_mapped=False)
    assert not isinstance(block._rows, mmap.mmap)
    group = KeyGroup(AutoIndex())
    block.add_keys(group, "m", "s", ["x"])
    assert [next(block.slots) for _ in range(3)] == [0, 1, 2]
    assert block.find_last_slot() == -1
    block.put(*row_format.encode_row(0, 1, 2, 3, 0.5, 4, group.ids["x"], FLOAT, 0))
    block.void(0)
    block.void(1)
    found = read_block(tmp_path, 0)
    assert found is not None
    assert floats(found.table) == [0.5]
    assert found.frontier == 2
    assert block.find_last_slot() == 1
    block.close(unlink=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ death and forks

KILLED = """
import mmap, os, random, signal, sys, threading, time
from pathlib import Path
from tracking.run import Run

folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
NAMES = ("float", "text", "dict", "signal")
acks = mmap.mmap(-1, 8 * len(NAMES))
signals = mmap.mmap(-1, 1 << 16)

def acknowledge(name, i):
    at = 8 * NAMES.index(name)
    acks[at:at + 8] = i.to_bytes(8, "little")

def child(path):
    run = Run(path, None)
    calls = iter(range(1, 1 << 60))
    def handler(*_):
        i = next(calls)
        run.log("signal", "s", float(i), index=i)
        signals[i] = 1  # one each: a handler may come in the middle of another
        acknowledge("signal", i)
    def log(name, value):
        for i in range(1, 1 << 60):
            run.log(name, "s", value(i), index=i)
            acknowledge(name, i)
    threading.Thread(target=log, args=("text", str), daemon=True).start()
    both = lambda i: {"a": i + 0.5, "b": i % 2 == 0, "c": i}
    threading.Thread(target=log, args=("dict", both), daemon=True).start()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
    log("float", float)

for n in range(count):
    acks[:], signals[:] = bytes(len(acks)), bytes(len(signals))
    path = folder / f"run-{n}"
    pid = os.fork()
    if not pid:
        try:
            child(path)
        finally:
            os._exit(1)
    while not all(acks[8 * i] or acks[8 * i + 1] for i in range(len(NAMES))):
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the child died by itself"
        time.sleep(0.0005)
    time.sleep(random.random() * 0.15)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    counts = (int.from_bytes(acks[8 * i:8 * i + 8], "little") for i in range(3))
    print(n, *counts, *(i for i in range(len(signals)) if signals[i]), flush=True)
"""


def values(table, what, name, column="value"):
    rows = pc.and_(pc.equal(table["what"], what), pc.equal(table["name"], name))
    return table.filter(rows)[column].to_pylist()


def check_survived(tmp_path, root, count):
    done = run_script(KILLED, tmp_path, count, 20261122, cwd=root)
    assert done.returncode == 0, done.stderr
    lines = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == count
    for n, num_floats, num_texts, num_dicts, *signals in lines:
        rank_dir = tmp_path / f"run-{n}" / "records" / "0"
        table, damage = read_records(rank_dir)
        # At most the row that each thread was writing, which had not returned.
        assert sum(d.rows_lost for d in damage) <= 3, damage
        assert values(table, "float", "")[:num_floats] == [*range(1, num_floats + 1)]
        assert values(table, "dict", "a")[:num_dicts] == [
            i + 0.5 for i in range(1, num_dicts + 1)
        ]
        assert values(table, "dict", "b")[:num_dicts] == [
            float(i % 2 == 0) for i in range(1, num_dicts + 1)
        ]
        assert values(table, "dict", "c")[:num_dicts] == [*range(1, num_dicts + 1)]
        assert values(table, "text", "", "payload")[:num_texts] == [
            f'"{i}"' for i in range(1, num_texts + 1)
        ]
        assert set(values(table, "signal", "")) >= {*map(float, signals)}
        # Recovered, it holds the same.
        journal = Journal(rank_dir)
        put(journal, 1.0)
        journal.close()
        again = read_records(rank_dir)[0]
        assert same(again.slice(0, table.num_rows), table)
        assert again.num_rows == table.num_rows + 1


def test_journal_killed_process_loses_nothing_acknowledged(tmp_path, root):
    check_survived(tmp_path, root, 4)


@pytest.mark.slow
def test_journal_killed_many_times_loses_nothing_acknowledged(tmp_path, root):
    check_survived(tmp_path, root, 60)


FORKED = """
import os, sys
from pathlib import Path
from tracking.errors import RunBusyError
from tracking.store import is_being_written
from tracking.journal.writer import Journal
rank_dir = Path(sys.argv[1])
journal = Journal(rank_dir)
row = [("x", 1, 1.0, None)]
journal.write("m", "s", row)
ended, tell = os.pipe()
try:
    Journal(rank_dir)
except RunBusyError as error:
    failed = error  # keeps what was half made
pid = os.fork()
if not pid:
    try:
        journal.write("m", "s", row)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    journal.close()
    other = Journal(rank_dir.parent.parent / "other" / "0")
    other.write("m", "s", row)
    other.close()
    os.read(ended, 1)
    print("held", is_being_written(rank_dir), flush=True)
    os._exit(0)
journal.write("m", "s", row)
journal.close()
os.write(tell, b".")
os.waitpid(pid, 0)
"""


def test_journal_forked_child_leaves_it_alone(rank_dir, root):
    done = run_script(FORKED, rank_dir, cwd=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RunClosedError Run.log: expected the process that started" in done.stdout
    assert "held False" in done.stdout
    table, damage = read_records(rank_dir)
    assert (floats(table), damage) == ([1.0, 1.0], [])
    assert read_records(rank_dir.parent.parent / "other" / "0")[0].num_rows == 1


RAISING_HANDLER = """
import itertools, signal, sys
sys.settrace(None)  # a tracer would swallow what the handler raises
from pathlib import Path
from tracking.run import Run
from tracking.journal.reader import read_records
run = Run(Path(sys.argv[1]), None)
run.log("m", "s", {"x": 0.5, "t": "text"})
class Interrupted(Exception):
    pass
def handler(*_):
    raise Interrupted
signal.signal(signal.SIGALRM, handler)
interrupted = returned = 0
while interrupted < 150:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0001 + interrupted * 1e-6)
        while True:
            run.log("m", "s", {"x": 0.5})
            returned += 1
    except Interrupted:
        interrupted += 1
# Nothing is missing below the last row: no hole holds up a reader.
rank_dir = run.path / "records" / "0"
block = run._journal.block
marks, _ = block.snapshot()
from tracking.journal import row_format
assert not row_format.has_holes(marks, block.find_last_slot() + 1)
run.finish()
table, damage = read_records(rank_dir)
assert not damage, damage
assert returned + 2 <= table.num_rows <= returned + 2 + interrupted
print("ok")
"""


def test_journal_handler_that_raises_leaves_no_hole(tmp_path, root):
    done = run_script(RAISING_HANDLER, tmp_path / "run", cwd=root)
    assert done.stdout == "ok\n", done.stderr


TIMEOUT = """
import signal, sys
sys.settrace(None)  # a tracer would swallow what the handler raises
from pathlib import Path
from tracking.run import Run
run = Run(Path(sys.argv[1]), None)
def handler(*_):
    raise TimeoutError("the user's own")
signal.signal(signal.SIGALRM, handler)
raised = 0
for n in range(60):
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003 + n * 1e-5)
        while True:
            run.log("m", "s", "a text, whose write is a system call")
    except TimeoutError:
        raised += 1
run.finish()
print(raised)
"""


def test_journal_handlers_own_oserror_reaches_the_caller(tmp_path, root):
    done = run_script(TIMEOUT, tmp_path / "run", cwd=root)
    assert done.stdout == "60\n", done.stderr


# ------------------------------------------------------------------------ full disk

LIMITED = """
import resource, sys, time, warnings
from pathlib import Path
from tracking.journal.reader import read_records
from tracking.journal.writer import Journal
from tracking.schema import flatten_value
rank_dir = Path(sys.argv[1])
journal = Journal(rank_dir)
caught = []
warnings.showwarning = lambda message, *_: caught.append(str(message))
warnings.simplefilter("always")
def log(value):
    journal.write("m", "s", flatten_value(value, ""))
log({"x": 0.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
for i in range(50_000):
    log({"x": float(i)})
    if i % 10 == 0:
        log({"t": str(i)})
deadline = time.monotonic() + 20
while not caught and time.monotonic() < deadline:
    time.sleep(0.01)
read = read_records(rank_dir)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
deadline = time.monotonic() + 20
while read_records(rank_dir)[0].num_rows < 55_001 and time.monotonic() < deadline:
    time.sleep(0.1)
durable = read_records(rank_dir)[0].num_rows
log({"x": -1.0})
kind = type(journal.block).__name__
journal.close()
table, damage = read_records(rank_dir)
assert not damage, damage
assert len(caught) == 1, caught
print(durable, table.num_rows, kind, read[0].num_rows >= 16384, caught)
assert table["value"].drop_null().to_pylist() == [0.0, *map(float, range(50_000)), -1.0]
assert table["payload"].drop_null().to_pylist() == [f'"{i}"' for i in range(0, 50_000, 10)]
"""


def test_journal_full_disk_warns_once_and_resumes(rank_dir, root):
    done = run_script(LIMITED, rank_dir, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("55001 55002 DiskBlock"), done.stdout
    assert "Training continues, and what is logged is kept in memory" in done.stdout


FULL = """
import os, sys, time, warnings
from pathlib import Path
from tracking.journal.reader import read_records
from tracking.journal.writer import Journal
warnings.simplefilter("ignore")
folder = Path(sys.argv[1])
journal = Journal(folder / "run" / "0")
ballast = os.open(folder / "ballast", os.O_CREAT | os.O_WRONLY)
try:
    while True:
        os.write(ballast, bytes(65536))
except OSError:
    pass
for i in range(60_000):
    journal.write("m", "s", [("x", 1, float(i), None)])
os.unlink(folder / "ballast"); os.close(ballast)
journal.close()
table, damage = read_records(folder / "run" / "0")
assert table["value"].to_pylist() == list(range(60_000)) and not damage, damage
print("ok")
"""


def test_journal_on_a_full_filesystem_is_never_killed(tmp_path, root):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small filesystem")
    try:
        done = run_script(FULL, tmp_path, cwd=root)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.stdout == "ok\n", done.stderr


def test_journal_that_never_reaches_the_disk_says_how_many_rows_are_lost(rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    (rank_dir / "000000.arrow").mkdir()  # so that sealing fails, as root too
    with pytest.warns(TrackingWarning, match="expected to write to the disk"):
        journal.close()
    # It is durable all the same: the open block was on the disk.
    (rank_dir / "000000.arrow").rmdir()
    assert floats(read_records(rank_dir)[0]) == [1.0]


def test_folder_that_was_away_for_a_while_gets_all_rows(rank_dir, until):
    journal = Journal(rank_dir)
    folder = rank_dir.parent.parent
    away = folder.with_name("away")
    with pytest.warns(TrackingWarning, match="expected to write to the disk"):  # noqa: PT031
        put(journal, 0.0)
        until(lambda: (rank_dir / "000001.rows").exists())
        folder.rename(away)
        for value in range(1, 2 * CAPACITY + 10):
            put(journal, float(value))
        until(lambda: journal._sealer.has_waiting)
    away.rename(folder)
    journal.close()
    table, damage = read_records(rank_dir)
    assert floats(table) == list(range(2 * CAPACITY + 10))
    assert damage == []


# ---------------------------------------------------------------- values and blocks


def test_journal_nan_payloads_survive(rank_dir):
    # Quiet and signalling, of either sign, and one that is a float32 too.
    patterns = [0x7FF8000000000000, 0x7FF8000000000001, 0xFFF8000000000000]
    patterns += [0x7FF0000000000001, 0x7FF8000020000000]
    values = [struct.unpack("<d", p.to_bytes(8, "little"))[0] for p in patterns]
    journal = Journal(rank_dir)
    for value in values:
        put(journal, value)
    journal.close()
    (path,) = rank_dir.glob("*.arrow")
    stored = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    found = stored["value"].to_numpy().view("<u8").tolist()
    assert found == patterns


def count_open(folder):
    """How many descriptors of this process are of files in a folder."""
    files = {(f.stat().st_dev, f.stat().st_ino) for f in folder.rglob("*")}
    count = 0
    for path in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # the one of the list itself
            found = os.fstat(int(path.name))
            count += (found.st_dev, found.st_ino) in files
    return count


def test_disk_block_with_released_files_holds_none_and_reads_the_same(tmp_path):
    block = DiskBlock(tmp_path, 0, is_synced=False)
    group = KeyGroup(AutoIndex())
    block.add_keys(group, "m", "s", ["x"])
    block.put(*row_format.encode_row(0, 1, 2, 3, 0.5, 4, group.ids["x"], FLOAT, 0))
    before = block.snapshot()
    assert count_open(tmp_path)
    block.release_files()
    assert count_open(tmp_path) == 0
    assert block.snapshot() == before
    block.close(unlink=True)


def test_memory_block_is_read_like_one_on_the_disk():
    block = Block(4)
    group = KeyGroup(AutoIndex())
    block.add_keys(group, "m", "s", ["x"])
    block.add_payload(0, '"text"')
    fields = (1, 2, 3, math.nan, 4, group.ids["x"], 4, row_format.HAS_TEXT)
    block.put(*row_format.encode_row(0, *fields))
    marks, text = block.snapshot()
    found = row_format.decode_block(Path("part"), 4, marks, marks, text)
    assert found.table["payload"].to_pylist() == ['"text"']
    assert found.table["seq"].to_pylist() == [4 * CAPACITY]
    assert not block.is_durable


def test_warnings_as_errors_do_not_reach_the_writer(rank_dir, capsys):
    journal = Journal(rank_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        journal._warn_of(OSError(28, "No space left on device"))
    assert "No space left on device" in capsys.readouterr().err
    journal.close()


def test_new_names_of_a_block_are_one_text(tmp_path):
    block, group = Block(0), KeyGroup(AutoIndex())
    names = ["plain", 'q"uo\\te', "ü", ""]
    block.add_keys(group, "m\n", "s", names)
    assert len(block._pending) == 1
    for slot, name in enumerate(names):
        fields = (1, 2, 3, 0.5, 4, group.ids[name], FLOAT, 0)
        block.put(*row_format.encode_row(slot, *fields))
    rows, text = block.snapshot()
    # A kill in the middle of the text leaves the names before it.
    for cut, whole in ((len(text), 4), (len(text) - 1, 3)):
        found = row_format.decode_block(tmp_path, 0, rows, rows, text[:cut])
        assert found.table["name"].to_pylist() == names[:whole]
        assert found.table["what"].to_pylist() == ["m\n"] * whole


def test_thousands_of_new_names_across_blocks_are_read_in_order(rank_dir):
    journal = Journal(rank_dir)
    values = {f"metric {n}": n / 7 for n in range(CAPACITY // 2 + 100)}
    for index in range(1, 4):
        put(journal, values, index=index)
    open_rows = read_records(rank_dir)[0]
    journal.close()
    for table in (open_rows, read_records(rank_dir)[0]):
        assert table["name"].to_pylist() == [*values] * 3
        assert table["value"].to_pylist() == [*values.values()] * 3
        assert table["seq"].to_pylist() == [*range(3 * len(values))]


def test_new_names_hold_a_block_that_other_threads_fill(rank_dir, monkeypatch):
    journal = Journal(rank_dir)
    block = journal.block
    add_keys = block.add_keys

    def add_keys_late(*args):
        monkeypatch.undo()
        other = threading.Thread(target=fill)
        other.start()
        other.join()
        while journal._open[0] is block:
            time.sleep(0.001)
        add_keys(*args)
        assert block.is_durable  # its files are open

    def fill():
        for index in range(CAPACITY + 1):
            journal.write("metrics", "valid", [("c", FLOAT, 1.0, None)], index=index)

    monkeypatch.setattr(block, "add_keys", add_keys_late)
    put(journal, {"a": 1.0, "b": 2.0}, index=1)
    journal.close()
    table, damage = read_records(rank_dir)
    assert not damage
    assert table["name"].to_pylist() == ["a", *["c"] * (CAPACITY + 1), "b"]


def test_indices_are_read_while_another_thread_begins_a_series(rank_dir):
    journal = Journal(rank_dir)

    class Interrupted(AutoIndex):
        @property
        def highest(self):
            other = threading.Thread(target=put, args=(journal, 1.0))
            other.start()
            other.join()
            return super().highest

    journal._auto_indices["metrics", "valid"] = Interrupted(5)
    assert journal.get_indices() == {("metrics", "valid"): 5}
    assert ("metrics", "train") in journal._auto_indices
    journal.close()

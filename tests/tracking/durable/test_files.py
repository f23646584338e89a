from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

import tracking
from tracking.durable import (
    copy_if_absent,
    move_folder,
    replace_file,
    replace_folder,
    write_atomically,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_atomically_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "target"
    target.mkdir()  # a file cannot replace a folder, for root neither
    with pytest.raises(OSError, match="target"):
        write_atomically(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_replace_file_shows_the_new_content_only_after_the_block(tmp_path):
    target = tmp_path / "curve.png"
    target.write_text("old")
    with replace_file(target, sync=True) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["curve.png"]


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, disk_calls):
    target, source = tmp_path / "target", tmp_path / "source"
    write_atomically(target, b"new")
    inode = target.stat().st_ino
    assert disk_calls == [("fsync", inode), ("replace", inode)]
    disk_calls.clear()
    with replace_file(target, sync=True) as temporary:
        temporary.write_text("newer")
    inode = target.stat().st_ino
    assert disk_calls == [("fsync", inode), ("replace", inode)]
    disk_calls.clear()
    source.mkdir()
    move_folder(source, tmp_path / "moved")
    inode, above = (tmp_path / "moved").stat().st_ino, tmp_path.stat().st_ino
    assert disk_calls == [("fsync", inode), ("rename", inode), ("fsync", above)]


@pytest.mark.parametrize("error", [OSError, ValueError, KeyboardInterrupt])
def test_replace_file_that_raises_keeps_the_old_content(tmp_path, error):
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(error), replace_file(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["target"]


def test_copy_if_absent_replaces_only_an_empty_file(tmp_path):
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_text("new")
    assert copy_if_absent(source, path)
    assert path.read_text() == "new"
    path.write_text("theirs")
    assert not copy_if_absent(source, path)
    assert path.read_text() == "theirs"
    path.write_text("")
    assert copy_if_absent(source, path)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["path", "source"]


def test_replace_folder_replaces_all_files(tmp_path):
    for name in ("first", "second"):
        with replace_folder(tmp_path / "made" / "folder") as temporary:
            (temporary / name).write_text("x")
    assert names(tmp_path / "made") == ["folder"]
    assert names(tmp_path / "made" / "folder") == ["second"]


@pytest.mark.skipif(sys.platform != "linux", reason="exchanges no folders")
def test_replaced_folder_is_always_there(tmp_path):
    target, has_ended, num_missing = tmp_path / "folder", threading.Event(), 0
    target.mkdir()

    def look():
        nonlocal num_missing
        while not has_ended.is_set():
            num_missing += not target.exists()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(100):
            with replace_folder(target):
                pass
    finally:
        sys.setswitchinterval(interval)
        has_ended.set()
        thread.join()
    assert num_missing == 0
    assert names(tmp_path) == ["folder"]


def test_replace_folder_that_raises_keeps_the_earlier_one(tmp_path):
    target = tmp_path / "folder"
    with replace_folder(target) as temporary:
        (temporary / "first").write_text("x")
    with pytest.raises(ValueError, match="full"), replace_folder(target) as temporary:  # noqa: PT012
        (temporary / "second").write_text("x")
        raise ValueError("full")
    assert names(tmp_path) == ["folder"]
    assert names(target) == ["first"]


def test_folder_that_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    for name in (f".{os.getpid()}-model", f".model.{os.getpid()}.earlier"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "left").write_text("x")
    with replace_folder(target) as temporary:
        (temporary / "whole").write_text("x")
    assert names(tmp_path) == ["model"]
    assert names(target) == ["whole"]


KILLED = """
import os, pathlib, signal, sys
from tracking.durable import replace_folder
with replace_folder(pathlib.Path(sys.argv[1])) as temporary:
    (temporary / "half").write_text("x")
    print(temporary.name, flush=True)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_folder_of_a_killed_save_goes_at_the_next_and_that_of_a_live_one_stays(
    tmp_path,
):
    target = tmp_path / "model"
    root = os.path.dirname(os.path.dirname(tracking.__file__))  # noqa: PTH120
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, target],
            env={**os.environ, "PYTHONPATH": root},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    left, live = (writer.stdout.readline().strip() for writer in writers)
    writers[0].communicate("kill\n")
    earlier = tmp_path / ".model.12345.earlier"
    earlier.mkdir()
    (tmp_path / ".99-other").mkdir()
    with replace_folder(target) as temporary:
        (temporary / "whole").write_text("x")
        assert earlier.is_dir()  # the only whole one, as long as this is not
    assert names(tmp_path) == sorted([live, ".99-other", "model"])
    assert left != live
    writers[1].communicate("kill\n")
    with replace_folder(target):
        pass
    assert names(tmp_path) == [".99-other", "model"]

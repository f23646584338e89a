from __future__ import annotations

from pathlib import Path

import pytest

from tracking.durable.filesystem import find_mount, try_folder

MOUNTS = """\
1 0 8:1 / / rw,relatime - ext4 /dev/sda1 rw
2 1 0:40 / /work rw - lustre mgs@tcp:/work rw,flock,lazystatfs
3 1 0:41 / /scratch rw - lustre mgs@tcp:/scratch rw,localflock
4 1 0:42 / /old rw - lustre mgs@tcp:/old rw
5 1 0:43 / /home rw - nfs4 server:/home rw,vers=4.2,local_lock=none
6 1 0:44 / /nolock rw - nfs server:/nolock rw,vers=3,nolock,local_lock=all
7 1 0:45 / /my\\040data rw - btrfs /dev/sdb rw
8 1 0:46 / /mnt rw - fuse.sshfs host: rw
9 2 0:47 / /work/tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "name", "shares_locks", "keeps_maps"),
    [
        ("/var/runs", "ext4", True, True),
        ("/work/runs", "lustre", True, False),
        ("/work/tmp/runs", "tmpfs", True, True),
        ("/scratch", "lustre", False, False),
        ("/old/runs", "lustre", False, False),
        ("/home/me", "nfs4", True, False),
        ("/nolock", "nfs", False, False),
        ("/my data/runs", "btrfs", True, False),
        ("/mnt/runs", "fuse", False, False),
    ],
)
def test_filesystem_tells_who_sees_its_locks(folder, name, shares_locks, keeps_maps):
    found = find_mount(MOUNTS, Path(folder))
    assert (found.name, found.shares_locks, found.keeps_maps) == (
        name,
        shares_locks,
        keeps_maps,
    )


def test_system_that_tells_no_filesystem_gets_neither_maps_nor_trust():
    found = find_mount("", Path("/runs"))
    assert (found.name, found.shares_locks, found.keeps_maps) == ("", False, False)


def test_folder_that_can_be_written_has_no_problems_and_stays_empty(tmp_path):
    assert try_folder(tmp_path).problems == {}
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_there_cannot_be_written(tmp_path):
    assert "write" in try_folder(tmp_path / "absent").problems

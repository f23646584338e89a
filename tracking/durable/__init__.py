"""Files that survive a crash: atomic replacement, waiting for the disk, locks and leases.

The only package that renames a file into place, calls ``fsync`` or takes a lock.
"""

from tracking.durable.files import (
    copy_if_absent,
    has_content,
    move_folder,
    overwrite,
    remove_folder,
    remove_unfinished,
    replace_file,
    replace_folder,
    sync,
    sync_path,
    write_atomically,
    write_synced,
)
from tracking.durable.filesystem import FolderReport, get_filesystem, try_folder
from tracking.durable.leases import Holder, read_start, read_stat
from tracking.durable.locks import (
    LockHeldError,
    ProcessLock,
    find_holder,
    hold_lock,
    mark_busy,
    mark_free,
    release_lock,
)

__all__ = [
    "FolderReport",
    "Holder",
    "LockHeldError",
    "ProcessLock",
    "copy_if_absent",
    "find_holder",
    "get_filesystem",
    "has_content",
    "hold_lock",
    "mark_busy",
    "mark_free",
    "move_folder",
    "overwrite",
    "read_start",
    "read_stat",
    "release_lock",
    "remove_folder",
    "remove_unfinished",
    "replace_file",
    "replace_folder",
    "sync",
    "sync_path",
    "try_folder",
    "write_atomically",
    "write_synced",
]

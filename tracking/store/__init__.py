"""The folder of runs: where it is, what it contains, how a run is found and how it ended."""

from tracking.store.ending import (
    FAILURE,
    describe_error,
    describe_unknown,
    find_writer,
    find_writers,
    get_first_error,
    get_lock_path,
    get_status,
    has_live_writer,
    is_being_written,
    release_run,
    remove_failures,
    write_failure,
)
from tracking.store.finding import (
    find_run,
    find_run_folders,
    find_runs,
    read_manifests,
    run_paths,
)
from tracking.store.folders import (
    create_run_dir,
    get_rank_dir,
    get_working_folder,
    list_rank_dirs,
    results_path,
    runs_folder,
)
from tracking.store.json_file import read_json
from tracking.store.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    find_start_folder,
    read_environment,
)

__all__ = [
    "FAILURE",
    "FORMAT",
    "MANIFEST",
    "Manifest",
    "create_run_dir",
    "describe_error",
    "describe_unknown",
    "find_run",
    "find_run_folders",
    "find_runs",
    "find_start_folder",
    "find_writer",
    "find_writers",
    "get_first_error",
    "get_lock_path",
    "get_rank_dir",
    "get_status",
    "get_working_folder",
    "has_live_writer",
    "is_being_written",
    "list_rank_dirs",
    "read_environment",
    "read_json",
    "read_manifests",
    "release_run",
    "remove_failures",
    "results_path",
    "run_paths",
    "runs_folder",
    "write_failure",
]

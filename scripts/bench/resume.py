"""What one rank of many reads when it resumes, from faked checkpoints of up to 1,024 ranks.

    python scripts/bench/resume.py [--ranks 64 256 1024] [--stage 3] [--folder F]

The checkpoints are complete folders in the real format, divided as DeepSpeed divides them; the
ranks never ran. A rank that resumes is a process of its own, which answers for the others.
Columns: seconds, opened files, MB read (by calls, and by maps), and MB of memory above that
before the resume. "same" is a resume on as many ranks, "half" on half as many, "alone" one
process that reads everything.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]
sys.path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[2]))

import argparse
import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint.format import list_checkpoints, read_rank
from harness.checkpoint.ranks.choose import choose_checkpoint
from harness.checkpoint.ranks.states import SavedRanks
from harness.reshard.convert import convert_state
from tests.harness.checkpoint.ranks import faked

NUM_PARAMS, NUMEL = 300, 16_000_000
"""Of the model, which is the same for all numbers of ranks."""

MB = 1e6


def shapes() -> list[tuple[int, ...]]:
    """Matrices and vectors, as a transformer has them."""
    size = NUMEL // (NUM_PARAMS // 2)
    return [(size,) if n % 2 else (64,) for n in range(NUM_PARAMS)]


class OneRank:
    """One rank; it answers for the others that they found no damage."""

    def __init__(self, rank: int, world_size: int, offer: object) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self._offer = offer

    def broadcast(self, value: object) -> Any:
        return value if self.is_main else self._offer

    def any(self, flag: bool) -> bool:
        return flag

    def gather_objects(self, value: object) -> list[object]:
        return [value]


def read_status(name: str) -> float:
    """MB of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / MB


def read_mapped(folder: Path) -> tuple[set[str], float]:
    """Files of a folder that are mapped, and MB of them that were read."""
    files, kb, is_ours = set(), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = str(folder) in line
            if is_ours:
                files.add(Path(line.split()[-1]).name)
        elif is_ours and line.startswith("Rss:"):
            kb += int(line.split()[1])
    return files, kb * 1024 / MB


def measure(folder: Path, form: str, rank: int) -> dict[str, Any]:
    """What the resume of one rank costs; the last rank is -1."""
    place = list_checkpoints(folder)[0]
    text = (place / "manifest.json").read_text()
    saved = json.loads(text)["world_size"]
    world_size = {"same": saved, "half": saved // 2, "alone": 1}[form]
    rank %= world_size
    model = faked.Model(shapes())
    zeros = {name: torch.zeros(1).expand_as(p) for name, p in model.named_parameters()}
    stage = read_rank(place, 0, is_mapped=True)["accelerator"]["stage"]
    live = faked.Faker(model, world_size, stage).accelerator(rank, zeros)
    ranks: Any = OneRank(rank, world_size, {"name": place.name, "manifest": text})
    opened: set[str] = set()

    def note(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(folder) in str(args[0]):
            opened.add(Path(str(args[0])).name)

    sys.addaudithook(note)
    Path("/proc/self/clear_refs").write_text("5")
    memory_mb = read_status("VmRSS")
    read_mb = count_read()
    began = time.perf_counter()
    found = choose_checkpoint(folder, ranks)
    assert found is not None
    if form == "same":
        kept: object = read_rank(place, rank)
    else:
        parts = SavedRanks(*found)
        kept = (
            parts,
            convert_state(parts.accelerators, model, live, rank, index=parts.index),
        )
    took_s = time.perf_counter() - began
    peak_mb = read_status("VmHWM") - memory_mb
    read_mb = count_read() - read_mb
    mapped, mapped_mb = read_mapped(folder)
    del kept
    return {
        "seconds": round(took_s, 3),
        "files": len(opened | mapped),
        "read MB": round(read_mb, 2),
        "mapped MB": round(mapped_mb, 2),
        "memory MB": round(peak_mb, 1),
    }


def count_read() -> float:
    """MB that this process has read by calls."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1]) / MB


def run_one(folder: Path, form: str, rank: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", str(folder), form, str(rank)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(said)
    return found


def print_table(counts: list[int], stage: Any, folder: Path) -> None:
    head = ["ranks", "part MB", "resume", "rank"]
    columns = ["seconds", "files", "read MB", "mapped MB", "memory MB"]
    print("| " + " | ".join(head + columns) + " |")
    print("|" + " ---: |" * (len(head) + len(columns)))
    for count in counts:
        own = folder / f"ranks-{count}"
        if not own.exists():
            faked.save(own, faked.Faker(faked.Model(shapes()), count, stage))
        part = list_checkpoints(own)[0] / "rank-1.safetensors"
        size = f"{part.stat().st_size / MB:.2f}"
        for form, rank in (("same", -1), ("same", 0), ("half", -1), ("alone", 0)):
            found = run_one(own, form, rank)
            which = "0" if rank == 0 else "last"
            cells = [str(count), size, form, which, *(str(found[n]) for n in columns)]
            print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--stage", type=int, default=3, choices=[1, 3])
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        folder, form, rank = options.one
        print(json.dumps(measure(Path(folder), form, int(rank))))
    elif options.folder:
        print_table(options.ranks, options.stage, options.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            print_table(options.ranks, options.stage, Path(folder))


if __name__ == "__main__":
    main()

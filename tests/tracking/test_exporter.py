from __future__ import annotations

import importlib
import math
import shutil
import struct
import subprocess
import sys

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow._fs import _MockFileSystem
from pyarrow.fs import FileSelector, FileType, FSSpecHandler, PyFileSystem

import tracking
from tracking.api import start
from tracking.errors import RunNotFoundError, TrackingWarning
from tracking.exporter import _Rows, _send, _write_partition, export
from tracking.journal.segment import CAPACITY, read_segment
from tracking.read import PastRun
from tracking.run import Run
from tracking.schema import parse_value

NASTY = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "-0": -0.0,
    "subnormal": 5e-324,
    "largest": sys.float_info.max,
    "third": 1 / 3,
    "2**53+1": 2**53 + 1,
    "2**70": 2**70,
    "true": True,
    "none": None,
    "empty": "",
    "quoted": 'a "b", c\n\td\x00e',
    "ünï ☃": "ünï ☃ 🦊",
    "n" * 3000: 1.0,
    "deep/a/b/c": [1, [2.5, {"x": None}]],
}


@pytest.fixture
def run(tmp_path):
    with start(name="one", runs_dir=tmp_path / "runs", delivery=False) as run:
        for name, value in NASTY.items():
            run.log("metrics", "train", {name: value}, index=1, epoch=1, step=7)
        yield run


def sql(query):
    found = duckdb.sql(query)
    assert found is not None
    return found


def bits(value):
    return None if value is None else struct.pack("<d", value)


def check_nasty(rows):
    """Rows of any reader, as dictionaries, hold what was logged, bit for bit."""
    found = {row["name"]: row for row in rows if row["what"] == "metrics"}
    assert found.keys() == NASTY.keys()
    for name, value in NASTY.items():
        row = found[name]
        back = parse_value(row["kind"], row["value"], row["payload"])
        assert type(back) is type(value)
        if isinstance(value, float):
            assert bits(row["value"]) == bits(value), name
        else:
            assert back == value
        assert (row["index"], row["epoch"], row["step"]) == (1, 1, 7)


def test_export_parquet_is_exact_for_duckdb(run, tmp_path):
    path = tmp_path / "x.parquet"
    assert export(run, path) == len(PastRun(run.path).records())
    found = sql(f"select * exclude (time) from '{path}'")
    names = found.columns
    check_nasty(dict(zip(names, row, strict=True)) for row in found.fetchall())
    assert sql(f"select distinct run from '{path}'").fetchall() == [(run.id,)]


def test_export_parquet_arrow_and_feather_equal_the_records(run, tmp_path):
    records = PastRun(run.path).records()
    for name, read in (
        ("x.parquet", pyarrow.parquet.read_table),
        ("x.arrow", pyarrow.feather.read_table),
        ("x.FEATHER", pyarrow.feather.read_table),
    ):
        export([run.path], tmp_path / name)
        table = read(tmp_path / name)
        assert table.column_names == ["run", *records.column_names]
        assert table.drop(["run"]).schema.equals(records.schema)
        check_nasty(table.to_pylist())


def test_export_csv_keeps_numbers_exact(run, tmp_path):
    export(PastRun(run.path), tmp_path / "x.csv")
    found = sql(f"from read_csv('{tmp_path / 'x.csv'}', all_varchar=true)")
    names = found.columns
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    values = {r["name"]: r["value"] for r in rows if r["what"] == "metrics"}
    for name, value in NASTY.items():
        if isinstance(value, float):
            assert bits(float(values[name])) == bits(value), name


def test_export_several_runs_to_one_file_or_a_partitioned_folder(run, tmp_path):
    with start(name="two", runs_dir=tmp_path / "runs", delivery=False) as other:
        other.log("metrics", "train", 2.0)
    runs = [PastRun(run.path), PastRun(other.path)]
    counts = {past.id: len(past.records()) for past in runs}
    assert export(runs, tmp_path / "both.parquet") == sum(counts.values())
    for _ in range(2):  # again, the same: nothing is doubled
        assert export(runs, tmp_path / "set") == sum(counts.values())
    for source in (
        f"'{tmp_path}/both.parquet'",
        f"read_parquet('{tmp_path}/set/*/*.parquet', hive_partitioning=true)",
    ):
        found = sql(f"select run, count(*) from {source} group by run")
        assert dict(found.fetchall()) == counts
    table = pyarrow.parquet.read_table(tmp_path / "set")
    assert table.num_rows == sum(counts.values())


def test_export_of_a_live_run_holds_what_was_logged_so_far(tmp_path):
    import torch  # noqa: PLC0415

    run = start(runs_dir=tmp_path, delivery=False)
    run.log("metrics", "train", torch.tensor(2.0))
    export(run, tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert 2.0 in table["value"].to_pylist()
    run.finish()


def test_export_superseded_rows_if_asked(run, tmp_path):
    run.log("metrics", "valid", 1.0, index=1)
    run.log("metrics", "valid", 2.0, index=1, append=False)
    export(run, tmp_path / "x.parquet", superseded=True)
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    gone = table.filter(table["superseded"])
    assert gone["value"].to_pylist() == [1.0]
    export(run, tmp_path / "x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert "superseded" not in table.column_names


def continue_run(path, *, fit=None, back_to=None):
    """Log a block of its own, with names of its own."""
    with start(run_id=path.name, runs_dir=path.parent, delivery=False) as run:
        if back_to is not None:
            run.rewind(back_to)
        if fit is not None:
            run.begin_fit(fit)
        for index in range(1, 4):
            run.log("metrics", "valid", {f"of fit {fit}": index, "loss": 0.5}, index)
        run.log("metrics", "valid", {"loss": 0.25}, index=2, append=False)
        return run.position()


@pytest.mark.parametrize("superseded", [False, True])
def test_export_in_groups_has_the_rows_of_the_records(run, tmp_path, superseded):
    run.finish()
    with start(name="two", runs_dir=tmp_path / "runs", delivery=False) as two:
        two.log_metric("loss", 0.5)
    position = continue_run(two.path)
    continue_run(two.path, back_to=position)
    continue_run(two.path, fit=2)
    past = [PastRun(run.path), PastRun(two.path)]
    for group_rows in (1, 10, 1000):
        rows = _Rows(past, superseded=superseded, group_rows=group_rows)
        tables = [*rows]
        assert (len(tables) == 1) == (group_rows == 1000)
        found = pa.concat_tables(tables)
        expected = [one.records(superseded=superseded) for one in past]
        assert found.num_rows == rows.num_written == sum(map(len, expected))
        assert "fit" in found.column_names
        for one, table in zip(past, expected, strict=True):
            mine = found.filter(pc.equal(found["run"].cast(pa.string()), one.id))
            columns = [
                name for name in mine.column_names[1:] if name in table.column_names
            ]
            same = mine.select(columns).cast(table.schema).unify_dictionaries()
            assert columns == table.column_names
            assert repr(same.to_pylist()) == repr(table.to_pylist())
        words = {str(t["name"].chunk(0).dictionary.to_pylist()) for t in tables}
        assert len(words) == 1


def test_export_holds_no_block_that_it_can_read_again(tmp_path):
    with start(name="long", runs_dir=tmp_path / "runs", delivery=False) as long:
        for step in range(2 * CAPACITY + 1):
            long.log_step({"loss": 0.5}, step)
    block = read_segment(long.path / "records" / "0" / "000000.arrow")[0].nbytes
    before = pa.total_allocated_bytes()
    rows = _Rows([PastRun(long.path)], superseded=False, group_rows=CAPACITY - 1)
    assert pa.total_allocated_bytes() - before < block / 10
    assert [len(table) for table in rows][:2] == [CAPACITY, CAPACITY]


def test_export_of_a_run_that_is_deleted_meanwhile_is_refused(tmp_path):
    with start(runs_dir=tmp_path / "runs", delivery=False) as run:
        for value in range(CAPACITY + 1):
            run.log_metric("loss", value)
    rows = _Rows([PastRun(run.path)], superseded=False, group_rows=CAPACITY)
    shutil.rmtree(run.path)
    with pytest.raises(RunNotFoundError, match="until all of it is written"):
        list(rows)


def test_export_tells_of_rows_that_cannot_be_read(run, tmp_path):
    run.finish()
    (block,) = (run.path / "records" / "0").glob("*.arrow")
    data = bytearray(block.read_bytes())
    data[len(data) // 2] ^= 1
    block.write_bytes(data)
    for name in ("x.csv", "folder"):
        with pytest.warns(TrackingWarning, match=r"damage in 000000\.arrow: .* lost\."):
            export(PastRun(run.path), tmp_path / name)


def test_export_to_an_empty_path_is_refused(run):
    with pytest.raises(ValueError, match="expected a path, got ''"):
        export(run, "")


def test_export_of_a_run_without_rows_has_the_columns(tmp_path):
    with start(name="none", runs_dir=tmp_path / "runs", delivery=False) as run:
        pass
    shutil.rmtree(run.path / "records")
    for suffix in (".parquet", ".csv", ".arrow"):
        assert export(run, tmp_path / f"none{suffix}") == 0
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").num_columns == 13
    assert pyarrow.feather.read_table(tmp_path / "none.arrow").num_columns == 13
    assert "payload" in (tmp_path / "none.csv").read_text()


def test_export_to_a_uri_goes_through_arrows_filesystems(run, tmp_path):
    export(run, f"file://{tmp_path}/new/folder/x.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "new" / "folder" / "x.parquet")
    check_nasty(table.to_pylist())


def test_export_failing_leaves_the_old_file(run, tmp_path):
    target = tmp_path / "x.parquet"
    target.mkdir()
    with pytest.raises(OSError, match="expected a file, got a folder"):
        export(run, target)
    assert {p.name for p in tmp_path.iterdir()} == {"runs", "x.parquet"}


def test_export_to_an_object_store_writes_a_whole_object_or_none(run):
    store = _MockFileSystem()
    run.flush()
    rows = _Rows([PastRun(run.path)], superseded=False)

    class Cut:
        schema = rows.schema

        def __iter__(self):
            yield next(iter(rows))
            raise OSError("the disk with the records is gone")

    with pytest.raises(OSError, match="is gone"):
        _send(Cut(), ".parquet", store, "all.parquet")
    assert store.get_file_info("all.parquet").type == FileType.NotFound
    _send(rows, ".parquet", store, "all.parquet")
    with store.open_input_file("all.parquet") as file:
        assert pa.parquet.read_table(file).num_rows == rows.num_written


class Disk(MemoryFileSystem):
    """A filesystem of another machine, which may be full."""

    cachable = False
    is_full = False

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if mode == "wb" and self.is_full:
            file.write(b"half")
            raise OSError("no space left")
        return file


def test_partition_of_another_filesystem_is_replaced_whole_or_stays(run):
    disk = Disk()
    store = PyFileSystem(FSSpecHandler(disk))
    run.flush()

    def write():
        _write_partition(PastRun(run.path), store, "set", superseded=False)
        infos = store.get_file_info(FileSelector("set", recursive=True))
        (path,) = [info.path for info in infos if info.type == FileType.File]
        assert path.endswith(f"set/run={run.id}/part-0.parquet")
        return path

    path = write()
    disk.is_full = True
    with pytest.raises(OSError, match="no space left"):
        write()
    disk.is_full = False
    with store.open_input_file(path) as file:
        table = pyarrow.parquet.ParquetFile(file).read()
    assert "run" not in table.column_names  # the folder names it
    check_nasty(table.to_pylist())
    run.log_metric("more", 1.0, index=2)
    run.flush()
    disk.pipe(path.replace("part-0", "part-1"), b"of an earlier version")
    assert write() == path
    with store.open_input_file(path) as file:
        assert pyarrow.parquet.ParquetFile(file).read().num_rows == table.num_rows + 1


def test_export_to_a_place_that_cannot_be_written_names_it(run, tmp_path):
    (tmp_path / "taken").write_text("x")
    message = r"export\('.*taken.*'\): expected a place that can be written, got .*"
    for name in ("taken/all.csv", "taken/deep/all.parquet", "taken/folder"):
        with pytest.raises(OSError, match=message):
            export(run, tmp_path / name)
    with pytest.raises(OSError, match="expected a place that can be written, got File"):
        export(run, tmp_path / f"{'n' * 250}.parquet")  # with room for no more


def test_export_to_an_unknown_kind_of_address_is_refused(run):
    with pytest.raises(ValueError, match=r"an address that pyarrow knows, got Unrec"):
        export(run, "nope://bucket/x.parquet")


def test_export_unknown_format_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.parquet, \.csv.*got '\.xlsx'"):
        export(run, tmp_path / "x.xlsx")


def test_export_without_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected at least one run, got none"):
        export([], tmp_path / "x.parquet")


def test_export_of_an_unknown_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path))
    with pytest.raises(RunNotFoundError, match="expected a run in"):
        export("nobody", tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


CALLED = """
import sys
sys.path.insert(0, ".")
{first}
import tracking
print(tracking.export(sys.argv[1], sys.argv[2]))
from tracking.exporter import _Rows, export
from tracking.journal.segment import CAPACITY, read_segment
print(tracking.export(sys.argv[1], sys.argv[2]))
print("pyarrow" in sys.modules)
"""


@pytest.mark.parametrize("first", ["", "from tracking.exporter import export"])
def test_export_is_a_function_before_and_after_its_module_is_imported(
    run, tmp_path, root, first
):
    line = [sys.executable, "-c", CALLED.format(first=first)]
    line += [str(run.path), str(tmp_path / "x.parquet")]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=False)
    count = PastRun(run.path).records().num_rows
    assert done.stdout.split() == [str(count), str(count), "True"], done.stderr


def test_tracking_import_loads_no_arrow(root):
    script = "import sys, tracking; dir(tracking); print('pyarrow' in sys.modules)"
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_tracking_has_each_public_name():
    for name in tracking.__all__:
        assert getattr(tracking, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'no_such'"):
        importlib.import_module("tracking").no_such  # noqa: B018


names = st.text(st.characters(codec="utf-8"), max_size=20)
values = (
    st.floats()
    | st.integers(-(2**63), 2**64).map(
        lambda n: struct.unpack("<d", (n % 2**64).to_bytes(8, "little"))[0]
    )
    | st.integers()
    | st.booleans()
    | st.none()
    | names
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(names, names, st.dictionaries(names, values, max_size=4)), max_size=8
    )
)
def test_export_any_value_comes_back_bit_for_bit(tmp_path_factory, logged):
    folder = tmp_path_factory.mktemp("any")
    run = Run(folder / "run", None)
    expected = []
    for index, (what, set_, value) in enumerate(logged, start=1):
        run.log(what, set_, value, index)
        leaves = value.items() if value else [("", {})]
        expected += [(what, set_, name, index, leaf) for name, leaf in leaves]
    run.finish()
    export(PastRun(run.path), folder / "x.parquet")
    table = pyarrow.parquet.read_table(folder / "x.parquet")
    found = [
        (
            *(row[column] for column in ("what", "set", "name", "index")),
            parse_value(row["kind"], row["value"], row["payload"]),
        )
        for row in table.to_pylist()
    ]
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    for (*_, back), (*_, value) in zip(found, expected, strict=True):
        if isinstance(value, float):
            assert bits(back) == bits(value)
        else:
            assert (type(back), back) == (type(value), value)
    assert isinstance(table, pa.Table)

"""Write files, images, tables and histograms of a run, and a row for each."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tracking.artifacts import files
from tracking.artifacts.histograms import make_histogram
from tracking.artifacts.images import encode_png, make_pixels
from tracking.artifacts.tables import encode_table, make_table
from tracking.errors import describe_path, warn
from tracking.redaction import redact_value
from tracking.row_logger import Counts, RowLogger, check_arguments
from tracking.schema import check_name, check_path, flatten_value

_DIGEST_LENGTH: Final = 20
"""Hexadecimal digits in the name of a file that is kept once for equal content."""


class ArtifactLogger(RowLogger):
    """Writes files below ``artifacts/``; the half of ``Run`` that is not about numbers.

    Images and tables are kept once for equal content. If the disk fails, a warning says so
    and training continues.

    Parameters
    ----------
    path, rank, durability
        As of ``Run``.
    """

    def log_artifact(
        self, path: str | os.PathLike[str], name: str | None = None
    ) -> None:
        """Keep a copy of a file, or of all files in a folder.

        Parameters
        ----------
        path
            File or folder.
        name
            Relative name below ``artifacts/``; None: the name of ``path``.

        Raises
        ------
        FileNotFoundError
            If ``path`` does not exist.
        """
        check_path(path, "Run.log_artifact")
        source = Path(path)
        name = files.check_artifact_name(name or source.name, "Run.log_artifact")
        if source.is_file():
            self._add_artifact(name, partial(shutil.copyfile, source))
            return
        if not source.is_dir():
            raise FileNotFoundError(
                f"Run.log_artifact: expected a file or folder, got {os.fspath(path)!r}, "
                f"{describe_path(source)}. Write it to a file first."
            )
        for file in sorted(file for file in source.rglob("*") if file.is_file()):
            self.log_artifact(file, f"{name}/{file.relative_to(source).as_posix()}")

    def log_text(self, text: str, name: str) -> None:
        """Save a text as a file below ``artifacts/``."""
        name = files.check_artifact_name(name, "Run.log_text")
        if not isinstance(text, str):
            msg = f"Run.log_text({name!r}): expected a text, got {text!r:.100}."
            raise TypeError(
                f"{msg} Pass str(...) of it, or write a file for log_artifact."
            )
        data = text.encode(errors="replace")
        self._add_artifact(name, lambda path: path.write_bytes(data))

    def log_figure(
        self,
        figure: Any,
        name: str,
        *,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Save a figure as a picture.

        Parameters
        ----------
        figure
            Figure of matplotlib, plotly or Pillow, or anything with ``savefig``.
        name
            Relative name below ``artifacts/``; its suffix chooses the format. With a
            step, the name of a series of pictures, as in ``log_image``.
        step
            Optimizer steps finished. None: one file, which a later call replaces.
        epoch
            Epoch of the figure, from 1; only with a step.

        Notes
        -----
        matplotlib takes about 0.1 s for a figure.
        """
        name = files.check_artifact_name(name, "Run.log_figure")
        if step is None:
            name = files.add_picture_suffix(name)
            self._add_artifact(name, partial(files.save_figure, figure))
            return
        place = f"Run.log_figure({name!r})"
        suffix = PurePosixPath(files.add_picture_suffix(name)).suffix
        if suffix.lower() != ".png":
            raise ValueError(
                f"{place}: expected a name without suffix or with .png where a step is "
                f"given, got {name!r}. A series of figures is kept as PNG."
            )
        name = name.removesuffix(suffix)
        counts = _check_series(name, epoch, step, place)

        def write() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as folder:
                drawn = Path(folder, f"figure{suffix}")
                files.save_figure(figure, drawn)
                return self._write_once("images", drawn.read_bytes(), ".png")

        self._add_record("images", name, write, counts, place)

    def log_image(
        self,
        name: str,
        image: Any,
        *,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Record an image, or a grid of the images of a batch.

        Parameters
        ----------
        name
            Name of the series of images, such as ``"samples"``.
        image
            Array or tensor of the form (H, W), (H, W, C) or (C, H, W), with 1, 3 or 4
            channels; a batch (N, H, W, C) or (N, C, H, W), of which the first 64 are
            shown; an image of Pillow; or a list of those. Bools, integers from 0 to 255 or
            floats from 0 to 1; other floats are scaled from their lowest to their highest.
        step
            Optimizer steps finished. None: the image gets the next number of its series.
        epoch
            Epoch of the image, from 1.

        Raises
        ------
        TypeError, ValueError
            If it is not an image, or has more than 16 million pixels. Nothing is recorded
            then.

        Notes
        -----
        The call writes the file: about 10 ms for 256 x 256 pixels in colour. It waits for
        the device of a tensor. Log an image now and then, not in every step.

        Examples
        --------
        >>> import numpy, tracking
        >>> with tracking.start(delivery=False) as run:
        ...     run.log_image("noise", numpy.random.rand(8, 8), step=10)
        """
        place = f"Run.log_image({name!r})"
        counts = _check_series(name, epoch, step, place)
        pixels = make_pixels(image, place)

        def write() -> dict[str, Any]:
            size = {"width": pixels.shape[1], "height": pixels.shape[0]}
            return self._write_once("images", encode_png(pixels), ".png") | size

        self._add_record("images", name, write, counts, place)

    def log_table(
        self,
        name: str,
        table: Any,
        *,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Record a table.

        Parameters
        ----------
        name
            Name of the series of tables, such as ``"errors"``.
        table
            Dictionary of columns, list of rows (dictionaries or lists), table of pandas,
            pyarrow or polars, or array of two dimensions. Cells are numbers, texts, dates
            or small lists; an image of Pillow or an array of uint8 (H, W, C) is shown as a
            picture; anything else is recorded as its text.
        step
            Optimizer steps finished. None: the table gets the next number of its series.
        epoch
            Epoch of the table, from 1.

        Raises
        ------
        TypeError, ValueError
            If it is not a table, its columns differ in length, or it has more than 250,000
            cells. Nothing is recorded then.

        Notes
        -----
        Secrets in texts are masked, as in ``log_params``. The file is JSON that
        ``pandas.read_json(path, orient="split")`` reads.
        """
        place = f"Run.log_table({name!r})"
        counts = _check_series(name, epoch, step, place)
        pictures: dict[str, bytes] = {}

        def keep_picture(cell: Any) -> dict[str, str]:
            png = encode_png(make_pixels(cell, place))
            pictures[file := f"table_images/{_digest(png)}.png"] = png
            small = f"{file.removesuffix('.png')}.webp"  # which delivery makes
            return {"type": "image", "filepath": file, "compressed_filepath": small}

        made = make_table(
            table,
            place,
            mask=lambda column, cell: redact_value(column, cell, self._secrets),
            save_picture=keep_picture,
        )

        def write() -> dict[str, Any]:
            for png in pictures.values():
                self._write_once("table_images", png, ".png")
            size = {"columns": made["columns"], "num_rows": len(made["data"])}
            more = {"images": sorted(pictures)} if pictures else {}
            described = self._write_once("tables", encode_table(made), ".json")
            return described | size | more

        self._add_record("tables", name, write, counts, place)

    def log_histogram(
        self,
        name: str,
        values: Any,
        *,
        bins: int = 64,
        step: int | None = None,
        epoch: int | None = None,
    ) -> None:
        """Record how values are distributed, as counts of bins of equal width.

        Parameters
        ----------
        name
            Name of the series of histograms, such as ``"grads"``.
        values
            Tensor, array or list of bools, integers or floats, of any shape. NaN and
            infinities are counted separately.
        bins : 1 to 512
            Number of bins. Integers of a smaller range get one bin each.
        step
            Optimizer steps finished. None: it gets the next number of its series.
        epoch
            Epoch of the histogram, from 1.

        Notes
        -----
        The call copies the values to the CPU and counts them: about 10 ms for a million.
        The counts, with minimum, maximum, mean and standard deviation, are in the journal.
        """
        place = f"Run.log_histogram({name!r})"
        counts = _check_series(name, epoch, step, place)
        made = make_histogram(values, bins, place)
        self._add_record("histograms", name, lambda: made, counts, place)

    def _add_artifact(self, name: str, write: Callable[[Path], object]) -> None:
        """Write an artifact and record it."""
        target = self.path / "artifacts" / name

        def write_target() -> dict[str, Any]:
            files.write_artifact(target, write)
            return files.describe_file(target)

        if self._journal.takes_rows():
            described = self._try_to_write(name, write_target)
            if described is not None:
                self._log_dict("artifacts", {name: [described]}, "Run.log_artifact")

    def _add_record(
        self,
        what: str,
        name: str,
        write: Callable[[], dict[str, Any]],
        counts: Counts,
        place: str,
    ) -> None:
        """Write an item of a series and record it: the set of its row is the series."""
        if not self._journal.takes_rows():
            return
        described = self._try_to_write(f"{what} of {name!r}", write)
        if described is not None:
            file = described.pop("file", "")
            (leaf,) = flatten_value({file: [described]}, place)
            self._log_leaves(what, name, [leaf], counts)

    def _try_to_write(
        self, name: str, write: Callable[[], dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Return what ``write`` returns; None after a warning if the disk fails."""
        try:
            return write()
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space" if is_full else "use another name"
            warn(
                f"run {self.id!r}: expected to write artifacts/{name:.300}, got "
                f"{error!s:.500}. Training continues without it; {advice}."
            )
            return None

    def _write_once(self, folder: str, data: bytes, suffix: str) -> dict[str, Any]:
        """Write a file named by its content, unless it is there; returns what it is."""
        digest = hashlib.sha256(data).hexdigest()
        file = f"{folder}/{_digest(data)}{suffix}"
        target = self.path / "artifacts" / file
        if not target.is_file() or target.stat().st_size != len(data):
            files.write_artifact(target, lambda path: path.write_bytes(data))
        return {"file": file, "size_bytes": len(data), "sha256": digest}


def check_item(
    call: str,
    name: str,
    value: Any,
    *,
    step: int | None = None,
    epoch: int | None = None,
    bins: int = 64,
) -> None:
    """Raise what ``log_image``, ``log_table`` or ``log_histogram`` would raise."""
    place = f"Run.{call}({name!r})"
    _check_series(name, epoch, step, place)
    if call == "log_image":
        make_pixels(value, place)
    elif call == "log_table":
        make_table(value, place, mask=lambda _, cell: cell, save_picture=str)
    else:
        make_histogram(value, bins, place)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_LENGTH]


def _check_series(name: object, epoch: object, step: object, place: str) -> Counts:
    """Check the name of a series, and the counts of an item; returns these as ints."""
    check_name(name, "name", place)
    if not str(name).strip():
        raise ValueError(
            f"{place}: expected a name, got {name!r}. Name what is shown, such as "
            "'samples'."
        )
    return check_arguments("", "", place, epoch=epoch, step=step)

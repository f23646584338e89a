"""Results: ``Fitted`` of a fit and ``Evaluation`` of an evaluation."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from harness.accelerators.select import accelerator as pick_accelerator
from harness.checkpoint.full_weights.placement import ModelPlacement
from harness.checkpoint.hparams import HparamDecoder, encode_hparams, find_import_name
from harness.checkpoint.saved_objects import decode_objects, encode_object
from harness.checkpoint.weights import (
    SavedModel,
    WeightsReport,
    load_weights,
    save_weights,
    write_saved_model,
)
from harness.checks.calls import explain_calls
from harness.checks.values import as_path, check_picture
from harness.data.loaders import Data
from harness.export.html import as_html
from harness.export.summary import ModelSummary, summarize
from harness.records import (
    NullRun,
    Records,
    Series,
    format_value,
    iter_filled,
    iter_metrics,
    metrics_frame,
    pack_records,
)
from tracking.errors import escape_control

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.accelerators.base import Accelerator
    from harness.learner import Learner
    from tracking import Run


def format_metrics(records: Records, index: int | None = None) -> str:
    """Return each metric at an index (None: its last) as a table, a column for each set."""
    columns: dict[str, dict[str, str]] = {}
    for split, name, at, value in iter_metrics(records):
        if index is None or at == index:
            columns.setdefault(split, {})[name] = format_value(value)
    names = [*dict.fromkeys(name for column in columns.values() for name in column)]
    if not names:
        return "no metrics"
    lines = _justify(["set", "metric", *names], str.ljust)
    for split, column in columns.items():
        texts = [split, "", *(f" {column.get(name, '')}" for name in names)]
        cells = _justify(texts, str.rjust)
        lines = [f"{line} {cell}" for line, cell in zip(lines, cells, strict=True)]
    return "\n".join(lines)


def _justify(texts: Sequence[str], justify: Callable[[str, int], str]) -> list[str]:
    plain = str.maketrans({"\n": "\\n", "\t": "\\t"})
    shown = [escape_control(text).translate(plain) for text in texts]
    width = max(map(len, shown))
    return [justify(text, width) for text in shown]


def format_times(records: Records) -> str:
    """Return the time of the fit and the mean of its epochs; empty if they are not known."""
    profile = records.get("profile", {})
    fits = _list_numbers(profile.get("fit", []), "fit_s")
    epochs = _list_numbers(profile.get("epoch", []), "epoch_s")
    if not fits or not epochs:
        return ""
    of_epochs = f" ({sum(epochs) / len(epochs):.3g} s an epoch)" if epochs[1:] else ""
    return f", {fits[-1]:.2f} s{of_epochs}"


def _list_numbers(series: Series, name: str) -> list[float]:
    """Numbers of this name in a series, which a user or a file may have made otherwise."""
    dicts = [item for _, item in iter_filled(series) if isinstance(item, dict)]
    return [item[name] for item in dicts if isinstance(item.get(name), int | float)]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Mapping[str, Any]):
    """Losses and metrics of one evaluation, by name: ``dict(evaluation)`` has them all.

    The name is that of the metric; of several sets, ``<set>/<metric>``. The value of a curve,
    such as ``MulticlassROC``, is its points.

    Attributes
    ----------
    records : dict
        ``records["metrics"]["valid"][0]`` holds the values by name. Several sets of data are
        recorded under their own names.
    """

    records: Records

    def get_metrics(self) -> pd.DataFrame:
        """Return the values as a DataFrame with the columns set, metric, epoch, value."""
        return metrics_frame(self.records)

    def _list_values(self, *, with_set: bool = False) -> dict[str, Any]:
        kinds = [self.records["metrics"], self.records.get("curves", {})]
        sets: dict[str, dict[str, Any]] = {}
        for split, own in [item for kind in kinds for item in kind.items()]:
            sets[split] = sets.get(split, {}) | (own[0] if own else {})
        sets = {split: values for split, values in sets.items() if values}
        if len(sets) == 1 and not with_set:
            return next(iter(sets.values()))
        return {
            f"{split}/{metric}": value
            for split, values in sets.items()
            for metric, value in values.items()
        }

    def __getitem__(self, name: str) -> Any:
        """Return one value by the metric's name; of several sets, by ``<set>/<metric>``."""
        values = self._list_values()
        if name in values:
            return values[name]
        return self._list_values(with_set=True)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._list_values())

    def __len__(self) -> int:
        return len(self._list_values())

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __str__(self) -> str:
        return f"Evaluation\n{format_metrics(self.records)}"


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A trained model with its records.

    Attributes
    ----------
    placement : ModelPlacement
        The model, and where its weights are; see `model`.
    records : dict
        What was logged: ``records[what][set][index - 1]``.
    learner : Learner
        Definition of the training.
    batch_options : dict
        ``batch_size`` and ``collate_fn`` of the fit, which evaluations and predictions use.
    loss : callable or None
        The fit's own copy of the loss of ``setup``, with what it learned, on the CPU. None
        if the model defines the loss.
    hparams, opt_hparams : dict
        Keyword arguments of the model and the optimizers.
    run_id : str or None
        Run that recorded the fit; None if tracking was off.
    run_path : Path or None
        Folder of that run.
    run : tracking.Run or NullRun
        That run; ``fitted.run.wait()`` waits until MLflow has it. A copy of this object, or
        a loaded model, has a `NullRun`.
    signum : int or None
        Signal that ended the fit early, 2 for Ctrl-C; None without a signal.
    example : object
        Two rows of an input of the fit, on the CPU, as a batch has it: ``export`` and
        ``summary`` call the model with it. None if it is not known, as for a loaded model.
    best_epoch, best_step : int or None
        Epoch and optimizer step of the weights, if ``KeepBestModel`` restored the best ones.
    unit : ``"epoch"`` or ``"step"``
        What the indices of metrics count: steps, if the fit validated by steps.
    start : WeightsReport or None
        What became of the weights that the fit started from, by ``fit(start=...)``.
    """

    placement: ModelPlacement = field(repr=False, compare=False)
    records: Records
    learner: Learner = field(repr=False)
    hparams: Mapping[str, object]
    opt_hparams: Mapping[str, object]
    run_id: str | None = None
    run_path: Path | None = None
    run: Run | NullRun = field(default_factory=NullRun, repr=False, compare=False)
    signum: int | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    unit: Literal["epoch", "step"] = "epoch"
    loss: Callable[..., Tensor] | None = field(default=None, repr=False)
    batch_options: Mapping[str, object] = field(default_factory=dict, repr=False)
    example: object = field(default=None, repr=False, compare=False)
    start: WeightsReport | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the run, which belongs to its process, when this is copied or pickled."""
        return {**vars(self), "run": NullRun()}

    @property
    def model(self) -> nn.Module:
        """The user's own module, on the CPU, with full weights, in evaluation mode.

        After a fit on several ranks, a small model is there on each of them (up to 16 MiB),
        a larger one on rank 0. ``evaluate``, ``predict``, ``fit`` and ``save`` work on every
        rank. After ``fit(gather=False)`` the weights are in a checkpoint.

        Raises
        ------
        RuntimeError
            If the weights are not in the memory of this process: see ``gather``.
        """
        return self.placement.get()

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that has the weights, after ``fit(gather=False)``; else None."""
        return self.placement.checkpoint

    def gather(self, *, accelerator: Accelerator | None = None) -> nn.Module:
        """Take the weights into the memory of this process, so that `model` has them.

        After a fit on several ranks, every rank must call it: rank 0 sends them. After
        ``fit(gather=False)`` it reads them from the checkpoint.

        Parameters
        ----------
        accelerator
            As in ``Learner.fit``.

        Returns
        -------
        nn.Module
            `model`.

        Raises
        ------
        CheckpointError
            If the checkpoint is gone or damaged.
        """
        return self.placement.gather(accelerator or pick_accelerator())

    @property
    def is_interrupted(self) -> bool:
        """True if a signal ended the fit early."""
        return self.signum is not None

    @property
    def _best(self) -> int | None:
        """Index of the metrics of the best weights: an epoch, or a step."""
        return self.best_epoch if self.unit == "epoch" else self.best_step

    def get_metrics(self) -> pd.DataFrame:
        """Return all metrics as a DataFrame with the columns set, metric, epoch, value.

        After a fit that validated by steps, the column ``epoch`` is called ``step``.
        """
        return metrics_frame(self.records, self.unit)

    @explain_calls
    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot each metric by epoch, or step; sets share a panel.

        If there are more than 24 metrics, the main ones are shown: losses first, then
        metrics that several sets have. A long curve keeps its lowest and highest points.

        Parameters
        ----------
        path
            Where to save the picture; None: do not save it.

        Returns
        -------
        matplotlib ``Figure``
        """
        from tracking.curves.plot import plot_curves  # noqa: PLC0415  matplotlib is slow to import

        check_picture("plot(path)", path)
        rows = self.get_metrics().itertuples(index=False, name=None)
        figure: Figure = plot_curves(rows, path, unit=self.unit)
        return figure

    def fit(
        self,
        data: Data,
        epochs: int | tuple[int, int] | None = None,
        valid_data: Data = None,
        **options: Any,
    ) -> Fitted:
        """Train a copy of this model further; this result stays as it is.

        This is a new fit of the same learner, with a new optimizer, records from epoch 1
        and its own run. A loss with state continues from what it has learned.

        Parameters
        ----------
        data, epochs, valid_data, **options
            As in ``Learner.fit``.

        Notes
        -----
        To continue with the optimizer as it was, keep checkpoints, and pass
        ``ResumeFromCheckpoint(path, restore_records=False)``.
        """
        return self.learner.fit(data, epochs, valid_data, start=self, **options)

    def summary(self, example: object = None) -> ModelSummary:
        """Describe the model: layers, output shapes, parameters and sizes.

        Parameters
        ----------
        example
            Input of the model as a batch has it; None: one of the fit.

        Returns
        -------
        ModelSummary
            ``print`` shows it as a table.
        """
        given = self.example if example is None else example
        return summarize(self.placement.module, given)

    @explain_calls
    def evaluate(self, data: Data, **options: Any) -> Evaluation:
        """Compute losses and metrics on `data`; options as in ``Learner.evaluate``."""
        return self.learner.evaluate(self, data, **options)

    @explain_calls
    def predict(self, data: Data, **options: Any) -> Any:
        """Return the model's output for `data`; options as in ``Learner.predict``."""
        return self.learner.predict(self, data, **options)

    @explain_calls
    def save(self, path: str | Path) -> None:
        """Save weights, hparams, records, loss, metrics and the model's name in a folder.

        Parameters
        ----------
        path
            Folder to create, for ``harness.load``. A model saved there before is replaced.
            On several ranks, every rank calls this; rank 0 writes, and the others wait.

        Warns
        -----
        UserWarning
            If ``harness.load`` will need ``module=``, because the model's class cannot be
            imported or an hparam could only be saved as text; or if it will not restore the
            loss or a metric, such as a lambda.

        Raises
        ------
        CheckpointError
            If the folder holds something else.
        """
        folder = as_path("save(path)", path)
        kind = self.learner.module
        about = SavedModel(
            module=f"{kind.__module__}:{getattr(kind, '__qualname__', '')}",
            hparams=encode_hparams(self.hparams),
            opt_hparams=encode_hparams(self.opt_hparams),
            records=pack_records(self.records),
            run_id=self.run_id,
            best_epoch=self.best_epoch,
            best_step=self.best_step,
            unit=self.unit,
            loss=encode_object(self.learner.loss if self.loss is None else self.loss),
            batch=encode_object(self.learner.batch),
            metrics={
                split: {
                    name: encode_object(item)
                    for name, item in getattr(self.learner.metrics, split).items()
                }
                for split in ("train", "valid")
            },
        )
        with self.placement.write_on_one_rank(f"save({str(path)!r})") as is_mine:
            if is_mine:
                weights = self.placement.module.state_dict()
                read = self.placement.open_parameters()
                write_saved_model(folder, weights, about, read)
        if reason := self._why_module_is_needed(about):
            msg = f"save({str(path)!r}): expected {reason}."
            warnings.warn(f"{msg} harness.load will need module=.", stacklevel=2)
        if lost := decode_objects(about, HparamDecoder(kind.__module__)).lost:
            msg = f"save({str(path)!r}): expected what can be found by name, got only"
            advice = "harness.load will not keep it."
            warnings.warn(f"{msg} text for {lost}. {advice}", stacklevel=2)

    def _why_module_is_needed(self, about: SavedModel) -> str | None:
        """What keeps ``harness.load`` from building the model; None if nothing does."""
        kind = self.learner.module
        if not isinstance(kind, type) or find_import_name(kind) != about.module:
            return f"a model class that can be imported, got {about.module!r}"
        if texts := HparamDecoder(kind.__module__).list_texts(about.hparams):
            return f"hparams that can be rebuilt, got only text for {texts}"
        return None

    @explain_calls
    def export(self, path: str | Path, *, example: object = None) -> None:
        """Export the model for programs without its class, and compare outputs.

        Parameters
        ----------
        path
            File to write: ``.pt2`` for ``torch.export.load``, or ``.onnx``, which needs the
            packages onnx and onnxscript. The number of rows stays free.
        example
            Input of the model as a batch has it; None: one of the fit. Its values are not
            written.

        Raises
        ------
        ValueError
            If the suffix is another one, or no example is known.
        ImportError
            If a package for the format is not installed.
        ExportError
            If the model cannot be exported, or the file gives other outputs.
        """
        from harness.export.formats import export_model  # noqa: PLC0415  seldom used

        given = self.example if example is None else example
        export_model(self.model, as_path("export(path)", path), given)

    def log_model(self, name: str = "model", *, example: object = None) -> Path:
        """Add the model to the run as a model of MLflow, which can be registered there.

        ``mlflow.pytorch.load_model`` and, if the model takes one tensor and returns one,
        ``mlflow.pyfunc.load_model`` load it without its class. The delivery process sends
        it; this call takes the seconds that torch.export needs.

        Parameters
        ----------
        name
            Name of the model; one of this name in the run's folder is replaced.
        example
            As in ``export``.

        Returns
        -------
        Path
            Folder of the model below the run's; MLflow can also load it from there.

        Raises
        ------
        ValueError
            If the fit was not tracked, the name is invalid, or no example is known.
        ExportError
            As in ``export``.
        """
        from harness.export.mlflow_model import write_mlflow_model  # noqa: PLC0415
        from tracking.delivery.models import adding_model  # noqa: PLC0415

        if self.run_path is None:
            msg = "log_model: expected a fit that was tracked, got one without a run."
            raise ValueError(f"{msg} Fit with tracker=None, or use export(path).")
        last = len(self.records.get("metrics", {}).get("train", []))
        about = {"luz_run": self.run_id, "step": self._best or last}
        given = self.example if example is None else example
        with adding_model(self.run_path, name) as folder:
            write_mlflow_model(self.model, folder, given, about)
        return self.run_path / "models" / name

    def save_weights(self, path: str | Path) -> None:
        """Save only the weights, in a safetensors file."""
        file = as_path("save_weights(path)", path)
        with self.placement.write_on_one_rank(
            f"save_weights({str(path)!r})"
        ) as is_mine:
            if is_mine:
                save_weights(
                    self.placement.module, file, self.placement.open_parameters()
                )

    def load_weights(self, path: str | Path, *, strict: bool = True) -> WeightsReport:
        """Load other weights into the model, by name.

        Parameters
        ----------
        path
            File of ``save_weights`` or any other safetensors file, file of ``torch.save``
            with plain tensors, folder of ``save``, checkpoint, saved on any number of
            ranks, or folder of checkpoints, of which the newest is used.
        strict
            Refuse different names or shapes; False loads the weights that fit.

        Returns
        -------
        WeightsReport
            Names that were ``loaded``, ``missing``, ``unexpected`` and ``mismatched``.

        Raises
        ------
        CheckpointError
            If there are no weights at `path`, or, with `strict`, they do not fit.
        """
        return load_weights(
            self.model, as_path("load_weights(path)", path), strict=strict
        )

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: what it is, and the metrics as a table."""
        *_, best = self._describe()
        frame = metrics_frame(self.records, self.unit)
        last = frame.drop_duplicates(["metric", "set"], keep="last")
        rows: dict[str, dict[str, str]] = {}
        for title, found in ((f"last {self.unit}", last), ("weights", frame)):
            if title == "weights":
                if best is None:
                    continue
                title, found = f"{self.unit} {best}", frame[frame[self.unit] == best]
            for metric, split, value in found[["metric", "set", "value"]].itertuples(
                index=False, name=None
            ):
                is_number = isinstance(value, int | float)
                text = f"{value:.4g}" if is_number else str(value)
                rows.setdefault(f"{split}/{metric}", {})[title] = text
        return as_html("\n".join(filter(None, self._describe()[:2])), rows)

    def _describe(self) -> tuple[str, str, int | None]:
        """The first line about this result, the line about its run, and the best place."""
        num_params = sum(param.numel() for param in self.placement.module.parameters())
        count = len(self.records.get("metrics", {}).get("train", []))
        name = type(self.placement.module).__name__
        units = self.unit if count == 1 else f"{self.unit}s"
        head = f"Fitted {name}, {num_params:,} parameters, {count} {units}"
        where = f"run {self.run_id} in {self.run_path}" if self.run_id else ""
        if self._best is not None:
            head += f", weights of {self.unit} {self._best}"
        return head + format_times(self.records), where, self._best

    def __str__(self) -> str:
        head, where, best = self._describe()
        lines = [head, format_metrics(self.records, best), where]
        return "\n".join(filter(None, lines))

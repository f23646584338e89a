"""Models of a run: folders that delivery logs in MLflow as they are."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

from tracking.delivery.waiting import RunDelivery
from tracking.mlflow_store.client import RefusedError
from tracking.mlflow_store.writer import RunWriter
from tracking.store import Manifest, get_rank_dir, is_being_written

_NAME: Final = re.compile(r"[\w\- ]{1,100}")

_NUM_TRIES: Final = 20

_DAMAGES: Final = (
    AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError,
)  # fmt: skip
"""What reading a damaged description raises."""


def check_model_name(name: object, place: str) -> str:
    """Return the name of a model if MLflow takes it."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{place}: expected letters, digits, '-', '_' and spaces as name, got "
            f"{name!r}. Pass a name such as 'model'."
        )
    return name


@contextlib.contextmanager
def adding_model(run_path: Path, name: str) -> Iterator[Path]:
    """Put a model that the block writes into a run, and have it delivered.

    Parameters
    ----------
    run_path
        Folder of the run, which may have ended.
    name
        Of the model; one of this name is replaced.

    Yields
    ------
    folder that the block writes; nothing of it is kept if the block raises
    """
    target = run_path / "models" / check_model_name(name, "log_model")
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as temporary:
        made = Path(temporary, "made")
        made.mkdir()
        yield made
        _put_in_place(made, target)
    manifest = Manifest.read(run_path)
    if manifest.deliver and not is_being_written(get_rank_dir(run_path, 0)):
        RunDelivery(run_path).start(manifest)


def _put_in_place(made: Path, target: Path) -> None:
    """Rename a folder, in place of an older one; ranks may do so at the same time."""
    for number in range(_NUM_TRIES):
        with contextlib.suppress(FileNotFoundError):
            target.rename(made.with_name(f"old-{number}"))
        try:
            made.rename(target)
        except OSError:  # another rank was faster
            if number == _NUM_TRIES - 1:
                raise
        else:
            return


def send_models(writer: RunWriter, run_path: Path) -> None:
    """Log the models of a run that its MLflow run does not have."""
    folder = run_path / "models"
    if folder.is_symlink() or not folder.is_dir():  # a link may lead anywhere
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.is_symlink():
            continue
        tag = f"luz.model.{path.name}"
        try:
            about = _read_about(path)
            if writer.tags.get(tag, "").startswith(about["model_uuid"]):
                continue
            model_id = _send_model(writer, path, about)
            writer.set_tag(tag, f"{about['model_uuid']} {model_id}")
        except (*_DAMAGES, RefusedError) as error:
            writer.refused[f"models/{path.name}"] = f"{error}"[:200]


def _read_about(path: Path) -> dict[str, Any]:
    file = path / "MLmodel"
    if file.is_symlink():
        raise FileNotFoundError("expected a file MLmodel, got a link")
    about = yaml.safe_load(file.read_text())
    if not isinstance(about, dict) or not isinstance(about["model_uuid"], str):
        raise TypeError("expected a dictionary with model_uuid in MLmodel")
    return about


def _list_links(folder: str, names: list[str]) -> list[str]:
    """Links in a folder, which MLflow would follow wherever they lead."""
    return [name for name in names if Path(folder, name).is_symlink()]


def _send_model(writer: RunWriter, path: Path, about: dict[str, Any]) -> str:
    """Log one model, with the ids of MLflow in its description; returns its id."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "model")
        shutil.copytree(path, copy, ignore=_list_links)

        def complete(model_id: str, location: str) -> None:
            ids = {"model_id": model_id, "run_id": writer.run_id}
            text = yaml.safe_dump(about | ids | {"artifact_path": location})
            (copy / "MLmodel").write_text(text)

        step = (about.get("metadata") or {}).get("step") or 0
        return writer.client.send_model(
            writer.run_id, writer.experiment_id, path.name, copy, int(step), complete
        )

"""A run's place in MLflow: its experiment and run there, found again or made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tracking.delivery.state import DeliveryState
from tracking.mlflow_store.client import (
    MAX_TAG_LENGTH,
    GoneError,
    MlflowRun,
    StoreClient,
    UnreachableError,
    as_json,
)
from tracking.mlflow_store.tags import as_ms, page_url, run_tags
from tracking.mlflow_store.writer import RunWriter
from tracking.store import Manifest, get_first_error

RUN_TAG: Final = "luz.run_id"
SUPERSEDES: Final = "luz.supersedes"
SUPERSEDED_BY: Final = "luz.superseded_by"
DELIVERED: Final = "luz.delivered"
_MAX_NAME: Final = 200


class RunResolver:
    """Finds and makes the MLflow run of a run.

    Parameters
    ----------
    run_path
        Folder of the run.
    uri
        Tracking URI of the store.
    open_remote
        Opens it.
    experiment_name, experiment_id
        What MLflow's own variables say; for a run that names no experiment.
    redact
        Takes secrets out of a text.

    Attributes
    ----------
    uri
        Tracking URI of the store, without credentials.
    manifest
        Of the run, as last read.
    remote
        The store, once connected.
    is_borrowed
        Whether the run goes into an MLflow run that the caller had made.
    """

    def __init__(
        self,
        run_path: Path,
        uri: str,
        open_remote: Callable[[str], StoreClient],
        *,
        experiment_name: str | None = None,
        experiment_id: str | None = None,
        redact: Callable[[str], str] = str,
    ) -> None:
        self.manifest = Manifest.read(run_path)
        self.remote: StoreClient
        self.is_borrowed = bool(self.manifest.mlflow.get("borrowed"))
        self.uri = redact(uri)
        self._run_path = run_path
        self._secret_uri = uri
        self._open_remote = open_remote
        self._is_open = False
        self._experiment_name = self.manifest.experiment or experiment_name
        self._experiment_id = experiment_id
        self._redact = redact

    def read_manifest(self) -> Manifest:
        """The manifest as it is now."""
        self.manifest = Manifest.read(self._run_path)
        self.manifest.error = get_first_error(self._run_path, self.manifest)
        return self.manifest

    def connect(self) -> RunWriter:
        """The MLflow run to be filled, made if there is none."""
        found = self.find()
        if found is None:
            found = self._create(self.remote_experiment(), {})
        return self.writer(found)

    def find(self) -> MlflowRun | None:
        """The MLflow run, if there is one that has not been superseded."""
        if not self._is_open:
            self.remote = self._open_remote(self._secret_uri)
            self._is_open = True
        if self.is_borrowed:
            return self.remote.run(self.manifest.mlflow["run_id"])
        return self._known() or self._searched(self.remote_experiment())

    def remote_experiment(self) -> str:
        """Id of the experiment."""
        try:
            return self.remote.experiment_id(self._experiment_name, self._experiment_id)
        except GoneError as error:  # in the bin: it may be restored any time
            raise UnreachableError(str(error)) from error

    def writer(self, run: MlflowRun) -> RunWriter:
        """Writer that fills an MLflow run."""
        mark = f"{DELIVERED}.{self.manifest.id}" if self.is_borrowed else DELIVERED
        return RunWriter(self.remote, run, mark)

    def replace(self, old_id: str) -> MlflowRun:
        """Make a fresh MLflow run instead of one that shows what is superseded."""
        old = self.remote.run(old_id)
        runs = self.remote.find_runs(old.experiment_id, SUPERSEDES, old_id)
        fresh = next(iter(runs), None)
        if fresh is None:
            fresh = self._create(old.experiment_id, {SUPERSEDES: old_id})
        self._retire(old, fresh)
        return fresh

    def tags(self, names: Mapping[str, list[str]]) -> dict[str, str]:
        """Tags of our own: what describes the run, and names that MLflow refused."""
        found = run_tags(self.manifest, self._run_path, self._redact)
        for i, some in enumerate(_name_tags(names), start=1):
            found["luz.names" if i == 1 else f"luz.names.{i}"] = some
        return found

    def page_url(self, writer: RunWriter) -> str | None:
        """Address of the run's page; None for a store without a server."""
        if not self.uri.startswith(("http://", "https://")):
            return None
        return page_url(self.uri, writer.experiment_id, writer.run_id)

    def _known(self) -> MlflowRun | None:
        """The run that an earlier delivery used, if it is in this store and in use."""
        state = DeliveryState.read(self._run_path)
        if state is None or state.mlflow_run_id is None:
            return None
        if state.tracking_uri != self.uri:
            return None
        try:
            run = self.remote.run(state.mlflow_run_id)
        except GoneError:
            return None
        is_ours = run.tags.get(RUN_TAG) == self.manifest.id
        return run if is_ours and SUPERSEDED_BY not in run.tags else None

    def _searched(self, experiment_id: str) -> MlflowRun | None:
        """The run by its tag."""
        runs = self.remote.find_runs(experiment_id, RUN_TAG, self.manifest.id)
        runs = [run for run in runs if SUPERSEDED_BY not in run.tags]
        by_id = {run.run_id: run for run in runs}
        for run in runs:
            # Made by a delivery that died before it could tag the old one.
            old = by_id.pop(run.tags.get(SUPERSEDES, ""), None)
            if old is not None:
                self._retire(old, run)
        return next(iter(by_id.values()), None)

    def _create(self, experiment_id: str, more: Mapping[str, str]) -> MlflowRun:
        """Make a run in MLflow."""
        tags = run_tags(self.manifest, self._run_path, self._redact)
        start_ms = as_ms(self.manifest.created) or 0
        return self.remote.create_run(
            experiment_id, self.manifest.name, start_ms, {**tags, **more}
        )

    def _retire(self, old: MlflowRun, fresh: MlflowRun) -> None:
        """Mark a run as superseded."""
        self.remote.send(old.run_id, (), {SUPERSEDED_BY: fresh.run_id})
        name = f"{self.manifest.name} (superseded)"
        self.remote.set_status(old.run_id, "KILLED", old.end_ms, name)


def _name_tags(names: Mapping[str, list[str]]) -> list[str]:
    """JSON of a mapping in as many texts as tags must be."""
    texts: list[str] = []
    some: dict[str, list[str]] = {}
    for key, series in names.items():
        some[key] = [part[:_MAX_NAME] for part in series]
        if len(as_json(some)) > MAX_TAG_LENGTH - 1000:
            texts.append(as_json(some))
            some = {}
    return [*texts, as_json(some)] if some else texts

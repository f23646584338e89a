"""Find or create the MLflow run of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tracking.mlflow_store.client import (
    MAX_TAG_LENGTH,
    GoneError,
    MlflowRun,
    StoreClient,
    UnreachableError,
    as_json,
)
from tracking.mlflow_store.tags import run_tags, to_ms
from tracking.mlflow_store.uris import page_url
from tracking.mlflow_store.writer import RunWriter
from tracking.settings import Settings
from tracking.store import Manifest, get_first_error

RUN_TAG: Final = "luz.run_id"
SUPERSEDES: Final = "luz.supersedes"
SUPERSEDED_BY: Final = "luz.superseded_by"
DELIVERED: Final = "luz.delivered"
_MAX_NAME: Final = 200


class RunResolver:
    """Finds or creates the MLflow run of a run.

    Parameters
    ----------
    settings
        Its experiment is used if the run names none, and its secrets are masked. None: no
        variable is set.
    may_exist
        Whether MLflow may have the run already; else it is not searched for at first.

    Attributes
    ----------
    uri
        Tracking URI of the store, without credentials.
    manifest
        Of the run, as last read.
    is_borrowed
        Whether the records go into an MLflow run that the caller created.
    """

    def __init__(
        self,
        run_path: Path,
        uri: str,
        open_client: Callable[[str], StoreClient],
        settings: Settings | None = None,
        *,
        may_exist: bool = True,
    ) -> None:
        self.settings = settings or Settings.read({})
        self.manifest = Manifest.read(run_path)
        self.is_borrowed = bool(self.manifest.mlflow.get("borrowed"))
        self.uri = self.settings.redact_address(uri)
        self._run_path = run_path
        self._secret_uri = uri
        self._open_client = open_client
        self._may_exist = may_exist

    @functools.cached_property
    def client(self) -> StoreClient:
        """Client of the store, which is opened at its first use."""
        return self._open_client(self._secret_uri)

    def reload_manifest(self) -> Manifest:
        """Read the manifest again, with the error of whichever rank failed first."""
        self.manifest = Manifest.read(self._run_path)
        self.manifest.error = get_first_error(self._run_path, self.manifest)
        return self.manifest

    def connect(self, known_id: str | None = None) -> RunWriter:
        """Open the MLflow run; create it if there is none.

        Parameters
        ----------
        known_id
            Id of the run that an earlier delivery to this store used.
        """
        found = self.find(known_id)
        if found is None:
            experiment_id = self._resolve_experiment()
            self.reload_manifest()  # by now it has the code that the run was started on
            self._may_exist = True  # the answer to the next call may be lost
            found = self._create(experiment_id, {})
        return self.open_writer(found)

    def find(self, known_id: str | None = None) -> MlflowRun | None:
        """Find the MLflow run; None if there is none, or only superseded ones."""
        if self.is_borrowed:
            return self.client.run(self.manifest.mlflow["run_id"])
        if not self._may_exist:
            return None
        return self._get_known(known_id) or self._search(self._resolve_experiment())

    def open_writer(self, run: MlflowRun) -> RunWriter:
        """Create the writer of an MLflow run."""
        is_borrowed = self.is_borrowed
        watermark_tag = f"{DELIVERED}.{self.manifest.id}" if is_borrowed else DELIVERED
        return RunWriter(self.client, run, watermark_tag, is_borrowed=is_borrowed)

    def replace(self, old_id: str) -> MlflowRun:
        """Create a run that supersedes another one, and mark the old one."""
        old = self.client.run(old_id)
        runs = self.client.find_runs(old.experiment_id, SUPERSEDES, old_id)
        fresh = next(iter(runs), None)
        if fresh is None:
            fresh = self._create(old.experiment_id, {SUPERSEDES: old_id})
        self._retire(old, fresh)
        return fresh

    def tags(
        self, names: Mapping[str, list[str]], per_key: int | None = None
    ) -> dict[str, str]:
        """Tags that describe the run, and the names that MLflow does not accept.

        Parameters
        ----------
        names
            What, set and name by key.
        per_key
            Number of points that MLflow has of long series; None if no series is longer.
        """
        redact = self.settings.redact
        found = run_tags(self.manifest, self._run_path, redact, per_key)
        for i, text in enumerate(_name_tags(names), start=1):
            found["luz.names" if i == 1 else f"luz.names.{i}"] = text
        return found

    def page_url(self, writer: RunWriter) -> str | None:
        """Address of the run's page; None for a store without a server."""
        if not self.uri.startswith(("http://", "https://")):
            return None
        return page_url(
            self.uri, writer.experiment_id, {writer.run_id: writer.experiment_id}
        )

    def _resolve_experiment(self) -> str:
        """Id of the experiment, created if needed."""
        try:
            name = self.manifest.experiment or self.settings.experiment_name
            return self.client.experiment_id(name, self.settings.experiment_id)
        except GoneError as error:  # deleted: it may be restored at any time
            raise UnreachableError(str(error)) from error

    def _get_known(self, known_id: str | None) -> MlflowRun | None:
        """The run of an earlier delivery, if it still exists and is not superseded."""
        if known_id is None:
            return None
        try:
            run = self.client.run(known_id)
        except GoneError:
            return None
        is_ours = run.tags.get(RUN_TAG) == self.manifest.id
        return run if is_ours and SUPERSEDED_BY not in run.tags else None

    def _search(self, experiment_id: str) -> MlflowRun | None:
        """Search for the run by its tag."""
        runs = self.client.find_runs(experiment_id, RUN_TAG, self.manifest.id)
        runs = [run for run in runs if SUPERSEDED_BY not in run.tags]
        by_id = {run.run_id: run for run in runs}
        for run in runs:
            # Created by a delivery that died before it could mark the old run.
            old = by_id.pop(run.tags.get(SUPERSEDES, ""), None)
            if old is not None:
                self._retire(old, run)
        return next(iter(by_id.values()), None)

    def _create(self, experiment_id: str, more: Mapping[str, str]) -> MlflowRun:
        tags = run_tags(self.manifest, self._run_path, self.settings.redact)
        start_ms = to_ms(self.manifest.created) or 0
        return self.client.create_run(
            experiment_id, self.manifest.name, start_ms, {**tags, **more}
        )

    def _retire(self, old: MlflowRun, fresh: MlflowRun) -> None:
        """Mark a run as superseded."""
        self.client.send(old.run_id, (), {SUPERSEDED_BY: fresh.run_id})
        name = f"{self.manifest.name} (superseded)"
        self.client.set_status(old.run_id, "KILLED", old.end_ms, name)


def _name_tags(names: Mapping[str, list[str]]) -> list[str]:
    """JSON of a mapping, split into as many texts as tags need."""
    texts: list[str] = []
    some: dict[str, list[str]] = {}
    for key, series in names.items():
        some[key] = [word[:_MAX_NAME] for word in series]
        if len(as_json(some)) > MAX_TAG_LENGTH - 1000:
            texts.append(as_json(some))
            some = {}
    return [*texts, as_json(some)] if some else texts

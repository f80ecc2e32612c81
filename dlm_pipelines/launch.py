"""Launch a job as the UI does: over the webserver's GraphQL."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dlm_core.errors import InvalidValueError, ServiceUnavailableError

_LAUNCH = """
mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename
  ... on LaunchRunSuccess { run { runId } }
  ... on RunConfigValidationInvalid { errors { message } }
  ... on PipelineNotFoundError { message }
  ... on PythonError { message } } }
"""
_WHERE = """
{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name }
  jobs { name } } } } }
"""
_SWITCHES = """
{ repositoriesOrError { ... on RepositoryConnection { nodes { jobs { name }
  sensors { name sensorState { status } } schedules { name scheduleState { status } } } } } }
"""
_STATUS = """
query($id: ID!) { runOrError(runId: $id) { __typename ... on Run { status }
  ... on PythonError { message } ... on RunNotFoundError { message } } }
"""
_EVENTS = """
query($id: ID!, $after: String) { runOrError(runId: $id) { __typename
  ... on PythonError { message } ... on RunNotFoundError { message } ... on Run {
  eventConnection(afterCursor: $after) { cursor hasMore events { __typename
  ... on HandledOutputEvent { metadataEntries { ...entry } }
  ... on ExecutionStepOutputEvent { metadataEntries { ...entry } }
  ... on ExecutionStepFailureEvent { error { message } failureMetadata { description } } } } } } }
fragment entry on MetadataEntry { label
  ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue }
  ... on MarkdownMetadataEntry { mdStr } ... on TextMetadataEntry { text }
  ... on BoolMetadataEntry { boolValue } }
"""
_ENDED = ("SUCCESS", "FAILURE", "CANCELED")
_POLL_SECONDS = 1.0
#: a webserver that is started again is waited for so long
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class LaunchedRun:
    """A run that was launched; ``metadata`` is what it told at its end."""

    run_id: str
    status: str
    url: str
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def launch_job(
    ui_url: str,
    job: str,
    config: Mapping[str, Any] | None = None,
    *,
    wait: bool = False,
    timeout: float | None = None,
    on_update: Callable[[str], None] | None = None,
) -> LaunchedRun:
    """Launch a job (``replication``) with its config (``{"dry_run": True}``) and maybe wait.

    Parameters
    ----------
    ui_url : address of the Dagster UI
    timeout : seconds to wait at most; None waits for the end
    on_update : called with each new status

    Raises
    ------
    ServiceUnavailableError
        if the UI does not answer.
    InvalidValueError
        if there is no such job, or the config does not fit it.
    """
    name = f"{job}_job"
    for key, value in (config or {}).items():
        # of {"env": …} Dagster looks the variable up, and without it fails as if it were down
        if isinstance(value, (Mapping, list)):
            told = f"{key}={json.dumps(value)}"
            raise InvalidValueError(what=f"config of {name}", value=told, expected="a plain value")
    location, repository, jobs = _where(ui_url)
    if name not in jobs:
        known = ", ".join(sorted(one.removesuffix("_job") for one in jobs))
        raise InvalidValueError(what="job", value=job, expected=f"one of {known}")
    ops = {} if not config else {"ops": {f"drain_{job}": {"config": dict(config)}}}
    params = {
        "selector": {
            "repositoryLocationName": location,
            "repositoryName": repository,
            "jobName": name,
        },
        "runConfigData": json.dumps(ops),
    }
    answer = _ask(ui_url, _LAUNCH, {"params": params})["launchRun"]
    if answer["__typename"] != "LaunchRunSuccess":
        errors = answer.get("errors") or [{"message": answer.get("message", "refused")}]
        first = " ".join(errors[0]["message"].split())
        raise InvalidValueError(what=f"config of {name}", value=dict(config or {}), expected=first)
    run_id = answer["run"]["runId"]
    url = f"{ui_url.rstrip('/')}/runs/{run_id}"
    if not wait:
        return LaunchedRun(run_id, "QUEUED", url)
    return _wait(ui_url, run_id, url, timeout, on_update)


def count_runs(ui_url: str) -> int:
    """How many runs Dagster has a record of.

    Raises
    ------
    ServiceUnavailableError
    """
    found = _ask(ui_url, "{ runsOrError { ... on Runs { count } } }", {})
    return int(found["runsOrError"].get("count") or 0)


def switched_off(ui_url: str) -> list[str]:
    """Sensors and schedules of the DLM that somebody has switched off.

    Raises
    ------
    ServiceUnavailableError
    """
    found = []
    for node in _ask(ui_url, _SWITCHES, {})["repositoriesOrError"].get("nodes", ()):
        if "replication_job" in [one["name"] for one in node["jobs"]]:
            for kind, state in (("sensors", "sensorState"), ("schedules", "scheduleState")):
                found += [s["name"] for s in node[kind] if s[state]["status"] != "RUNNING"]
    return found


def _wait(
    ui_url: str,
    run_id: str,
    url: str,
    timeout: float | None,
    on_update: Callable[[str], None] | None,
) -> LaunchedRun:
    deadline = None if timeout is None else time.monotonic() + timeout
    shown = ""
    while True:
        status = _patiently(ui_url, _STATUS, run_id)["status"]
        if status != shown and on_update is not None:
            on_update(status)
        shown = status
        if status in _ENDED:
            return LaunchedRun(run_id, status, url, *_told(ui_url, run_id))
        if deadline is not None and time.monotonic() > deadline:
            return LaunchedRun(run_id, status, url)
        time.sleep(_POLL_SECONDS)


def _patiently(ui_url: str, query: str, run_id: str, **more: Any) -> dict[str, Any]:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            found: dict[str, Any] = _ask(ui_url, query, {"id": run_id, **more})["runOrError"]
            if found["__typename"] != "Run":
                # its database is away, say; that is no end of the run
                raise ServiceUnavailableError(service="the Dagster UI", reason=found["message"])
            return found
        except ServiceUnavailableError:
            if time.monotonic() > end:
                raise
            time.sleep(_POLL_SECONDS)


def _told(ui_url: str, run_id: str) -> tuple[dict[str, Any], str | None]:
    """What a run told at its end; a long run has many pages of progress before that."""
    metadata: dict[str, Any] = {}
    error, after, more = None, None, True
    while more:
        page = _patiently(ui_url, _EVENTS, run_id, after=after)["eventConnection"]
        for event in page["events"]:
            for entry in event.get("metadataEntries") or ():
                values = [value for key, value in entry.items() if key != "label"]
                if values:
                    metadata[entry["label"]] = values[0]
            if event.get("error"):
                told = (event.get("failureMetadata") or {}).get("description")
                error = told or event["error"]["message"].strip()
        after, more = page["cursor"], page["hasMore"]
    return metadata, error


def _where(ui_url: str) -> tuple[str, str, list[str]]:
    for node in _ask(ui_url, _WHERE, {})["repositoriesOrError"].get("nodes", ()):
        jobs = [one["name"] for one in node["jobs"]]
        if "replication_job" in jobs:
            return node["location"]["name"], node["name"], jobs
    raise ServiceUnavailableError(
        service="the DLM's code location", reason=f"{ui_url} has not loaded it"
    )


def _ask(ui_url: str, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(
        f"{ui_url.rstrip('/')}/graphql", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise ServiceUnavailableError(
            service="the Dagster UI",
            reason=f"it answers: {error}",
            hint="its database may be away; log/webserver.log in DLM_HOME tells more",
        ) from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise ServiceUnavailableError(service="the Dagster UI", reason=str(error)) from None
    if answer.get("errors"):
        raise ServiceUnavailableError(
            service="the Dagster UI", reason=answer["errors"][0]["message"]
        )
    data: dict[str, Any] = answer["data"]
    return data

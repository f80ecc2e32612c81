"""The command line ``dlm``. Exit codes are those of the errors (docs/cli.md)."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from dlm_cli import (
    auditing,
    backup,
    holds,
    items,
    places,
    plans,
    rebuilding,
    staging,
    testing,
    transfers,
    verifying,
    watching,
)
from dlm_cli.session import (
    catalogue,
    fail,
    human,
    parse_pairs,
    plain_errors,
    printable,
    show_json,
    show_table,
)
from dlm_core.errors import (
    AlreadyRunningError,
    DlmError,
    InputError,
    InvalidValueError,
    LocalFileError,
    ServiceUnavailableError,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Keep the verified copies that policy asks for, and prove that nothing is lost.",
)


def _tell_version(asked: bool) -> None:
    if asked:
        print(f"dlm {version('dlm')}")
        raise typer.Exit


@app.callback()
def options(
    told: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", is_eager=True, callback=_tell_version
        ),
    ] = False,
) -> None:
    """Keep the verified copies that policy asks for, and prove that nothing is lost."""


db_app = typer.Typer(no_args_is_help=True, help="The catalogue database.")
app.add_typer(places.location_app, name="location")
places.storage_app.command("test")(testing.storage_test)
app.add_typer(places.storage_app, name="storage")
app.add_typer(transfers.link_app, name="link")
app.add_typer(items.item_app, name="item")
app.add_typer(watching.watch_app, name="watch")
app.add_typer(holds.hold_app, name="hold")
app.add_typer(auditing.audit_app, name="audit")
app.add_typer(plans.plan_app, name="plan")
app.add_typer(db_app, name="db")
app.command("register")(items.register)
app.command("expire")(items.expire)
app.command("restore")(items.restore)
app.command("withdraw")(items.withdraw)
app.command("verify")(items.verify)
app.command("verification")(verifying.verification)
app.command("operations")(transfers.operations)
app.command("retry")(items.retry)
app.command("stage")(staging.stage)
app.command("backup")(backup.backup)
app.command("rebuild")(rebuilding.rebuild)
places.storage_app.command("export")(rebuilding.storage_export)
db_app.command("restore")(backup.restore)
db_app.command("confirm")(backup.confirm)
db_app.command("distrust")(backup.distrust)


@app.command()
@plain_errors
def up() -> None:
    """Start the services on DLM_HOME: PostgreSQL, the Dagster daemon and UI. Ctrl-C stops them."""
    import threading

    from dlm_cli.services import run_services, stop_on_signals
    from dlm_core.settings import load_settings

    settings = load_settings()
    stop = threading.Event()

    def ready(ui_url: str) -> None:
        print(f"the DLM is up on {settings.home}\n  UI: {ui_url}\n  Ctrl-C stops it", flush=True)

    database = "PostgreSQL, " if settings.database_url is None else ""
    print(f"starting {database}the Dagster daemon and the UI ...", flush=True)
    with stop_on_signals(stop):
        try:
            run_services(settings, ready, stop)
        except DlmError:
            if not stop.is_set():  # Ctrl-C reaches the programs that are being started too
                raise
    print("all services have stopped")


@app.command()
@plain_errors
def demo() -> None:
    """Show the lifecycle on real files (DEMO_PATH: yours, only read; KEEP=1: leave it running)."""
    from dlm_cli.demo import run_demo

    path = os.environ.get("DEMO_PATH") or None
    keep = os.environ.get("KEEP", "") not in ("", "0")
    raise SystemExit(run_demo(Path(path) if path else None, keep, Path("demo-report.json")))


@app.command()
@plain_errors
def status(as_json: Json = False) -> None:
    """Show items, replicas, operations and storages in numbers."""
    from dlm_core.catalogue.status import status as load

    with catalogue() as context:
        found = context.transact(lambda c: load(c, context.clock()))
    if as_json:
        show_json(found)
        return
    for noun in ("items", "replicas"):
        told = ", ".join(f"{n} {state}" for state, n in found[noun].items()) or "none"
        print(f"{noun}: {told}")
    waiting = found["items_to_evaluate"]
    more = f"; {waiting} items wait for a look at what they need" if waiting else ""
    print(f"items below their target phase: {found['items_below_target_phase']}{more}")
    needed = found["deadlines"]
    if needed["late"] or needed["near"]:
        print(
            f"copies missing at their deadline: of {needed['late']} items; of {needed['near']} "
            f"more it is within a day; the earliest is {human(needed['earliest'])}"
        )
    for kind, states in found["operations"].items():
        print(f"{kind}: " + ", ".join(f"{n} {state}" for state, n in states.items()))
    for one in found["staging"]:
        print(staging.told(one))
    columns = {"name": "STORAGE", "location": "LOCATION", "phase": "PHASE", "mode": "MODE",
               "replicas": "REPLICAS", "used_bytes": "USED", "capacity_bytes": "CAPACITY",
               "fill_fraction": "FILL"}  # fmt: skip
    show_table(found["storages"], columns)


@app.command()
@plain_errors
def run(
    job: Annotated[str, typer.Argument(help="registration, replication, verification, …")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the end, tell the result.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, and change nothing.")] = False,
    config: Annotated[
        list[str], typer.Option(help="key=value of the job's config, e.g. max_delete_items=10")
    ] = [],  # noqa: B006
    timeout: Annotated[float | None, typer.Option(help="Seconds to wait at most.", min=0)] = None,
    as_json: Json = False,
) -> None:
    """Launch a job as the UI does."""
    import json

    from dlm_cli.services import read_services
    from dlm_core.settings import load_settings
    from dlm_pipelines.launch import launch_job

    if timeout is not None and not (wait or dry_run):
        raise InvalidValueError(what="--timeout", value=timeout, expected="--wait as well")
    options: dict[str, Any] = {"dry_run": True} if dry_run else {}
    for key, value in parse_pairs(config, "--config").items():
        try:
            options[key] = json.loads(value)
        except (ValueError, RecursionError):
            options[key] = value
    if dry_run and options["dry_run"] is not True:
        told = f"dry_run={options['dry_run']}"
        raise InvalidValueError(what="--config", value=told, expected="nothing against --dry-run")
    found = read_services(load_settings().home)
    if found is None:
        raise ServiceUnavailableError(service="the Dagster UI", reason="no 'dlm up' on this home")
    launched = launch_job(found["ui_url"], job, options, wait=wait or dry_run, timeout=timeout)
    if as_json:
        show_json({key: getattr(launched, key) for key in launched.__slots__})
    else:
        print(f"{launched.status} {launched.url}")
        for key, value in launched.metadata.items():
            told = f"{key}: {value}" if "\n" not in str(value) else f"{key}:\n{value}"
            print("\n".join(map(printable, told.split("\n"))))
    if launched.status in ("FAILURE", "CANCELED"):
        reason = printable(launched.error or "the run failed")
        print(f"dlm: error DLM-600: {reason}", file=sys.stderr)
        raise SystemExit(1)
    if (wait or dry_run) and launched.status != "SUCCESS":
        told = f"the run is {launched.status} and goes on: {launched.url}"
        print(f"dlm: error DLM-601: {told}", file=sys.stderr)
        raise SystemExit(1)


@app.command()
@plain_errors
def env() -> None:
    """Print the variables with which Dagster's own commands find this home, which is laid out."""
    import shlex

    from dlm_cli.services import lay_dagster_home
    from dlm_core.settings import load_settings

    settings = load_settings()
    lay_dagster_home(settings)
    print(f"export DLM_HOME={shlex.quote(str(settings.home))}")
    print(f"export DAGSTER_HOME={shlex.quote(str(settings.home / 'dagster'))}")


@app.command()
@plain_errors
def doctor(as_json: Json = False) -> None:
    """Look at everything that has to work, and tell what to do where it does not."""
    from dlm_cli.doctor import examine

    if as_json:
        found = [{"what": name, "problem": problem} for name, problem in examine()]
        show_json(found)
        raise SystemExit(1 if any(one["problem"] for one in found) else 0)
    problems = 0
    for name, problem in examine():
        print(f"{'PROBLEM' if problem else 'ok':8} {name}{': ' + problem if problem else ''}")
        problems += bool(problem)
    raise SystemExit(1 if problems else 0)


@db_app.command("upgrade")
@plain_errors
def db_upgrade() -> None:
    """Bring the catalogue's schema up to date, all or nothing."""
    from dlm_core.catalogue import schema
    from dlm_core.catalogue.dsn import catalogue_url
    from dlm_core.settings import load_settings

    schema.upgrade(catalogue_url(load_settings()))
    print(f"the catalogue is at {schema.expected_revision()}")


@db_app.command("check")
@plain_errors
def db_check() -> None:
    """Tell whether the catalogue's schema is the one this software needs."""
    from dlm_core.catalogue import schema

    with catalogue() as context:
        print(f"the catalogue is at {context.transact(schema.check)}, as it should be")


@db_app.command("stop")
@plain_errors
def db_stop() -> None:
    """Stop the embedded PostgreSQL that a command has started; 'dlm up' stops its own."""
    from dlm_cli.services import read_services
    from dlm_core.catalogue import embedded
    from dlm_core.settings import load_settings

    settings = load_settings()
    if settings.database_url is not None:
        raise InvalidValueError(
            what="DLM_DATABASE_URL", value="(set)", expected="it unset: that server is not ours"
        )
    if (found := read_services(settings.home)) is not None:
        raise AlreadyRunningError(
            home=settings.home, pid=found["pids"].get("supervisor", "?"), ui_url=found["ui_url"]
        )
    print("PostgreSQL has stopped" if embedded.stop(settings.home) else "it was not running")


def main() -> None:
    """Run the command line; no traceback reaches a user, and an error is one line."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # the shell has closed it (dlm … >&-)
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    try:
        code = app(standalone_mode=False)
    except DlmError as error:
        fail(error)
    except _UsageError as error:
        _usage(error)
    except UnicodeEncodeError as error:
        # names of files may be any octets, what the catalogue keeps as text may not
        fail(InputError(message=f"{error.object!r} is not valid: UTF-8 text"))
    except (KeyboardInterrupt, typer.Abort):
        raise SystemExit(130) from None
    except SystemExit as end:
        # rich's, of the help, where the reader went away (dlm … | head): not an error of ours
        raise SystemExit(0 if isinstance(end.__context__, BrokenPipeError) else end.code) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as error:
        # of DLM_HOME, most often: what it lacks is no fault of the program
        reason = error.strerror or str(error)
        path = error.filename2 or error.filename  # where it was copied to, if it was
        fail(LocalFileError(path=path or "a file", reason=reason))
    except Exception as error:
        if os.environ.get("DLM_TRACEBACK"):
            raise
        words = " ".join(f"{type(error).__name__}: {error}".split())
        fail(DlmError(message=f"unexpected {words}; DLM_TRACEBACK=1 shows where"))
    raise SystemExit(code if isinstance(code, int) else 0)


#: Click's, by whatever name this version of Typer keeps it
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _usage(error: Any) -> None:
    """What Typer found wrong with the arguments, in one line; without arguments, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.ctx.get_help())
        raise SystemExit(2)
    context = error.ctx
    hint = f"; see '{context.command_path} --help'" if context is not None else ""
    message = " ".join(error.format_message().split()).rstrip(".")
    fail(InputError(message=message + hint))

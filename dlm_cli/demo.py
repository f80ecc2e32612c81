"""``dlm demo``: the whole lifecycle on real files, each stage brought about by the sensors."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm_cli import demo_stages as stages
from dlm_cli.demo_files import Files, default_files, files_below
from dlm_cli.s3_server import S3Server, s3_server
from dlm_cli.services import run_services, stop_on_signals
from dlm_core.catalogue.dsn import catalogue_url
from dlm_core.catalogue.engine import make_engine
from dlm_core.errors import DlmError, InvalidValueError, ServiceUnavailableError
from dlm_core.lifecycle.work import Context
from dlm_core.settings import load_settings

_SETTINGS = {
    "DLM_WEBSERVER_PORT": "0",
    "DLM_TRASH_GRACE_SECONDS": "3",
    # the drainers of one stage are there for the next; the daemon looks every five seconds
    "DLM_LINGER_SECONDS": "45",
    "DLM_SENSOR_INTERVAL_SECONDS": "2",
    "DLM_RETRY_BASE_SECONDS": "1",
    "DLM_MAX_DRAINERS": "1",
}
_OWN = ("DLM_DATABASE_URL", "DLM_DAGSTER_DATABASE_URL")
_READY_SECONDS = 120
_INTERRUPTED = 130


class Show:
    """What a person sees: a line a stage, with what happens in it while it lasts."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self._last = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[Callable[[str], None]]:
        """Show ``title`` and, through what it yields, how far the stage is."""
        begun = time.monotonic()
        if not self.console.is_terminal:
            self.console.print(f"[bold]{title}[/bold] ...")
            yield self._now_and_then
        else:
            with self.console.status(f"[bold]{title}[/bold]") as status:
                yield lambda text: status.update(f"[bold]{title}[/bold]  {text}")
        self.console.print(f"[green]✓[/green] {title}  [dim]{time.monotonic() - begun:.1f} s[/dim]")

    def _now_and_then(self, text: str) -> None:
        if time.monotonic() - self._last >= 10:
            self._last = time.monotonic()
            self.console.print(f"  {text}")


@dataclass
class Demo:
    """A running demo: where it lies, its context on the catalogue, and its report so far."""

    home: Path
    context: Context
    show: Show
    ui_url: str
    s3: S3Server
    failed: Callable[[], BaseException | None]
    report: dict[str, Any] = field(default_factory=dict)

    def stage(self, name: str, title: str, work: Callable[..., Any]) -> Any:
        """Run one stage, timed."""
        begun = time.monotonic()
        with self.show.stage(title) as tell:
            result = work(self, tell)
        seconds = round(time.monotonic() - begun, 2)
        self.report.setdefault("stages", []).append({"name": name, "seconds": seconds})
        return result


def run_demo(demo_path: Path | None, keep: bool, report_file: Path) -> int:
    """Show the lifecycle and write the report; the exit code.

    Parameters
    ----------
    demo_path : the user's own folder, only read; None takes the installed Python packages
    keep : leave everything running until Ctrl-C
    report_file : where ``demo-report.json`` is written

    Raises
    ------
    InvalidValueError
        if ``demo_path`` is no folder with files.
    """
    files = _input(demo_path)
    show = Show()
    home = Path(tempfile.mkdtemp(prefix="dlm-demo-"))
    stop = threading.Event()
    good = interrupted = False
    try:
        with stop_on_signals(stop), ExitStack() as stack:
            demo = _start(stack, show, home, stop)
            good = _stages(demo, files)
            demo.report["ui_url"] = demo.ui_url
            report_file.write_text(json.dumps(demo.report, indent=2) + "\n")
            _print_report(demo, report_file, good)
            if keep:
                where = f"DLM_HOME={shlex.quote(str(demo.context.settings.home))}"
                show.console.print(f"left running: {demo.ui_url} ({where}); Ctrl-C ends it")
                stop.wait()
    except stages.Interrupted:
        interrupted = True
        show.console.print("interrupted")
    except DlmError as error:
        # Ctrl-C reaches the programs that are being started too
        interrupted = stop.is_set()
        if interrupted:
            show.console.print("interrupted")
            return _INTERRUPTED
        show.console.print(f"[red]the demo failed:[/red] {error.code}: {error}", markup=True)
    finally:
        if good or interrupted:
            shutil.rmtree(home, ignore_errors=True)
        else:
            show.console.print(f"logs and data are left in {home}")
    return _INTERRUPTED if interrupted else 0 if good else 1


def _input(demo_path: Path | None) -> Files:
    if demo_path is None:
        return default_files()
    if not demo_path.is_dir():
        raise InvalidValueError(what="DEMO_PATH", value=str(demo_path), expected="a folder")
    files = files_below(demo_path)
    if not any((files.root / path).stat().st_size for path in files.paths):
        raise InvalidValueError(
            what="DEMO_PATH", value=str(demo_path), expected="a folder with files that have bytes"
        )
    return files


def _start(stack: ExitStack, show: Show, home: Path, stop: threading.Event) -> Demo:
    """Start the S3 server and all services; what it starts ends with ``stack``."""
    with show.stage("services: PostgreSQL, Dagster daemon and UI, S3 server"):
        for name in _OWN:
            os.environ.pop(name, None)
        os.environ.update(_SETTINGS, DLM_HOME=str(home / "dlm"))
        server = stack.enter_context(s3_server(home / "s3"))
        settings = load_settings()
        ready = threading.Event()
        failure: list[BaseException] = []
        urls: list[str] = []

        def up(url: str) -> None:
            urls.append(url)
            ready.set()

        def serve() -> None:
            try:
                run_services(settings, up, stop)
            except DlmError as error:
                failure.append(error)
            finally:
                ready.set()  # also if it was stopped before all was up

        thread = threading.Thread(target=serve, name="dlm-services")
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        if not ready.wait(_READY_SECONDS):
            raise ServiceUnavailableError(service="Dagster", reason="it did not come up in time")
        if failure:
            raise failure[0]
        if stop.is_set():
            raise stages.Interrupted
        engine = make_engine(catalogue_url(settings))
        stack.callback(engine.dispose)
        context = Context(engine, settings, "user:demo", stop=stop)
    show.console.print(f"  Dagster UI: [bold]{urls[0]}[/bold]")
    return Demo(home, context, show, urls[0], server, lambda: failure[0] if failure else None)


def _stages(demo: Demo, files: Files) -> bool:
    """All stages in turn; True if nothing was lost and every digest agrees."""
    stages.make_places(demo, files)
    demo.stage("registration", f"registration of {len(files.paths)} files", stages.register(files))
    demo.stage("replication", "replication to SOLID", stages.replicate)
    demo.stage("repair", "a payload damaged on disk: noticed and repaired", stages.damage)
    demo.stage("expiry", "items that expire, with certificates", stages.expire)
    demo.stage("watermark", "a storage above its high watermark", stages.watermark)
    demo.stage("drain", "a storage drained and retired", stages.drain)
    demo.stage("audit", "audit: every copy is where the catalogue says", stages.audit(files))
    told = demo.report
    digests = told["record_digests"]
    return (
        digests["checked"] == digests["agree"]
        and not told["items_lost"]
        and not told["items_below_target_phase"]
    )


def _print_report(demo: Demo, report_file: Path, good: bool) -> None:
    from dlm_cli.session import human_size

    told, say = demo.report, demo.show.console.print
    digests = told["record_digests"]
    say()
    say("[bold]the demo has passed[/bold]" if good else "[bold red]the demo has failed[/bold red]")
    say(f"  items        {told['items']}")
    say(f"  replicas     {told['replicas']}")
    say(f"  bytes        {human_size(told['bytes'])} in all copies")
    say(f"  digests      {digests['agree']} of {digests['checked']} agree with RECORD files")
    say(f"  certificates {told['certificates']}")
    say(f"  below target {told['items_below_target_phase']}, lost {told['items_lost']}")
    say(f"  Dagster runs {told['runs']}")
    say(f"  report       {report_file}")

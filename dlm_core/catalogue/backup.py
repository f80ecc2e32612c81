"""Backups of the databases, made by pg_dump, and the way back: all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from dlm_core.catalogue import recovery, schema
from dlm_core.catalogue.programs import address, find_programs, last_words, run_program
from dlm_core.errors import (
    BackupError,
    CatalogueUnavailableError,
    IntegrityError,
    InvalidValueError,
    RestoreRefusedError,
)

_FORMAT = 1
_ASIDE = "before_restore_"
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was made or read: its file and what the manifest beside it says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def dagster(self) -> Path | None:
        """The dump of Dagster's database, if there is one."""
        name = self.manifest["files"].get("dagster", {}).get("name")
        return self.path.with_name(name) if name else None


def back_up(
    url: str,
    target: Path,
    *,
    now: datetime,
    dagster_url: str | None = None,
    bindir: Path | None = None,
) -> Backup:
    """Dump the catalogue at ``url``, and Dagster's database if its address is given.

    Each dump is written under a temporary name, made durable, listed by pg_restore and only then
    renamed; the manifest comes last, so a backup that has one is whole.

    Parameters
    ----------
    target
        A new file, or a folder, in which the file is named after the time.
    bindir
        The only folder to look for PostgreSQL's programs in.

    Raises
    ------
    InvalidValueError
        if the file is there already or its folder is not.
    MissingProgramError, BackupError, CatalogueUnavailableError
    """
    path = _new_file(target, now)
    with _snapshot(url) as (found, snapshot):
        programs = find_programs(found["server"], bindir)
        files = {"catalogue": _dump(programs, url, path, snapshot)}
    if dagster_url is not None:
        beside = path.with_name(f"{path.stem}.dagster.dump")
        files["dagster"] = _dump(programs, dagster_url, beside, None)
    manifest = {"format": _FORMAT, "made_at": now.isoformat(), **found, "files": files}
    _write_manifest(path, manifest)
    return Backup(path, manifest)


def _new_file(target: Path, now: datetime) -> Path:
    path = target / f"dlm-{now:%Y%m%dT%H%M%SZ}.dump" if target.is_dir() else target
    if not path.parent.is_dir():
        raise InvalidValueError(what="backup", value=str(target), expected="a file in a folder")
    if path.exists() or manifest_path(path).exists():
        raise InvalidValueError(
            what="backup", value=str(path), expected="a new file; nothing is overwritten"
        )
    return path


def manifest_path(path: Path) -> Path:
    """Where the manifest of a backup lies."""
    return path.with_name(path.name + ".json")


@contextmanager
def _snapshot(url: str) -> Iterator[tuple[dict[str, Any], str]]:
    """What the catalogue holds in one moment, and that moment's name for pg_dump."""
    with _connected(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        server = connection.info.server_version // 10_000
        if _scalar(connection, "SELECT to_regclass('public.alembic_version') IS NULL"):
            raise BackupError(what="the backup", reason="the database holds no catalogue")
        count = "SELECT coalesce(sum(n), 0)::bigint FROM public.tally WHERE noun = '{}'"
        found = {
            "schema": _scalar(connection, "SELECT version_num FROM public.alembic_version"),
            "server": server,
            "items": _scalar(connection, count.format("item")),
            "replicas": _scalar(connection, count.format("replica")),
        }
        yield found, _scalar(connection, "SELECT pg_export_snapshot()")


@contextmanager
def _connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            yield connection
    except psycopg.OperationalError as error:
        reason = str(error).strip().split("\n")[0]
        raise CatalogueUnavailableError(reason=reason, hint="is it running?") from error
    except psycopg.Error as error:
        raise BackupError(what="the database", reason=str(error).strip().split("\n")[0]) from error


def _scalar(connection: psycopg.Connection[Any], query: str) -> Any:
    row = connection.execute(query.encode()).fetchone()
    return row[0] if row else None


def _dump(programs: Path, url: str, path: Path, snapshot: str | None) -> dict[str, Any]:
    """Write one dump; what the manifest says of it."""
    if path.exists():
        raise InvalidValueError(what="backup", value=str(path), expected="a new file")
    where, environment = address(url)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    command = [str(programs / "pg_dump"), "--format=custom", "--no-password"]
    command += [f"--exclude-schema={_ASIDE}*", f"--file={fresh}", f"--dbname={where}"]
    command += [f"--snapshot={snapshot}"] if snapshot else []
    try:
        # what a catalogue tells is not for everybody
        os.close(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        run_program(command, environment)
        listed = run_program([str(programs / "pg_restore"), "--list", str(fresh)])
        if snapshot and "TABLE DATA public data_item" not in listed:
            raise BackupError(what="the backup", reason="the items are not in it")
        size, digest = _make_durable(fresh)
        fresh.rename(path)
    except OSError as error:
        raise BackupError(what="the backup", reason=str(error)) from error
    finally:
        fresh.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return {"name": path.name, "size": size, "sha256": digest}


def _make_durable(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, _digest(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    final = manifest_path(path)
    fresh = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        with open(fresh, "x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(final)
    except OSError as error:
        raise BackupError(what="the backup", reason=str(error)) from error
    finally:
        fresh.unlink(missing_ok=True)
    _sync_folder(path.parent)


# --- the way back ---------------------------------------------------------------------------------


def read_backup(path: Path) -> Backup:
    """A backup whose files are as its manifest says.

    Raises
    ------
    InvalidValueError
        if it has no manifest that this software understands, or its schema is a newer one's.
    IntegrityError
        if bytes differ from those that were written.
    """
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        known, revision, files = manifest["format"], manifest["schema"], manifest["files"]
        names = [(path.with_name(f["name"]), f["size"], f["sha256"]) for f in files.values()]
        files["catalogue"], int(manifest["server"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValueError(
            what="backup", value=str(path),
            expected=f"one with its manifest {path.name}.json beside it ({error})",
        ) from None  # fmt: skip
    if known != _FORMAT or revision not in schema.known_revisions():
        raise InvalidValueError(
            what="schema of the backup", value=revision,
            expected=f"one of {', '.join(schema.known_revisions())}; a newer DLM made it",
        )  # fmt: skip
    for file, size, digest in names:
        found = _digest(file) if file.is_file() else "nothing"
        if found != digest:
            raise IntegrityError(where=file, expected=f"{digest} ({size} bytes)", found=found)
    return Backup(path, manifest)


def restore(
    url: str,
    backup: Backup,
    *,
    actor: str,
    now: datetime,
    into_existing: str | None = None,
    bindir: Path | None = None,
) -> str | None:
    """Bring a catalogue back in one transaction, marked so that nothing is deleted on its word, and
    upgrade it if its schema is older.

    What the database held before is not lost: it is set aside under a schema whose name is
    returned (None: there was nothing).

    Parameters
    ----------
    into_existing
        The database's name, spelled out, if it has items.

    Raises
    ------
    RestoreRefusedError
        if the database has items and is not named, or others are connected to it.
    MissingProgramError, BackupError, CatalogueUnavailableError
    """
    aside, programs = _prepare(url, backup, now, into_existing, bindir)
    source = f"backup {backup.path.name} of {backup.manifest['made_at']}"
    after = recovery.mark_sql(source, actor, now)
    _load(programs, url, backup.path, aside, after)
    schema.upgrade(url)
    return aside


def restore_dagster(
    url: str,
    backup: Backup,
    *,
    now: datetime,
    replace: bool = False,
    bindir: Path | None = None,
) -> str | None:
    """Bring Dagster's database back as :func:`restore` does the catalogue; raises the same.

    ``replace`` sets aside what is there.
    """
    if backup.dagster is None:
        raise InvalidValueError(
            what="backup", value=str(backup.path), expected="one made with --with-dagster"
        )
    name = str(conninfo_to_dict(url).get("dbname")) if replace else None
    aside, programs = _prepare(url, backup, now, name, bindir)
    _load(programs, url, backup.dagster, aside, "")
    return aside


def _prepare(
    url: str, backup: Backup, now: datetime, into_existing: str | None, bindir: Path | None
) -> tuple[str | None, Path]:
    """Refuse a database that is in use; the schema to set its contents aside to, and programs."""
    with _connected(url) as connection:
        server = connection.info.server_version // 10_000
        name = connection.info.dbname
        tables = _scalar(
            connection, "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
        )
        if tables and into_existing != name and _has_content(connection):
            raise RestoreRefusedError(
                database=name, found="is not empty",
                hint=f"take an empty one, or say --into-existing {name}: what is there is set aside",
            )  # fmt: skip
        others = _scalar(
            connection,
            """SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                  AND pid <> pg_backend_pid() AND backend_type = 'client backend'""",
        )
        if tables and others:
            raise RestoreRefusedError(
                database=name, found=f"is used by {others} other connections",
                hint="stop the services that use it ('dlm up') first",
            )  # fmt: skip
    programs = find_programs(max(server, backup.manifest["server"]), bindir)
    return (f"{_ASIDE}{now:%Y%m%d%H%M%S}" if tables else None), programs


def _has_content(connection: psycopg.Connection[Any]) -> bool:
    """Items, or tables that are not a catalogue's: somebody's."""
    if _scalar(connection, "SELECT to_regclass('public.data_item') IS NULL"):
        return True
    return bool(_scalar(connection, "SELECT EXISTS (SELECT FROM public.data_item)"))


def _load(programs: Path, url: str, dump: Path, aside: str | None, after: str) -> None:
    """Run a dump's statements and ``after`` in one transaction.

    It is committed by a statement of ours that is sent only when pg_restore has ended well: a
    crash at any point leaves the database as it was.
    """
    where, environment = address(url)
    write = [str(programs / "pg_restore"), "--no-owner", "--no-privileges", "--file=-", str(dump)]
    run = [str(programs / "psql"), "--no-psqlrc", "--quiet", "--no-password", f"--dbname={where}"]
    with tempfile.TemporaryFile() as told, tempfile.TemporaryFile() as refused:
        with (
            subprocess.Popen(
                [*run, "--set=ON_ERROR_STOP=1"], env=environment, stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL, stderr=refused,
            ) as psql,
            subprocess.Popen(write, stdout=subprocess.PIPE, stderr=told) as source,
        ):  # fmt: skip
            assert psql.stdin is not None and source.stdout is not None
            whole = False
            try:
                psql.stdin.write(_before(aside))
                shutil.copyfileobj(source.stdout, psql.stdin, _BLOCK)
                whole = source.wait() == 0
                if whole:
                    psql.stdin.write(f"\nSET search_path = public;\n{after}\nCOMMIT;\n".encode())
                psql.stdin.close()
            except BrokenPipeError:
                whole = False  # psql has stopped at an error, which it told
            finally:
                source.stdout.close()
                code = psql.wait()
        if not whole or code:
            words = _read(refused) or _read(told)
            raise BackupError(what="the restore", reason=last_words(words))


def _before(aside: str | None) -> bytes:
    """The transaction's beginning: what is there goes aside."""
    text = "BEGIN;\n"
    if aside is not None:
        move = sql.SQL(
            "ALTER SCHEMA public RENAME TO {};\n"
            "CREATE SCHEMA public AUTHORIZATION pg_database_owner;\n"
        )
        text += move.format(sql.Identifier(aside)).as_string(None)
    return text.encode()


def _read(file: Any) -> str:
    file.seek(0)
    return str(file.read().decode(errors="replace"))

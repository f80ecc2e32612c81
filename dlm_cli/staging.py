"""``dlm stage``: bring what lies on tape or in an archive online, ahead of need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from dlm_cli.session import catalogue, human, plain_errors


@plain_errors
def stage(
    uris: Annotated[list[str], typer.Argument(help="Items, e.g. ska:eb-1/scan-3.ms")] = [],  # noqa: B006
    collection: Annotated[str | None, typer.Option(help="It and all collections below.")] = None,
    storage: Annotated[str | None, typer.Option(help="Only copies there.")] = None,
) -> None:
    """Ask for items on tape or in an archive to be brought online, ahead of need."""
    from dlm_core.catalogue.browse import get_item
    from dlm_core.catalogue.places import get_storage
    from dlm_core.lifecycle.staging import request_staging

    def ask(connection: Any) -> int:
        return request_staging(
            connection,
            oids=[get_item(connection, uri)["oid"] for uri in uris],
            collection=collection,
            storage_id=None if storage is None else get_storage(connection, storage)["storage_id"],
            actor=context.actor,
            now=context.clock(),
        )

    with catalogue() as context:
        print(f"{context.transact(ask)} copies will be staged; see: dlm status")


def told(waiting: Mapping[str, Any]) -> str:
    """One line about what a storage is to stage."""
    line = (
        f"storage {waiting['storage']}: {waiting['files']} files wait for staging, since "
        f"{human(waiting['since'])}, {waiting['asked']} of them asked for"
    )
    return f"{line}; {waiting['error']}" if waiting["error"] else line

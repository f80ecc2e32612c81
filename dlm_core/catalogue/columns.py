"""What the tables' columns are made of: domains, keys, defaults."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ForeignKey, MetaData, Text, Uuid, text
from sqlalchemy.dialects.postgresql import DOMAIN, TIMESTAMP
from sqlalchemy.types import UserDefinedType


class Xid8(UserDefinedType[int]):
    """A transaction id that does not wrap (PostgreSQL's xid8)."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "XID8"


#: the names PostgreSQL itself gives
metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
    }
)

Moment = DOMAIN("moment", TIMESTAMP(timezone=True), metadata=metadata)
Label = DOMAIN("label", Text(), metadata=metadata)
PhaseName = DOMAIN("phase", Text(), metadata=metadata)
Digest = DOMAIN("sha256_digest", Text(), metadata=metadata)

_NOW = text("now()")


def key(name: str) -> Column[Any]:
    """A primary key."""
    return Column(name, Uuid, primary_key=True)


def to(name: str, table: str, **options: Any) -> Column[Any]:
    """A foreign key to ``table``."""
    cascade = options.pop("ondelete", None)
    return Column(name, Uuid, ForeignKey(f"{table}.{_KEYS[table]}", ondelete=cascade), **options)


_KEYS = {
    "location": "location_id",
    "storage": "storage_id",
    "collection": "collection_id",
    "data_item": "oid",
    "replica": "uid",
    "policy_version": "policy_version_id",
    "plan": "plan_id",
    "principal": "principal_id",
    "watch": "watch_id",
}


def required(name: str, kind: Any, default: str | None = None) -> Column[Any]:
    """A column that is never NULL."""
    return Column(name, kind, nullable=False, server_default=text(default) if default else None)


def created() -> Column[Any]:
    """When the row was made."""
    return Column("created_at", Moment, nullable=False, server_default=_NOW)

"""The catalogue's tables for SQLAlchemy and Alembic.

The truth is ``schema/sql``; ``tests/schema/test_agreement.py`` proves that these agree with it in
columns, types, keys, unique constraints and indexes. CHECKs, triggers and functions are there only.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Computed,
    Date,
    Double,
    Identity,
    Index,
    Integer,
    Numeric,
    PrimaryKeyConstraint,
    Sequence,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import INTERVAL, JSONB, TIMESTAMP

from dlm_core.catalogue.columns import (
    Digest,
    Label,
    Moment,
    PhaseName,
    Xid8,
    metadata,
)
from dlm_core.catalogue.columns import created as _created
from dlm_core.catalogue.columns import key as _key
from dlm_core.catalogue.columns import required as _required
from dlm_core.catalogue.columns import to as _to

__all__ = ["Xid8", "metadata"]


location = Table(
    "location",
    metadata,
    _key("location_id"),
    Column("name", Label, nullable=False, unique=True),
    Column("facility", Text),
    Column("city", Text),
    Column("country", Text),
    _created(),
)

storage = Table(
    "storage",
    metadata,
    _key("storage_id"),
    Column("name", Label, nullable=False, unique=True),
    _to("location_id", "location", nullable=False),
    _required("interface", Text),
    _required("class", Text),
    _required("root", Text),
    _required("config", JSONB, "'{}'::jsonb"),
    _required("phase", PhaseName),
    _required("mode", Text, "'read_write'::text"),
    _required("managed", Boolean, "true"),
    Column("capacity_bytes", BigInteger),
    _required("high_watermark", Double, "0.9"),
    _required("low_watermark", Double, "0.8"),
    Column("concurrency", Integer),
    Column("trash_grace", INTERVAL),
    Column("observed_total_bytes", BigInteger),
    Column("observed_used_bytes", BigInteger),
    Column("observed_at", Moment),
    Column("rebalance_after", Moment),
    _created(),
    Column("retired_at", Moment),
    Column("verify_every_days", Integer, server_default=text("90")),
    Column("verify_bytes_per_second", BigInteger),
    Column("verify_bytes_per_day", BigInteger),
    Column("verify_day", Date),
    _required("verify_day_bytes", BigInteger, "0"),
    Column("path_rules", JSONB),
    Column("mode_reason", Text),
    Column("audit_after", Text),
    Column("drain_since", Moment),
    Column("drain_bytes", BigInteger),
    Column("mode_before", Text),
    Column("max_bytes_per_second", BigInteger),
    Column("max_concurrency", Integer),
    Index(
        "storage_place",
        "interface",
        "root",
        "config",
        unique=True,
        postgresql_where=text("mode <> 'retired'"),
    ),
)

collection = Table(
    "collection",
    metadata,
    _key("collection_id"),
    Column("name", Text, nullable=False, unique=True),
    _to("parent_id", "collection"),
    _required("metadata", JSONB, "'{}'::jsonb"),
    _created(),
    Index("collection_parent", "parent_id", postgresql_where=text("parent_id IS NOT NULL")),
)

#: of each page, the rest is left to second versions of its rows (fillfactor, per cent)
_ROOM = {"fillfactor": 40}

data_item = Table(
    "data_item",
    metadata,
    _key("oid"),
    _required("uri", Text(collation="C")),
    _required("version", Integer, "1"),
    _required("uri_bucket", Text),
    Column("name", Text, Computed(r"""substring(uri FROM '[^/:]*$')""", True), nullable=False),
    _required("state", Text, "'INITIALISED'::text"),
    _required("kind", Text, "'file'::text"),
    Column("size", BigInteger),
    Column("digest", Digest),
    Column("content_type", Text),
    _required("target_phase", PhaseName, "'SOLID'::text"),
    _required("phase_weight", SmallInteger, "0"),
    Column("shortfall", Text),
    _to("collection_id", "collection"),
    Column("owner", Text),
    _required("metadata", JSONB, "'{}'::jsonb"),
    _required("tags", JSONB, "'{}'::jsonb"),
    _created(),
    Column("expires_at", Moment),
    Column("expiry_reason", Text),
    Column(
        "expiring_at",
        Moment,
        Computed("CASE WHEN state IN ('READY', 'CORRUPTED') THEN expires_at END", True),
    ),
    Column("expired", Boolean, Computed("CASE WHEN state = 'EXPIRED' THEN true END", True)),
    UniqueConstraint("uri", "version"),
    Index("data_item_expiring", "expiring_at", postgresql_where=text("expiring_at IS NOT NULL")),
    Index("data_item_below_target", "oid", postgresql_where=text("shortfall IS NOT NULL")),
    Index(
        "data_item_collection",
        "collection_id",
        postgresql_where=text("collection_id IS NOT NULL"),
    ),
    Index("data_item_bucket", "uri_bucket"),
    Index("data_item_expired", "collection_id", postgresql_where=text("expired")),
    postgresql_with=_ROOM,
)

manifest_file = Table(
    "manifest_file",
    metadata,
    _to("oid", "data_item", primary_key=True),
    Column("path", Text, primary_key=True),
    _required("size", BigInteger),
    _required("digest", Digest),
)

item_relation = Table(
    "item_relation",
    metadata,
    _to("subject_oid", "data_item", primary_key=True),
    Column("relation", Text, primary_key=True),
    _to("object_oid", "data_item", primary_key=True),
    _created(),
    Index("item_relation_object", "object_oid"),
)

_GONE = "('TRASHED', 'DELETED')"
_UNGONE = "state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING')"
replica = Table(
    "replica",
    metadata,
    _key("uid"),
    _to("oid", "data_item", nullable=False),
    _to("storage_id", "storage", nullable=False),
    _required("path", Text),
    _required("state", Text, "'PENDING'::text"),
    _required("size", BigInteger),
    Column("digest", Digest),
    Column("mtime", Double),
    _created(),
    Column("checked_at", Moment),
    _required("accessed_at", Moment, "now()"),
    Column("expires_at", Moment),
    Column("expiry_reason", Text),
    Column("delete_after", Moment),
    Column("excluded_until", Moment),
    Column("deletion_id", Uuid),
    Column("trashed_at", Moment),
    Column("absent_at", Moment),
    Column("released_at", Moment),
    Column("told_at", Moment),
    Column("told_stamp", Text),
    Column("own_expires_at", Moment),
    Column("own_expiry_reason", Text),
    Column("live", Boolean, Computed(f"CASE WHEN state NOT IN {_GONE} THEN true END", True)),
    Column(
        "owns_path",
        Boolean,
        Computed("CASE WHEN state <> 'DELETED' AND trashed_at IS NULL THEN true END", True),
    ),
    Column("deletable_at", Moment, Computed(f"CASE WHEN {_UNGONE} THEN delete_after END", True)),
    _required("check_from", Moment, "now()"),
    Index("replica_check", "storage_id", "check_from", postgresql_where=text("live")),
    Index("replica_item_storage", "oid", "storage_id", "live", unique=True),
    Index(
        "replica_storage_path",
        "storage_id",
        "path",
        unique=True,
        postgresql_where=text("owns_path"),
    ),
    Index("replica_expiring", "deletable_at", postgresql_where=text("deletable_at IS NOT NULL")),
    Index("replica_leaving", "storage_id", postgresql_where=text("deletable_at IS NOT NULL")),
    Index("replica_refused", "oid", postgresql_where=text("delete_after > expires_at")),
    Index(
        "replica_coldest",
        "storage_id",
        "accessed_at",
        postgresql_where=text("live AND expires_at IS NULL"),
    ),
    postgresql_with=_ROOM,
)

policy_version = Table(
    "policy_version",
    metadata,
    _key("policy_version_id"),
    Column("content_hash", Text, nullable=False, unique=True),
    _required("content", Text),
    _required("actor", Text),
    _created(),
)

rule = Table(
    "rule",
    metadata,
    _key("rule_id"),
    _to("policy_version_id", "policy_version", nullable=False),
    _required("line", Integer),
    _required("name", Text),
    _required("definition", JSONB),
    UniqueConstraint("policy_version_id", "name"),
)

hold = Table(
    "hold",
    metadata,
    _key("hold_id"),
    _to("oid", "data_item"),
    _to("collection_id", "collection"),
    Column("uri_prefix", Text(collation="C")),
    _required("reason", Text),
    _required("actor", Text),
    _created(),
    Column("ends_at", Moment),
    Column("uri_pattern", Text(collation="C")),
    _required("everything", Boolean, "false"),
    _required("locked", Boolean, "false"),
    Index("hold_oid", "oid"),
    Index("hold_collection", "collection_id"),
    Index("hold_prefix", "uri_prefix", postgresql_where=text("uri_prefix IS NOT NULL")),
    Index("hold_everything", "hold_id", postgresql_where=text("everything")),
)

plan = Table(
    "plan",
    metadata,
    _key("plan_id"),
    _required("kind", Text),
    _required("content_hash", Text),
    _required("operations", BigInteger),
    _required("bytes", BigInteger),
    _required("actor", Text),
    _created(),
    Column("applied_at", Moment),
    _required("state", Text, "'PROPOSED'::text"),
    Column("reason", Text),
    _required("approvals", SmallInteger, "1"),
    _required("valid_until", Moment, "now()"),
    Index("plan_waiting", "created_at", postgresql_where=text("state = 'PROPOSED'")),
)

plan_entry = Table(
    "plan_entry",
    metadata,
    _to("plan_id", "plan", primary_key=True),
    _to("uid", "replica", primary_key=True),
    _to("oid", "data_item", nullable=False),
    _required("size", BigInteger),
    _required("basis", Text),
    _required("reason", Text),
    Index("plan_entry_uid", "uid"),
    Index("plan_entry_oid", "oid"),
)

plan_decision = Table(
    "plan_decision",
    metadata,
    _to("plan_id", "plan", primary_key=True),
    _required("actor", Text),
    _required("decision", Text),
    Column("reason", Text),
    _created(),
    Column("seq", BigInteger, Identity(always=True), primary_key=True),
)

operation = Table(
    "operation",
    metadata,
    _key("operation_id"),
    _required("kind", Text),
    _required("state", Text, "'QUEUED'::text"),
    Column("oid", Uuid, nullable=False),
    _to("uid", "replica", nullable=False),
    Column("source_uid", Uuid),
    _to("plan_id", "plan"),
    _required("reason", Text),
    _required("actor", Text),
    _required("priority", SmallInteger, "0"),
    _required("due_at", Moment),
    _required("attempts", Integer, "0"),
    Column("lease_token", Uuid),
    Column("lease_until", Moment),
    Column("worker", Text),
    Column("error_code", Text),
    Column("error", Text),
    _created(),
    Column("finished_at", Moment),
    Column("deadline", Moment),
    Column("partial", Text),
    Index("operation_due", "kind", "priority", "due_at", postgresql_where=text("state = 'QUEUED'")),
    Index("operation_lease", "lease_until", postgresql_where=text("state = 'RUNNING'")),
    Index("operation_failed", "kind", "finished_at", postgresql_where=text("state = 'FAILED'")),
    Index(
        "operation_ended",
        "finished_at",
        postgresql_where=text("state IN ('DONE', 'CANCELLED')"),
    ),
    Index("operation_uid", "uid"),
    Index(
        "operation_partial",
        "uid",
        postgresql_where=text("partial IS NOT NULL AND state IN ('QUEUED', 'RUNNING')"),
    ),
    Index(
        "operation_deadline",
        "deadline",
        postgresql_where=text("deadline IS NOT NULL AND state = 'QUEUED'"),
    ),
    postgresql_partition_by="RANGE (operation_id)",
)

deletion = Table(
    "deletion",
    metadata,
    _key("deletion_id"),
    _required("step", Text),
    _required("basis", Text),
    _required("uid", Uuid),
    _required("oid", Uuid),
    _required("storage_id", Uuid),
    _required("from_state", Text),
    _required("survivors", JSONB),
    _required("survivor_weight", SmallInteger),
    _required("target_phase", PhaseName),
    _required("holds_examined", Integer),
    _required("reason", Text),
    _to("plan_id", "plan"),
    _required("actor", Text),
    _required("proved_at", Moment),
    _required("valid_until", Moment),
    _required("xid", Xid8, "pg_current_xact_id()"),
    Column("size", BigInteger),
    Index("deletion_uid", "uid"),
    Index(
        "deletion_trashed",
        "proved_at",
        postgresql_where=text("step = 'trash' AND plan_id IS NULL"),
    ),
    postgresql_partition_by="RANGE (deletion_id)",
)

event_seq = Sequence("event_seq", metadata=metadata)
event = Table(
    "event",
    metadata,
    Column("seq", BigInteger, server_default=event_seq.next_value(), autoincrement=False),
    _required("xid", Xid8, "pg_current_xact_id()"),
    Column("at", TIMESTAMP(timezone=True), server_default=text("clock_timestamp()")),
    _required("noun", Text),
    _required("action", Text),
    Column("oid", Uuid),
    Column("uid", Uuid),
    Column("storage_id", Uuid),
    Column("old_state", Text),
    Column("new_state", Text),
    _required("actor", Text),
    Column("detail", JSONB),
    PrimaryKeyConstraint("seq", "at"),
    Index("event_oid", "oid"),
    Index("event_doubted", "at", postgresql_where=text("action = 'doubted'")),
    postgresql_partition_by="RANGE (at)",
)

audit_seal = Table(
    "audit_seal",
    metadata,
    Column("feed", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    _required("rows", BigInteger),
    _required("digest", Text),
    _required("key_sum", Numeric),
    _required("hash_sum", Numeric),
    _required("product_sum", Numeric),
    _required("previous", Text),
    _required("seal", Text),
    _required("sealed_at", Moment, "clock_timestamp()"),
    Column("dropped_at", Moment),
)

delivery = Table(
    "delivery",
    metadata,
    _key("delivery_id"),
    _required("state", Text, "'QUEUED'::text"),
    _required("destination", Text),
    _required("request", JSONB),
    _required("actor", Text),
    _created(),
    Column("finished_at", Moment),
)

principal = Table(
    "principal",
    metadata,
    _key("principal_id"),
    Column("name", Text, nullable=False, unique=True),
    _required("kind", Text),
    _created(),
)

grant = Table(
    "grant",
    metadata,
    _to("principal_id", "principal", nullable=False),
    _required("role", Text),
    _to("collection_id", "collection"),
    UniqueConstraint("principal_id", "role", "collection_id", postgresql_nulls_not_distinct=True),
)

evaluation = Table(
    "evaluation",
    metadata,
    _key("oid"),
    _required("due_at", Moment),
    _required("attempts", Integer, "0"),
    Index("evaluation_due", "due_at"),
)

tally = Table(
    "tally",
    metadata,
    _required("noun", Text),
    Column("storage_id", Uuid),
    _required("state", Text),
    _required("n", BigInteger),
    _required("bytes", BigInteger),
    Index("tally_storage", "storage_id", "state"),
)

watch = Table(
    "watch",
    metadata,
    _key("watch_id"),
    _to("storage_id", "storage", nullable=False),
    _required("path", Text, "''::text"),
    _required("scheme", Text),
    _required("options", JSONB, "'{}'::jsonb"),
    _required("interval", INTERVAL, "'00:00:30'::interval"),
    _required("scan_at", Moment),
    _created(),
    UniqueConstraint("storage_id", "path"),
)

watch_entry = Table(
    "watch_entry",
    metadata,
    _to("watch_id", "watch", primary_key=True, ondelete="CASCADE"),
    Column("path", Text, primary_key=True),
    _required("size", BigInteger),
    _required("mtime", Double),
    _required("since", Moment),
    Column("refusal", Text),
)

state_transition = Table(
    "state_transition",
    metadata,
    Column("noun", Text, primary_key=True),
    Column("old_state", Text, primary_key=True),
    Column("new_state", Text, primary_key=True),
)

recovery = Table(
    "recovery",
    metadata,
    _key("recovery_id"),
    _required("recovered_at", TIMESTAMP(timezone=True)),
    _required("source", Text),
    _required("actor", Text),
    _required("last_seq", BigInteger),
    _required("xid_shift", Numeric),
    Column("confirmed_at", TIMESTAMP(timezone=True)),
    Column("confirmed_by", Text),
)

staging = Table(
    "staging",
    metadata,
    _to("storage_id", "storage", primary_key=True),
    Column("path", Text, primary_key=True),
    _required("since", Moment),
    _required("polled_at", Moment),
    _required("retry_at", Moment),
    Column("asked_at", Moment),
    Column("error", Text),
)

storage_export = Table(
    "storage_export",
    metadata,
    _to("storage_id", "storage", primary_key=True),
    _required("digits", SmallInteger),
    _required("index_path", Text),
    _required("index_digest", Digest),
    _required("seen_xid", Xid8),
    _required("low_seq", BigInteger),
    _required("next_xid", Xid8),
    _required("next_seq", BigInteger),
    _required("exported_at", Moment),
)

link = Table(
    "link",
    metadata,
    _to("source_id", "storage", primary_key=True),
    _to("destination_id", "storage", primary_key=True),
    Column("max_bytes_per_second", BigInteger),
    Column("max_concurrency", Integer),
)

drainer = Table(
    "drainer",
    metadata,
    _key("drainer_id"),
    _required("worker", Text),
    _required("beat_at", Moment),
    _required("uses", JSONB, "'{}'::jsonb"),
    _required("running", JSONB, "'[]'::jsonb"),
    prefixes=["UNLOGGED"],
)

urgency = Table(
    "urgency",
    metadata,
    _to("oid", "data_item", primary_key=True),
    _required("priority", SmallInteger, "0"),
    Column("needed_by", Moment),
    Index("urgency_needed", "needed_by", postgresql_where=text("needed_by IS NOT NULL")),
)

-- What most rows go through, being let in, touches no index: PostgreSQL then writes the new version
-- of a row beside the old one (HOT) and no entry in any index. A predicate that names state would
-- prevent it, so predicates name generated columns that stay the same on that way.

-- Half of each page is left to the second version of its rows, which has a digest besides.
ALTER TABLE data_item SET (fillfactor = 40);
ALTER TABLE replica SET (fillfactor = 40);

ALTER TABLE data_item
  ADD COLUMN expiring_at moment
    GENERATED ALWAYS AS (CASE WHEN state IN ('READY', 'CORRUPTED') THEN expires_at END) STORED,
  ADD COLUMN expired boolean
    GENERATED ALWAYS AS (CASE WHEN state = 'EXPIRED' THEN true END) STORED;
COMMENT ON COLUMN data_item.expiring_at IS 'Its expires_at as long as it can still expire.';
COMMENT ON COLUMN data_item.expired IS 'true while it is EXPIRED, else NULL.';
DROP INDEX data_item_expiring;
CREATE INDEX data_item_expiring ON data_item (expiring_at) WHERE expiring_at IS NOT NULL;
DROP INDEX data_item_expired;
CREATE INDEX data_item_expired ON data_item (collection_id) WHERE expired;

ALTER TABLE replica
  ADD COLUMN live boolean
    GENERATED ALWAYS AS (CASE WHEN state NOT IN ('TRASHED', 'DELETED') THEN true END) STORED,
  ADD COLUMN owns_path boolean
    GENERATED ALWAYS AS (CASE WHEN state <> 'DELETED' AND trashed_at IS NULL THEN true END) STORED,
  ADD COLUMN deletable_at moment
    GENERATED ALWAYS AS (CASE WHEN state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING') THEN delete_after END) STORED,
  ADD COLUMN check_from moment NOT NULL DEFAULT now();
COMMENT ON COLUMN replica.live IS 'true unless it is TRASHED or DELETED, then NULL.';
COMMENT ON COLUMN replica.owns_path IS 'true as long as its path is its own, then NULL: a trashed replica keeps it until its bytes were moved away.';
COMMENT ON COLUMN replica.deletable_at IS 'Its delete_after as long as it can be trashed.';
COMMENT ON COLUMN replica.check_from IS 'Its next check is due so long after this: the last look, or up to an hour before it.';
-- by a rewrite: an UPDATE would keep every row twice for the statement's triggers
ALTER TABLE replica ALTER COLUMN check_from TYPE moment
  USING coalesce(GREATEST(checked_at, told_at), check_from);

-- One live replica of an item on a storage: NULLs are all different. It finds those of an item, too.
DROP INDEX replica_oid;
DROP INDEX replica_item_storage;
CREATE UNIQUE INDEX replica_item_storage ON replica (oid, storage_id, live);
DROP INDEX replica_storage_path;
CREATE UNIQUE INDEX replica_storage_path ON replica (storage_id, path) WHERE owns_path;
DROP INDEX replica_expiring;
CREATE INDEX replica_expiring ON replica (deletable_at) WHERE deletable_at IS NOT NULL;
DROP INDEX replica_leaving;
CREATE INDEX replica_leaving ON replica (storage_id) WHERE deletable_at IS NOT NULL;
DROP INDEX replica_coldest;
CREATE INDEX replica_coldest ON replica (storage_id, accessed_at) WHERE live AND expires_at IS NULL;
DROP INDEX replica_check;
CREATE INDEX replica_check ON replica (storage_id, check_from) WHERE live;

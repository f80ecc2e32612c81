-- Holds by selector, and retention locks: holds that nobody can shorten.

ALTER TABLE hold ADD COLUMN uri_pattern text COLLATE "C" CHECK (uri_pattern ~ '^[a-z][a-z0-9+.-]*:');
ALTER TABLE hold ADD COLUMN everything boolean NOT NULL DEFAULT false;
ALTER TABLE hold ADD COLUMN locked boolean NOT NULL DEFAULT false;
ALTER TABLE hold ALTER COLUMN uri_prefix TYPE text COLLATE "C";
ALTER TABLE hold DROP CONSTRAINT hold_check;
ALTER TABLE hold ADD CONSTRAINT hold_one_selector
  CHECK (num_nonnulls(oid, collection_id, uri_prefix) + everything::integer = 1);
-- the literal start of a pattern is its prefix, by which it is found
ALTER TABLE hold ADD CONSTRAINT hold_pattern_has_prefix
  CHECK (uri_pattern IS NULL OR uri_prefix IS NOT NULL);
ALTER TABLE hold ADD CONSTRAINT hold_lock_has_end CHECK (NOT locked OR ends_at IS NOT NULL);
CREATE INDEX hold_prefix ON hold (uri_prefix) WHERE uri_prefix IS NOT NULL;
CREATE INDEX hold_everything ON hold (hold_id) WHERE everything;

COMMENT ON COLUMN hold.uri_pattern IS 'LIKE pattern over the whole uri; uri_prefix is its literal start. NULL: every uri that begins so.';
COMMENT ON COLUMN hold.everything IS 'It matches every item.';
COMMENT ON COLUMN hold.locked IS 'A retention lock: it can only be lengthened, and ends by the server''s own clock.';

-- Whether a hold is in force. dlm.now is anybody's to set: a lock ends by the server's clock too.
CREATE FUNCTION hold_in_force(h hold) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT h.ends_at IS NULL OR h.ends_at > CASE WHEN h.locked
    THEN least(dlm_now(), clock_timestamp()) ELSE dlm_now() END
$$;

-- A collection and all above it.
CREATE FUNCTION collections_above(p_collection uuid) RETURNS SETOF uuid LANGUAGE sql STABLE AS $$
  WITH RECURSIVE up(collection_id) AS (
    SELECT p_collection WHERE p_collection IS NOT NULL
    UNION SELECT c.parent_id FROM collection c JOIN up USING (collection_id) WHERE c.parent_id IS NOT NULL)
  SELECT collection_id FROM up
$$;

-- Holds in force on an item now. Each way to match is looked up by its own index: the cost does not
-- grow with the holds on other items.
CREATE OR REPLACE FUNCTION holds_on(p_oid uuid, p_uri text, p_collection uuid) RETURNS SETOF hold
LANGUAGE sql STABLE ROWS 1 AS $$
  SELECT h.* FROM hold h WHERE h.oid = p_oid AND hold_in_force(h)
  UNION ALL
  SELECT h.* FROM collections_above(p_collection) up(collection_id)
    JOIN hold h ON h.collection_id = up.collection_id WHERE hold_in_force(h)
  UNION ALL
  SELECT h.* FROM generate_series(1, length(p_uri)) n
    JOIN hold h ON h.uri_prefix = left(p_uri, n) COLLATE "C"
   WHERE (h.uri_pattern IS NULL OR p_uri LIKE h.uri_pattern) AND hold_in_force(h)
     AND EXISTS (SELECT FROM hold WHERE uri_prefix IS NOT NULL)
  UNION ALL
  SELECT h.* FROM hold h WHERE h.everything AND hold_in_force(h)
$$;

-- What a hold says never changes but its end; a lock's end only moves away.
CREATE FUNCTION hold_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (NEW.hold_id, NEW.oid, NEW.collection_id, NEW.uri_prefix, NEW.uri_pattern, NEW.everything, NEW.created_at)
     IS DISTINCT FROM
     (OLD.hold_id, OLD.oid, OLD.collection_id, OLD.uri_prefix, OLD.uri_pattern, OLD.everything, OLD.created_at) THEN
    PERFORM dlm_refuse(format('hold %s: what it matches never changes; release it and add another', OLD.hold_id));
  END IF;
  IF OLD.locked AND (NOT NEW.locked OR NEW.ends_at < OLD.ends_at) THEN
    PERFORM dlm_refuse(format('hold %s is a retention lock until %s: it can only be lengthened', OLD.hold_id, OLD.ends_at));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER hold_only_lengthened BEFORE UPDATE ON hold FOR EACH ROW EXECUTE FUNCTION hold_kept();

-- Leaving a collection that is locked would be a way round the lock.
CREATE FUNCTION collection_locked(p_collection uuid) RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT EXISTS (SELECT FROM collections_above(p_collection) up(collection_id)
    JOIN hold h ON h.collection_id = up.collection_id WHERE h.locked AND hold_in_force(h))
$$;
CREATE FUNCTION item_stays_locked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF collection_locked(OLD.collection_id) THEN
    PERFORM dlm_refuse(format('item %s cannot leave a collection that is under a retention lock', OLD.uri));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER item_stays_locked BEFORE UPDATE OF collection_id ON data_item FOR EACH ROW
  WHEN (OLD.collection_id IS DISTINCT FROM NEW.collection_id) EXECUTE FUNCTION item_stays_locked();
CREATE FUNCTION collection_stays_locked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF collection_locked(OLD.collection_id) THEN
    PERFORM dlm_refuse(format('collection %s is under a retention lock and cannot be moved', OLD.name));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER collection_stays_locked BEFORE UPDATE OF parent_id ON collection FOR EACH ROW
  WHEN (OLD.parent_id IS DISTINCT FROM NEW.parent_id) EXECUTE FUNCTION collection_stays_locked();

-- No certificate for what is held: neither a trashing nor a purge goes on without one. By row, since
-- a statement that names a partition passes the parent's statement triggers by.
CREATE FUNCTION deletion_of_unheld() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  LOCK TABLE hold IN SHARE MODE;
  IF EXISTS (SELECT FROM hold) AND EXISTS (
      SELECT FROM data_item i, LATERAL holds_on(i.oid, i.uri, i.collection_id) WHERE i.oid = NEW.oid) THEN
    PERFORM dlm_refuse(format('replica %s is under a hold', NEW.uid));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER deletion_of_unheld BEFORE INSERT ON deletion
  FOR EACH ROW EXECUTE FUNCTION deletion_of_unheld();

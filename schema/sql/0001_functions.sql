-- Functions and triggers: what psql cannot go round either.
-- Functions that join transition tables switch nested loops off: the plan of a session's first, small
-- statement is kept, and a batch of 5,000 would cost 25 million comparisons. What they need of other
-- tables they look up row by row, in subqueries that OFFSET 0 keeps from becoming joins: without
-- nested loops those would read the whole catalogue.

CREATE FUNCTION dlm_now() RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT coalesce(nullif(current_setting('dlm.now', true), '')::timestamptz, clock_timestamp())
$$;
CREATE FUNCTION dlm_actor() RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(nullif(current_setting('dlm.actor', true), ''), 'sql:' || session_user)
$$;
CREATE FUNCTION phase_weight(p text) RETURNS smallint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT (CASE p WHEN 'SOLID' THEN 4 WHEN 'LIQUID' THEN 2 WHEN 'GAS' THEN 1 ELSE 0 END)::smallint
$$;

-- Lowest UUIDv7 (RFC 9562, 5.7) of a moment: the bound of a partition by time.
CREATE FUNCTION uuid7_floor(t timestamptz) RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
  SELECT (lpad(to_hex(floor(extract(epoch FROM t) * 1000)::bigint), 12, '0')
          || '00000000000000000000')::uuid
$$;

-- Make the monthly partitions from the month of p_from on; idempotent.
CREATE FUNCTION dlm_ensure_partitions(p_from timestamptz, p_months integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  m date; a timestamptz; b timestamptz; suffix text;
BEGIN
  FOR i IN 0 .. p_months - 1 LOOP
    m := date_trunc('month', p_from AT TIME ZONE 'UTC')::date + make_interval(months => i);
    a := m::timestamp AT TIME ZONE 'UTC';
    b := (m + interval '1 month')::timestamp AT TIME ZONE 'UTC';
    suffix := to_char(m, 'YYYYMM');
    EXECUTE format('CREATE TABLE IF NOT EXISTS event_%s PARTITION OF event FOR VALUES FROM (%L) TO (%L)', suffix, a, b);
    EXECUTE format('CREATE TABLE IF NOT EXISTS operation_%s PARTITION OF operation FOR VALUES FROM (%L) TO (%L)', suffix, uuid7_floor(a), uuid7_floor(b));
    EXECUTE format('CREATE TABLE IF NOT EXISTS deletion_%s PARTITION OF deletion FOR VALUES FROM (%L) TO (%L)', suffix, uuid7_floor(a), uuid7_floor(b));
    PERFORM dlm_keep_partition('event_' || suffix), dlm_keep_partition('deletion_' || suffix);
  END LOOP;
END $$;

-- A parent's statement triggers do not fire for a statement that names a partition.
CREATE FUNCTION dlm_keep_partition(p_name text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = p_name::regclass AND tgname = 'kept') THEN
    EXECUTE format('CREATE TRIGGER kept BEFORE UPDATE OR DELETE OR TRUNCATE ON %I
                    FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change()', p_name);
  END IF;
END $$;
CREATE TABLE event_default PARTITION OF event DEFAULT;
CREATE TABLE operation_default PARTITION OF operation DEFAULT;
CREATE TABLE deletion_default PARTITION OF deletion DEFAULT;

-- A refusal of ours has an SQLSTATE of its own, so that it is told from a bug: class DL.
CREATE FUNCTION dlm_refuse(message text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION '%', message USING ERRCODE = 'DL001';
END $$;
CREATE FUNCTION dlm_refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM dlm_refuse(format('%s on %s: rows here are never changed or removed', TG_OP, TG_TABLE_NAME));
  RETURN NULL;
END $$;

-- Holds in force on an item now.
CREATE FUNCTION holds_on(p_oid uuid, p_uri text, p_collection uuid) RETURNS SETOF hold
LANGUAGE sql STABLE AS $$
  WITH RECURSIVE up(collection_id) AS (
    SELECT p_collection WHERE p_collection IS NOT NULL
    UNION SELECT c.parent_id FROM collection c JOIN up USING (collection_id) WHERE c.parent_id IS NOT NULL)
  SELECT h.* FROM hold h
  WHERE (h.ends_at IS NULL OR h.ends_at > dlm_now())
    AND (h.oid = p_oid OR h.collection_id IN (SELECT collection_id FROM up)
         OR starts_with(p_uri, h.uri_prefix))
$$;

-- --- data_item -----------------------------------------------------------------------------------
CREATE FUNCTION data_item_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM new_rows WHERE state <> 'INITIALISED') THEN
    PERFORM dlm_refuse('a data item starts as INITIALISED');
  END IF;
  INSERT INTO event (noun, action, oid, new_state, actor)
    SELECT 'item', 'created', oid, state, dlm_actor() FROM new_rows;
  INSERT INTO tally SELECT 'item', NULL, state, count(*), coalesce(sum(size), 0) FROM new_rows GROUP BY state;
  RETURN NULL;
END $$;
CREATE TRIGGER data_item_inserted AFTER INSERT ON data_item
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION data_item_inserted();

CREATE FUNCTION data_item_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE bad record;
BEGIN
  SELECT o.oid, o.state AS a, n.state AS b, n.oid AS key INTO bad FROM old_rows o LEFT JOIN new_rows n USING (oid)
   WHERE n.oid IS NULL OR n.uri <> o.uri OR n.version <> o.version
      OR (n.state <> o.state AND NOT EXISTS (SELECT FROM state_transition t
          WHERE t.noun = 'item' AND t.old_state = o.state AND t.new_state = n.state))
      OR (o.state <> 'INITIALISED' AND (n.digest, n.size, n.kind) IS DISTINCT FROM (o.digest, o.size, o.kind))
   LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('item %s cannot go from %s to %s, nor change key, uri, version, size or digest', bad.oid, bad.a, bad.b));
  END IF;
  IF EXISTS (SELECT FROM new_rows n JOIN old_rows o USING (oid)
             WHERE n.state IN ('EXPIRED', 'DELETED') AND o.state <> n.state) THEN
    -- a hold cannot slip in while this transaction decides
    LOCK TABLE hold IN SHARE MODE;
    SELECT n.oid, n.uri INTO bad FROM new_rows n JOIN old_rows o USING (oid)
     WHERE o.state <> n.state AND n.state = 'EXPIRED'
       AND (n.expires_at > dlm_now() OR EXISTS (SELECT FROM holds_on(n.oid, n.uri, n.collection_id))) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('item %s is not past its expires_at or is under a hold', bad.uri));
    END IF;
    SELECT n.oid, n.uri INTO bad FROM new_rows n JOIN old_rows o USING (oid)
     WHERE o.state <> n.state AND n.state = 'DELETED'
       AND EXISTS (SELECT FROM replica r WHERE r.oid = n.oid AND r.state <> 'DELETED' OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('item %s still has replicas', bad.uri));
    END IF;
  END IF;
  INSERT INTO event (noun, action, oid, old_state, new_state, actor, detail)
    SELECT 'item', CASE WHEN o.state <> n.state THEN 'state' ELSE 'changed' END, n.oid, o.state, n.state, dlm_actor(),
           jsonb_strip_nulls(jsonb_build_object(
             'expires_at', CASE WHEN n.expires_at IS DISTINCT FROM o.expires_at THEN coalesce(n.expires_at::text, 'never') END,
             'reason', CASE WHEN n.expires_at IS DISTINCT FROM o.expires_at THEN n.expiry_reason END,
             'target_phase', CASE WHEN n.target_phase <> o.target_phase THEN n.target_phase END,
             'metadata', CASE WHEN n.metadata <> o.metadata AND o.state <> 'INITIALISED' THEN n.metadata END,
             'tags', CASE WHEN n.tags <> o.tags THEN n.tags END))
      FROM new_rows n JOIN old_rows o USING (oid)
     WHERE (o.state, o.target_phase, o.collection_id, o.owner) IS DISTINCT FROM (n.state, n.target_phase, n.collection_id, n.owner)
        OR o.expires_at IS DISTINCT FROM n.expires_at OR o.tags <> n.tags OR o.metadata <> n.metadata;
  INSERT INTO tally SELECT 'item', NULL, state, sum(n), sum(bytes) FROM (
      SELECT n.state, 1 AS n, coalesce(n.size, 0) AS bytes FROM new_rows n JOIN old_rows o USING (oid)
       WHERE (n.state, n.size) IS DISTINCT FROM (o.state, o.size)
      UNION ALL
      SELECT o.state, -1, -coalesce(o.size, 0) FROM new_rows n JOIN old_rows o USING (oid)
       WHERE (n.state, n.size) IS DISTINCT FROM (o.state, o.size)) d
    GROUP BY state HAVING sum(n) <> 0 OR sum(bytes) <> 0;
  INSERT INTO evaluation (oid, due_at)
    SELECT n.oid, dlm_now() FROM new_rows n JOIN old_rows o USING (oid)
     WHERE n.state IN ('READY', 'CORRUPTED') AND n.target_phase <> o.target_phase
     ORDER BY n.oid
    ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at), attempts = 0;
  RETURN NULL;
END $$;
CREATE TRIGGER data_item_updated AFTER UPDATE ON data_item
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION data_item_updated();

-- --- replica -------------------------------------------------------------------------------------
CREATE FUNCTION replica_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT FROM new_rows WHERE state <> 'PENDING') THEN
    PERFORM dlm_refuse('a replica starts as PENDING');
  END IF;
  INSERT INTO event (noun, action, oid, uid, storage_id, new_state, actor)
    SELECT 'replica', 'created', oid, uid, storage_id, state, dlm_actor() FROM new_rows;
  INSERT INTO tally SELECT 'replica', storage_id, state, count(*), sum(size) FROM new_rows GROUP BY storage_id, state;
  RETURN NULL;
END $$;
CREATE TRIGGER replica_inserted AFTER INSERT ON replica
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION replica_inserted();

-- The time from which a replica may be deleted follows its expiry unless a refusal put it off.
CREATE FUNCTION replica_delete_after() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'INSERT' OR NEW.expires_at IS DISTINCT FROM OLD.expires_at THEN
    NEW.delete_after := NEW.expires_at;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER replica_delete_after_insert BEFORE INSERT ON replica
  FOR EACH ROW WHEN (NEW.expires_at IS NOT NULL) EXECUTE FUNCTION replica_delete_after();
CREATE TRIGGER replica_delete_after_update BEFORE UPDATE OF expires_at ON replica
  FOR EACH ROW EXECUTE FUNCTION replica_delete_after();

CREATE FUNCTION replica_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE bad record;
BEGIN
  SELECT o.uid, o.state AS a, n.state AS b INTO bad FROM old_rows o LEFT JOIN new_rows n USING (uid)
   WHERE n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
      OR (n.state <> o.state AND NOT EXISTS (SELECT FROM state_transition t
          WHERE t.noun = 'replica' AND t.old_state = o.state AND t.new_state = n.state))
   LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s cannot go from %s to %s, nor change key, item, storage or path', bad.uid, bad.a, bad.b));
  END IF;
  -- only bytes that were observed and equal the item's digest make a replica READY
  SELECT n.uid INTO bad FROM new_rows n
   WHERE n.state = 'READY' AND NOT EXISTS (
         SELECT FROM data_item i WHERE i.oid = n.oid AND i.digest = n.digest AND i.size = n.size OFFSET 0)
   LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s cannot be READY: its observed digest or size is not the item''s', bad.uid));
  END IF;
  IF EXISTS (SELECT FROM new_rows n JOIN old_rows o USING (uid) WHERE n.state IN ('TRASHED', 'DELETED') AND n.state <> o.state) THEN
    LOCK TABLE hold IN SHARE MODE;
    -- a certificate written in this very transaction for a trashing; a valid one for the end
    SELECT n.uid INTO bad FROM new_rows n JOIN old_rows o USING (uid)
     WHERE n.state <> o.state AND n.state IN ('TRASHED', 'DELETED') AND NOT EXISTS (
           SELECT FROM deletion d WHERE d.deletion_id = n.deletion_id AND d.uid = n.uid
              AND CASE n.state WHEN 'TRASHED' THEN d.step = 'trash' AND d.xid = pg_current_xact_id()
                               ELSE d.step IN ('purge', 'release') AND d.valid_until >= dlm_now() END OFFSET 0)
     LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s cannot be deleted without a certificate that holds now', bad.uid));
    END IF;
    SELECT n.uid INTO bad FROM new_rows n JOIN old_rows o USING (uid)
     WHERE n.state = 'TRASHED' AND o.state <> 'TRASHED' AND EXISTS (SELECT FROM hold OFFSET 0)
       AND EXISTS (SELECT FROM data_item i, holds_on(i.oid, i.uri, i.collection_id)
                    WHERE i.oid = n.oid OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s is under a hold', bad.uid));
    END IF;
    -- the last good copy goes only with the item
    SELECT n.uid INTO bad FROM new_rows n JOIN old_rows o USING (uid)
     WHERE n.state = 'TRASHED' AND o.state <> 'TRASHED'
       AND NOT EXISTS (SELECT FROM (SELECT state FROM replica WHERE oid = n.oid OFFSET 0) s WHERE s.state = 'READY' OFFSET 0)
       AND NOT EXISTS (SELECT FROM data_item i WHERE i.oid = n.oid AND i.state = 'EXPIRED' OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s is the last good copy of an item that has not expired', bad.uid));
    END IF;
  END IF;
  INSERT INTO event (noun, action, oid, uid, storage_id, old_state, new_state, actor, detail)
    SELECT 'replica', CASE WHEN o.state <> n.state THEN 'state' ELSE 'changed' END, n.oid, n.uid, n.storage_id,
           o.state, n.state, dlm_actor(),
           jsonb_strip_nulls(jsonb_build_object(
             'expires_at', CASE WHEN n.expires_at IS DISTINCT FROM o.expires_at THEN coalesce(n.expires_at::text, 'never') END,
             'reason', CASE WHEN n.expires_at IS DISTINCT FROM o.expires_at THEN n.expiry_reason END,
             'deletion_id', CASE WHEN n.deletion_id IS DISTINCT FROM o.deletion_id THEN n.deletion_id END))
      FROM new_rows n JOIN old_rows o USING (uid)
     WHERE o.state <> n.state OR o.expires_at IS DISTINCT FROM n.expires_at OR o.deletion_id IS DISTINCT FROM n.deletion_id;
  INSERT INTO tally SELECT 'replica', storage_id, state, sum(n), sum(bytes) FROM (
      SELECT n.storage_id, n.state, 1 AS n, n.size AS bytes FROM new_rows n JOIN old_rows o USING (uid)
       WHERE n.state <> o.state OR n.size <> o.size
      UNION ALL
      SELECT o.storage_id, o.state, -1, -o.size FROM new_rows n JOIN old_rows o USING (uid)
       WHERE n.state <> o.state OR n.size <> o.size) d
    GROUP BY storage_id, state HAVING sum(n) <> 0 OR sum(bytes) <> 0;
  INSERT INTO evaluation (oid, due_at)
    SELECT DISTINCT n.oid, dlm_now() FROM new_rows n JOIN old_rows o USING (uid)
     WHERE (n.state <> o.state AND n.state NOT IN ('PENDING', 'DELETED'))
        OR n.expires_at IS DISTINCT FROM o.expires_at
     ORDER BY n.oid
    ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at), attempts = 0;
  RETURN NULL;
END $$;
CREATE TRIGGER replica_updated AFTER UPDATE ON replica
  REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION replica_updated();

-- --- storage, hold -------------------------------------------------------------------------------
CREATE FUNCTION storage_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.mode = 'retired' AND NEW.mode <> 'retired' THEN
    PERFORM dlm_refuse(format('storage %s is retired; a retired storage does not come back', OLD.name));
  END IF;
  IF NEW.mode = 'retired' AND OLD.mode <> 'retired'
     AND EXISTS (SELECT FROM replica WHERE storage_id = NEW.storage_id AND state <> 'DELETED') THEN
    PERFORM dlm_refuse(format('storage %s still has replicas; drain it first', OLD.name));
  END IF;
  IF NEW.mode <> OLD.mode THEN
    INSERT INTO event (noun, action, storage_id, old_state, new_state, actor)
      VALUES ('storage', 'mode', NEW.storage_id, OLD.mode, NEW.mode, dlm_actor());
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER storage_updated AFTER UPDATE ON storage FOR EACH ROW EXECUTE FUNCTION storage_updated();

CREATE FUNCTION hold_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (noun, action, oid, actor, detail)
    VALUES ('hold', lower(TG_OP), NEW.oid, dlm_actor(), to_jsonb(NEW));
  RETURN NULL;
END $$;
CREATE TRIGGER hold_changed AFTER INSERT OR UPDATE ON hold FOR EACH ROW EXECUTE FUNCTION hold_changed();

-- --- what is never removed or rewritten ----------------------------------------------------------
CREATE TRIGGER data_item_kept BEFORE DELETE OR TRUNCATE ON data_item FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER replica_kept BEFORE DELETE OR TRUNCATE ON replica FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER deletion_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON deletion FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER event_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON event FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
SELECT dlm_keep_partition('event_default'), dlm_keep_partition('deletion_default');
CREATE TRIGGER hold_kept BEFORE DELETE OR TRUNCATE ON hold FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

-- --- reading -------------------------------------------------------------------------------------
-- The phase of items: over locations, the best verified replica there, summed (design, words).
CREATE VIEW item_phase AS
  SELECT oid, sum(best)::smallint AS weight FROM (
    SELECT r.oid, s.location_id, max(phase_weight(s.phase)) AS best
      FROM replica r JOIN storage s USING (storage_id)
     WHERE r.state = 'READY' AND s.mode NOT IN ('retired') GROUP BY r.oid, s.location_id) b
  GROUP BY oid;

-- What a reader of the feed may take: below the oldest transaction still running. Its place in the
-- feed is (xid, seq), in that order: a later transaction may have drawn a lower seq.
CREATE VIEW event_feed AS
  SELECT * FROM event WHERE xid < pg_snapshot_xmin(pg_current_snapshot());

CREATE VIEW storage_usage AS
  SELECT s.storage_id, s.name,
         coalesce(sum(t.bytes) FILTER (WHERE t.state <> 'DELETED'), 0)::bigint AS used_bytes,
         coalesce(sum(t.bytes) FILTER (WHERE t.state = 'TRASHED'), 0)::bigint AS trashed_bytes,
         coalesce(sum(t.n) FILTER (WHERE t.state <> 'DELETED'), 0)::bigint AS replicas
    FROM storage s LEFT JOIN tally t ON t.noun = 'replica' AND t.storage_id = s.storage_id
   GROUP BY s.storage_id;

-- Fold the deltas of the tally into one row a group. Others' uncommitted deltas stay.
CREATE FUNCTION dlm_fold_tally() RETURNS void LANGUAGE sql AS $$
  WITH gone AS (DELETE FROM tally RETURNING *)
  INSERT INTO tally SELECT noun, storage_id, state, sum(n), sum(bytes) FROM gone
  GROUP BY noun, storage_id, state HAVING sum(n) <> 0 OR sum(bytes) <> 0
$$;

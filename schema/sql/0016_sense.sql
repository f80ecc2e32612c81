-- What made no sense and could be written, with psql say: an item READY of which no copy is known, a
-- look from next year, a certificate that never runs out, rules of states that are taken away. Times may
-- be an hour ahead, which is more than the clocks of two machines that work.

-- A simulated clock may be behind the server's, by which defaults are.
CREATE FUNCTION dlm_latest() RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT greatest(dlm_now(), clock_timestamp()) + interval '1 hour'
$$;

CREATE OR REPLACE FUNCTION replica_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE
  bad record;
  v_any record;
  v_held boolean;
  v_now CONSTANT timestamptz := dlm_now();
  v_latest CONSTANT timestamptz := dlm_latest();
  v_actor CONSTANT text := dlm_actor();
BEGIN
  SELECT bool_or(n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id
                 OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
                 OR (n.state <> o.state AND t.noun IS NULL)) AS illegal,
         bool_or(n.state = 'READY') AS ready,
         bool_or(n.state <> o.state AND n.state IN ('TRASHED', 'DELETED')) AS leaving,
         bool_or(greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at) > v_latest
                 AND greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at) IS DISTINCT FROM
                     greatest(o.checked_at, o.told_at, o.accessed_at, o.trashed_at)) AS ahead
    INTO v_any
    FROM old_rows o LEFT JOIN new_rows n USING (uid)
    LEFT JOIN state_transition t ON t.noun = 'replica' AND t.old_state = o.state AND t.new_state = n.state;
  IF v_any.illegal THEN
    SELECT o.uid, o.state AS a, n.state AS b INTO bad FROM old_rows o LEFT JOIN new_rows n USING (uid)
     ORDER BY n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id
              OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
              OR (n.state <> o.state AND NOT EXISTS (SELECT FROM state_transition t
                  WHERE t.noun = 'replica' AND t.old_state = o.state AND t.new_state = n.state)) DESC LIMIT 1;
    PERFORM dlm_refuse(format('replica %s cannot go from %s to %s, nor change key, item, storage or path', bad.uid, bad.a, bad.b));
  END IF;
  IF v_any.ahead THEN
    SELECT n.uid INTO bad FROM new_rows n
     ORDER BY greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at) DESC LIMIT 1;
    PERFORM dlm_refuse(format('replica %s cannot have been looked at or changed in the future', bad.uid));
  END IF;
  -- only bytes that were observed and equal the item's digest make a replica READY
  IF v_any.ready THEN
    SELECT n.uid INTO bad FROM new_rows n
     WHERE n.state = 'READY' AND NOT EXISTS (
           SELECT FROM data_item i WHERE i.oid = n.oid AND i.digest = n.digest AND i.size = n.size
              AND i.state NOT IN ('INITIALISED', 'DELETED') OFFSET 0)
     LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s cannot be READY: its observed digest or size is not the item''s', bad.uid));
    END IF;
  END IF;
  IF v_any.leaving THEN
    LOCK TABLE hold IN SHARE MODE;
    -- the lock may have been waited for: a certificate that ran out meanwhile is none
    v_held := EXISTS (SELECT FROM hold);
    SELECT l.uid, l.refusal INTO bad FROM (
      SELECT n.uid, CASE
        -- a certificate written in this very transaction for a trashing; a valid one for the end
        WHEN NOT EXISTS (
             SELECT FROM deletion d WHERE d.deletion_id = n.deletion_id AND d.uid = n.uid
                AND CASE n.state WHEN 'TRASHED' THEN d.step = 'trash' AND d.xid = pg_current_xact_id()
                                 ELSE d.step IN ('purge', 'release') AND d.valid_until >= dlm_now()
                                  AND (d.basis = 'withdrawn') = (o.state = 'PENDING') END OFFSET 0)
        THEN 'cannot be deleted without a certificate that holds now'
        WHEN o.state = 'PENDING' AND n.state = 'DELETED' AND (o.digest IS NOT NULL OR o.checked_at IS NOT NULL)
        THEN 'cannot be withdrawn: it was let in before'
        WHEN o.state = 'PENDING' AND n.state = 'DELETED' AND EXISTS (
             SELECT FROM operation p WHERE p.uid = n.uid AND p.state IN ('QUEUED', 'RUNNING') OFFSET 0)
        THEN 'cannot be withdrawn: there is work under way for it'
        WHEN n.state = 'DELETED' THEN NULL
        WHEN v_held AND EXISTS (SELECT FROM data_item i, holds_on(i.oid, i.uri, i.collection_id)
                                 WHERE i.oid = n.oid OFFSET 0)
        THEN 'is under a hold'
        -- the last good copy goes only with the item
        WHEN NOT EXISTS (SELECT FROM (SELECT state FROM replica WHERE oid = n.oid OFFSET 0) s WHERE s.state = 'READY' OFFSET 0)
         AND NOT EXISTS (SELECT FROM data_item i WHERE i.oid = n.oid AND i.state = 'EXPIRED' OFFSET 0)
        THEN 'is the last good copy of an item that has not expired' END AS refusal
        FROM new_rows n JOIN old_rows o USING (uid)
       WHERE n.state <> o.state AND n.state IN ('TRASHED', 'DELETED') OFFSET 0) l
     WHERE l.refusal IS NOT NULL LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s %s', bad.uid, bad.refusal));
    END IF;
  END IF;
  WITH changed AS MATERIALIZED (
    SELECT n.uid, n.oid, n.storage_id, o.state AS a, n.state AS b, o.size AS old_size, n.size,
           n.expires_at, n.expiry_reason, n.deletion_id,
           n.state <> o.state AS moved, n.expires_at IS DISTINCT FROM o.expires_at AS expiring,
           n.deletion_id IS DISTINCT FROM o.deletion_id AS certified
      FROM new_rows n JOIN old_rows o USING (uid)
     WHERE n.state <> o.state OR n.size <> o.size OR n.expires_at IS DISTINCT FROM o.expires_at
        OR n.deletion_id IS DISTINCT FROM o.deletion_id),
  told AS (
    INSERT INTO event (noun, action, oid, uid, storage_id, old_state, new_state, actor, detail)
      SELECT 'replica', CASE WHEN moved THEN 'state' ELSE 'changed' END, oid, uid, storage_id, a, b, v_actor,
             CASE WHEN expiring THEN jsonb_strip_nulls(jsonb_build_object(
                    'expires_at', coalesce(expires_at::text, 'never'), 'reason', expiry_reason,
                    'deletion_id', CASE WHEN certified THEN deletion_id END))
                  WHEN certified AND deletion_id IS NOT NULL THEN jsonb_build_object('deletion_id', deletion_id)
                  ELSE '{}' END
        FROM changed WHERE moved OR expiring OR certified),
  counted AS (
    INSERT INTO tally SELECT 'replica', storage_id, state, sum(n), sum(bytes) FROM (
        SELECT storage_id, b AS state, 1 AS n, size AS bytes FROM changed WHERE moved OR size <> old_size
        UNION ALL
        SELECT storage_id, a, -1, -old_size FROM changed WHERE moved OR size <> old_size) d
      GROUP BY storage_id, state HAVING sum(n) <> 0 OR sum(bytes) <> 0)
  INSERT INTO evaluation (oid, due_at)
    SELECT DISTINCT oid, v_now FROM changed
     WHERE (moved AND b NOT IN ('PENDING', 'DELETED')) OR expiring
     ORDER BY oid
    ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at), attempts = 0;
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION replica_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  v_latest CONSTANT timestamptz := dlm_latest();
  v_actor CONSTANT text := dlm_actor();
  v_any record;
BEGIN
  SELECT bool_or(state <> 'PENDING') AS further,
         bool_or(greatest(created_at, checked_at, told_at, accessed_at) > v_latest) AS ahead
    INTO v_any FROM new_rows;
  IF v_any.further THEN
    PERFORM dlm_refuse('a replica starts as PENDING');
  ELSIF v_any.ahead THEN
    PERFORM dlm_refuse('a replica cannot have been made or looked at in the future');
  END IF;
  INSERT INTO event (noun, action, oid, uid, storage_id, new_state, actor)
    SELECT 'replica', 'created', oid, uid, storage_id, state, v_actor FROM new_rows;
  INSERT INTO tally SELECT 'replica', storage_id, state, count(*), sum(size) FROM new_rows GROUP BY storage_id, state;
  RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION data_item_inserted() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  v_latest CONSTANT timestamptz := dlm_latest();
  v_actor CONSTANT text := dlm_actor();
  v_any record;
BEGIN
  SELECT bool_or(state <> 'INITIALISED') AS further, bool_or(created_at > v_latest) AS ahead
    INTO v_any FROM new_rows;
  IF v_any.further THEN
    PERFORM dlm_refuse('a data item starts as INITIALISED');
  ELSIF v_any.ahead THEN
    PERFORM dlm_refuse('a data item cannot have been announced in the future');
  END IF;
  INSERT INTO event (noun, action, oid, new_state, actor)
    SELECT 'item', 'created', oid, state, v_actor FROM new_rows;
  INSERT INTO tally SELECT 'item', NULL, state, count(*), coalesce(sum(size), 0) FROM new_rows GROUP BY state;
  RETURN NULL;
END $$;

-- At the end of the transaction: the copies that make it READY need its digest first. A copy in doubt
-- is one that may be good; the look that tells is on its way.
CREATE FUNCTION data_item_has_copy() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM replica WHERE oid = NEW.oid AND live AND state IN ('READY', 'SUSPECT'))
     AND EXISTS (SELECT FROM data_item WHERE oid = NEW.oid AND state = 'READY') THEN
    PERFORM dlm_refuse(format('item %s cannot be READY: no copy of it was read and matched', NEW.uri));
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER data_item_has_copy AFTER UPDATE ON data_item DEFERRABLE INITIALLY DEFERRED
  FOR EACH ROW WHEN (NEW.state = 'READY' AND OLD.state <> 'READY') EXECUTE FUNCTION data_item_has_copy();

CREATE OR REPLACE FUNCTION deletion_of_unheld() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE v_uid uuid;
BEGIN
  SELECT n.uid INTO v_uid FROM new_rows n
   WHERE n.proved_at > dlm_latest() OR n.valid_until > n.proved_at + interval '7 days' LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s: a certificate is of now, and holds for 7 days at most', v_uid));
  END IF;
  LOCK TABLE hold IN SHARE MODE;
  IF EXISTS (SELECT FROM hold) THEN
    SELECT n.uid INTO v_uid FROM new_rows n WHERE EXISTS (
      SELECT FROM data_item i, LATERAL holds_on(i.oid, i.uri, i.collection_id) WHERE i.oid = n.oid OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s is under a hold', v_uid));
    END IF;
  END IF;
  RETURN NULL;
END $$;

-- A time of change is a number; NaN is equal to itself here, and so to no file's
UPDATE replica SET mtime = NULL WHERE mtime NOT BETWEEN -1e12 AND 1e12;
ALTER TABLE replica ADD CONSTRAINT replica_mtime_check CHECK (mtime BETWEEN -1e12 AND 1e12);
ALTER TABLE watch_entry ADD CONSTRAINT watch_entry_mtime_check CHECK (mtime BETWEEN -1e12 AND 1e12);
ALTER TABLE storage ADD CONSTRAINT storage_root_absolute CHECK (interface <> 'posix' OR starts_with(root, '/'));

-- Only a migration changes it, which puts this trigger off.
CREATE TRIGGER state_transition_kept BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON state_transition
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

-- What made no sense and could be written, with psql say: an item READY of which no copy is known, a
-- look from next year, two replicas of one file, certificates that name what is not so. Times may be an
-- hour ahead, which is more than the clocks of two machines that work are apart.

-- dlm.now is anybody's to set: it moves the present by an hour at most, but where a database was made
-- for a simulation, which has another one of this function.
CREATE FUNCTION dlm_is_simulation() RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE OR REPLACE FUNCTION dlm_now() RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT CASE WHEN coalesce(current_setting('dlm.now', true), '') = '' THEN clock_timestamp()
              WHEN dlm_is_simulation() THEN current_setting('dlm.now')::timestamptz
              ELSE greatest(clock_timestamp() - interval '1 hour',
                            least(clock_timestamp() + interval '1 hour', current_setting('dlm.now')::timestamptz)) END
$$;
-- A simulated clock may be behind the server's, by which defaults are set.
CREATE FUNCTION dlm_latest() RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT greatest(dlm_now(), clock_timestamp()) + interval '1 hour'
$$;

CREATE OR REPLACE FUNCTION replica_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE
  bad record;
  v_any record;
  v_held boolean;
  v_usable uuid[];
  v_now CONSTANT timestamptz := dlm_now();
  v_latest CONSTANT timestamptz := dlm_latest();
  v_actor CONSTANT text := dlm_actor();
BEGIN
  SELECT bool_or(n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id
                 OR (o.digest IS NOT NULL AND n.digest IS NULL) OR (o.checked_at IS NOT NULL AND n.checked_at IS NULL)
                 OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
                 OR (n.state <> o.state AND t.noun IS NULL)) AS illegal,
         bool_or(n.state = 'READY') AS ready,
         bool_or(n.state <> o.state AND n.state IN ('TRASHED', 'DELETED')) AS leaving,
         bool_or(greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at, n.check_from) > v_latest
                 AND greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at, n.check_from) IS DISTINCT FROM
                     greatest(o.checked_at, o.told_at, o.accessed_at, o.trashed_at, o.check_from)) AS ahead
    INTO v_any
    FROM old_rows o LEFT JOIN new_rows n USING (uid)
    LEFT JOIN state_transition t ON t.noun = 'replica' AND t.old_state = o.state AND t.new_state = n.state;
  IF v_any.illegal THEN
    SELECT o.uid, o.state AS a, n.state AS b INTO bad FROM old_rows o LEFT JOIN new_rows n USING (uid)
     ORDER BY n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id
              OR (o.digest IS NOT NULL AND n.digest IS NULL) OR (o.checked_at IS NOT NULL AND n.checked_at IS NULL)
              OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
              OR (n.state <> o.state AND NOT EXISTS (SELECT FROM state_transition t
                  WHERE t.noun = 'replica' AND t.old_state = o.state AND t.new_state = n.state)) DESC LIMIT 1;
    PERFORM dlm_refuse(format('replica %s cannot go from %s to %s, nor change key, item, storage or path, nor forget what was read', bad.uid, bad.a, bad.b));
  END IF;
  IF v_any.ahead THEN
    SELECT n.uid INTO bad FROM new_rows n
     ORDER BY greatest(n.checked_at, n.told_at, n.accessed_at, n.trashed_at, n.check_from) DESC LIMIT 1;
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
    -- of two who trash one copy each the second one waits, and then sees that the first is gone
    PERFORM FROM data_item WHERE oid = ANY(ARRAY(SELECT oid FROM new_rows WHERE state = 'TRASHED'))
     ORDER BY oid FOR NO KEY UPDATE;
    -- the lock may have been waited for: a certificate that ran out meanwhile is none
    v_held := EXISTS (SELECT FROM hold);
    v_usable := ARRAY(SELECT storage_id FROM storage WHERE mode IN ('read_write', 'read_only'));
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
        WHEN NOT EXISTS (SELECT FROM (SELECT state, storage_id, expires_at FROM replica WHERE oid = n.oid OFFSET 0) s
                          WHERE s.state = 'READY' AND (s.expires_at IS NULL OR s.expires_at > v_now)
                            AND s.storage_id = ANY(v_usable) OFFSET 0)
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

CREATE OR REPLACE FUNCTION data_item_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE
  bad record;
  v_any record;
  v_now CONSTANT timestamptz := dlm_now();
  v_actor CONSTANT text := dlm_actor();
BEGIN
  SELECT bool_or(n.oid IS NULL OR (n.uri, n.version, n.uri_bucket, n.created_at) <> (o.uri, o.version, o.uri_bucket, o.created_at)
                 OR (n.state <> o.state AND t.noun IS NULL)
                 OR (o.state <> 'INITIALISED' AND (n.digest, n.size, n.kind) IS DISTINCT FROM (o.digest, o.size, o.kind))) AS illegal,
         bool_or(n.state <> o.state AND n.state IN ('EXPIRED', 'DELETED')) AS leaving,
         bool_or((o.state, o.size, o.target_phase, o.collection_id, o.owner, o.expires_at, o.tags, o.metadata)
                 IS DISTINCT FROM (n.state, n.size, n.target_phase, n.collection_id, n.owner, n.expires_at, n.tags, n.metadata)) AS changed
    INTO v_any
    FROM old_rows o LEFT JOIN new_rows n USING (oid)
    LEFT JOIN state_transition t ON t.noun = 'item' AND t.old_state = o.state AND t.new_state = n.state;
  IF v_any.illegal THEN
    SELECT o.oid, o.state AS a, n.state AS b INTO bad FROM old_rows o LEFT JOIN new_rows n USING (oid)
     WHERE n.oid IS NULL OR (n.uri, n.version, n.uri_bucket, n.created_at) <> (o.uri, o.version, o.uri_bucket, o.created_at)
        OR (n.state <> o.state AND NOT EXISTS (SELECT FROM state_transition t
            WHERE t.noun = 'item' AND t.old_state = o.state AND t.new_state = n.state))
        OR (o.state <> 'INITIALISED' AND (n.digest, n.size, n.kind) IS DISTINCT FROM (o.digest, o.size, o.kind))
     LIMIT 1;
    PERFORM dlm_refuse(format('item %s cannot go from %s to %s, nor change key, uri, version, size or digest', bad.oid, bad.a, bad.b));
  END IF;
  IF v_any.leaving THEN
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
  IF v_any.changed IS NOT TRUE THEN
    RETURN NULL;
  END IF;
  WITH changed AS MATERIALIZED (
    SELECT n.oid, o.state AS a, n.state AS b, coalesce(o.size, 0) AS old_size, coalesce(n.size, 0) AS size,
           n.target_phase, n.expires_at, n.expiry_reason, n.metadata, n.tags,
           n.state <> o.state AS moved, n.size IS DISTINCT FROM o.size AS grown,
           (n.collection_id, n.owner) IS DISTINCT FROM (o.collection_id, o.owner) AS given,
           n.expires_at IS DISTINCT FROM o.expires_at AS expiring, n.target_phase <> o.target_phase AS aimed,
           n.tags <> o.tags AS tagged, n.metadata <> o.metadata AS described
      FROM new_rows n JOIN old_rows o USING (oid)),
  told AS (
    INSERT INTO event (noun, action, oid, old_state, new_state, actor, detail)
      SELECT 'item', CASE WHEN moved THEN 'state' ELSE 'changed' END, oid, a, b, v_actor,
             CASE WHEN expiring OR aimed OR tagged OR (described AND a <> 'INITIALISED') THEN
               jsonb_strip_nulls(jsonb_build_object(
                 'expires_at', CASE WHEN expiring THEN coalesce(expires_at::text, 'never') END,
                 'reason', CASE WHEN expiring THEN expiry_reason END,
                 'target_phase', CASE WHEN aimed THEN target_phase END,
                 'metadata', CASE WHEN described AND a <> 'INITIALISED' THEN metadata END,
                 'tags', CASE WHEN tagged THEN tags END))
             ELSE '{}' END
        FROM changed WHERE moved OR aimed OR given OR expiring OR tagged OR described),
  counted AS (
    INSERT INTO tally SELECT 'item', NULL, state, sum(n), sum(bytes) FROM (
        SELECT b AS state, 1 AS n, size AS bytes FROM changed WHERE moved OR grown
        UNION ALL
        SELECT a, -1, -old_size FROM changed WHERE moved OR grown) d
      GROUP BY state HAVING sum(n) <> 0 OR sum(bytes) <> 0)
  INSERT INTO evaluation (oid, due_at)
    SELECT oid, v_now FROM changed WHERE b IN ('READY', 'CORRUPTED') AND aimed ORDER BY oid
    ON CONFLICT (oid) DO UPDATE SET due_at = least(evaluation.due_at, EXCLUDED.due_at), attempts = 0;
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

-- A certificate is believed for what it says: it has to be so when it is written. All copies of the
-- items concerned are looked up once, by key; the rest is compared in memory.
CREATE OR REPLACE FUNCTION deletion_of_unheld() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE
  bad record;
  v_now CONSTANT timestamptz := dlm_now();
  v_latest CONSTANT timestamptz := dlm_latest();
  v_usable CONSTANT uuid[] := ARRAY(SELECT storage_id FROM storage WHERE mode IN ('read_write', 'read_only'));
BEGIN
  LOCK TABLE hold IN SHARE MODE;
  WITH known AS MATERIALIZED (
    SELECT uid, oid, storage_id, state,
           state = 'READY' AND (expires_at IS NULL OR expires_at > v_now) AND storage_id = ANY(v_usable) AS good
      FROM replica WHERE oid = ANY(ARRAY(SELECT DISTINCT oid FROM new_rows))),
  -- those that name a survivor that is none
  forlorn AS MATERIALIZED (
    SELECT DISTINCT e.deletion_id FROM (
      SELECT n.deletion_id, n.uid, n.oid, (s->>'uid')::uuid AS survivor
        FROM new_rows n, jsonb_array_elements(n.survivors) s WHERE n.basis = 'replica_expired' OFFSET 0) e
      LEFT JOIN known k ON k.uid = e.survivor AND k.oid = e.oid
     WHERE k.good IS NOT TRUE OR e.survivor = e.uid)
  SELECT l.uid, l.refusal INTO bad FROM (
    SELECT n.uid, CASE
      WHEN n.xid <> pg_current_xact_id() OR n.proved_at > v_latest OR n.valid_until > n.proved_at + interval '7 days'
        OR (NOT dlm_is_simulation()
            AND uuid7_moment(n.deletion_id) NOT BETWEEN clock_timestamp() - interval '1 day' AND clock_timestamp() + interval '1 hour')
      THEN 'a certificate is of now, and holds for 7 days at most'
      WHEN (k.oid, k.storage_id, k.state) IS DISTINCT FROM (n.oid, n.storage_id, n.from_state)
      THEN 'its certificate tells of another replica'
      WHEN n.basis = 'item_expired' AND (SELECT state FROM data_item i WHERE i.oid = n.oid) <> 'EXPIRED'
      THEN 'its item has not expired'
      WHEN f.deletion_id IS NOT NULL
      THEN 'a survivor that its certificate names is none' END AS refusal
      FROM new_rows n LEFT JOIN known k ON k.uid = n.uid LEFT JOIN forlorn f ON f.deletion_id = n.deletion_id
    OFFSET 0) l
   WHERE l.refusal IS NOT NULL LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s: %s', bad.uid, bad.refusal));
  END IF;
  IF EXISTS (SELECT FROM hold) THEN
    SELECT n.uid INTO bad FROM new_rows n WHERE EXISTS (
      SELECT FROM data_item i, LATERAL holds_on(i.oid, i.uri, i.collection_id) WHERE i.oid = n.oid OFFSET 0) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('replica %s is under a hold', bad.uid));
    END IF;
  END IF;
  RETURN NULL;
END $$;

-- --- values --------------------------------------------------------------------------------------
-- What is there already is looked through, and put right where what is meant is plain: roots were kept
-- as they were typed.
UPDATE replica SET mtime = NULL WHERE mtime IN ('NaN', 'Infinity', '-Infinity');
UPDATE watch_entry SET mtime = 0 WHERE mtime IN ('NaN', 'Infinity', '-Infinity');
UPDATE collection SET name = 'collection-' || collection_id WHERE name !~ '\S';
UPDATE storage SET root = coalesce(nullif(rtrim(regexp_replace(root || '/', '/(\.?/)+', '/', 'g'), '/'), ''), '/')
 WHERE interface = 'posix' AND root LIKE '/%' AND root ~ '/\.?(/|$)' AND root <> '/';
UPDATE storage SET capacity_bytes = least(capacity_bytes, 1152921504606846975),
                   observed_total_bytes = least(observed_total_bytes, 1152921504606846975),
                   observed_used_bytes = least(observed_used_bytes, 1152921504606846975)
 WHERE greatest(capacity_bytes, observed_total_bytes, observed_used_bytes) > 1152921504606846975;
DO $$
DECLARE bad record;
BEGIN
  SELECT name, root INTO bad FROM storage
   WHERE interface = 'posix' AND (root !~ '^/' OR root ~ '/\.\.(/|$)') LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('storage %s: its root %s is not an absolute path without two dots; mend it by UPDATE storage SET root = (another) WHERE name = %L', bad.name, bad.root, bad.name));
  END IF;
END $$;

-- The one form of a relative path (types.encode_path): two spellings would be two replicas of one file.
CREATE FUNCTION dlm_is_encoded(p text) RETURNS boolean LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT p !~ '[^A-Za-z0-9!$&''()*+,;=:@._~/%-]' AND p !~ '(^|/)\.?\.?(/|$)'
     AND (strpos(p, '%') = 0
          OR p !~ '%(00|2[146-9A-F]|3[0-9ABD]|4[0-9A-F]|5[0-9AF]|6[1-9A-F]|7[0-9AE]|[^0-9A-F]|.?$|.[^0-9A-F])')
$$;
ALTER TABLE data_item DROP CONSTRAINT data_item_uri_check;
ALTER TABLE data_item
  ADD CONSTRAINT data_item_uri_check
    CHECK (uri ~ '^[a-z][a-z0-9+.-]*:' AND dlm_is_encoded(substr(uri, strpos(uri, ':') + 1))),
  -- what numbers of a JSON reader hold, and sums of them the tally
  ADD CONSTRAINT data_item_size_limit CHECK (size < 9007199254740992);
ALTER TABLE replica DROP CONSTRAINT replica_path_check;
ALTER TABLE replica
  ADD CONSTRAINT replica_path_check CHECK (dlm_is_encoded(path) AND NOT starts_with(path, '.dlm/') AND path <> '.dlm'),
  ADD CONSTRAINT replica_size_limit CHECK (size < 9007199254740992),
  -- NaN is equal to itself here, and so to no file's; it is above infinity
  ADD CONSTRAINT replica_mtime_check CHECK (mtime > '-Infinity' AND mtime < 'Infinity'),
  ADD CONSTRAINT replica_trashed_check CHECK (trashed_at IS NULL OR state IN ('TRASHED', 'DELETED')),
  ADD CONSTRAINT replica_gone_check CHECK (state = 'DELETED' OR (absent_at IS NULL AND released_at IS NULL)),
  ADD CONSTRAINT replica_delete_after_check
    CHECK ((delete_after IS NULL) = (expires_at IS NULL) AND (delete_after >= expires_at) IS NOT FALSE);
ALTER TABLE manifest_file ADD CONSTRAINT manifest_file_path_encoded CHECK (dlm_is_encoded(path));
ALTER TABLE watch
  ADD CONSTRAINT watch_path_encoded CHECK (path = '' OR dlm_is_encoded(path)),
  ADD CONSTRAINT watch_interval_limit CHECK (interval <= interval '100 years');
ALTER TABLE watch_entry ADD COLUMN refusal text;
COMMENT ON COLUMN watch_entry.refusal IS 'Why it was not registered when it had settled; it is tried again later, or when it changes.';
ALTER TABLE watch_entry
  ADD CONSTRAINT watch_entry_size_check CHECK (size >= 0),
  ADD CONSTRAINT watch_entry_mtime_check CHECK (mtime > '-Infinity' AND mtime < 'Infinity');
ALTER TABLE operation ADD CONSTRAINT operation_partial_check CHECK (starts_with(partial, '.dlm/'));
ALTER TABLE collection ADD CONSTRAINT collection_name_told CHECK (name ~ '\S');
ALTER TABLE recovery ADD CONSTRAINT recovery_numbers
  CHECK (last_seq >= 0 AND xid_shift < 1e18 AND recovered_at BETWEEN '2000-01-01 00:00+00' AND '2200-01-01 00:00+00');
ALTER TABLE event ADD CONSTRAINT event_at_check CHECK (at >= '2000-01-01 00:00+00' AND at < '2200-01-01 00:00+00');
ALTER TABLE hold ADD CONSTRAINT hold_pattern_told
  CHECK (uri_pattern !~ '(^|[^\\])(\\\\)*\\$' AND starts_with(replace(uri_pattern, '\', ''), uri_prefix));
ALTER TABLE storage
  ADD CONSTRAINT storage_root_absolute
    CHECK (interface <> 'posix' OR root = '/' OR (starts_with(root, '/') AND root !~ '/\.?\.?(/|$)')),
  ADD CONSTRAINT storage_trash_grace_limit CHECK (trash_grace <= interval '100 years'),
  ADD CONSTRAINT storage_verify_day_check CHECK (verify_day BETWEEN '2000-01-01' AND '2200-01-01'),
  ADD CONSTRAINT storage_mode_told CHECK (
    (audit_after IS NULL OR mode = 'auditing') AND (drain_since IS NULL OR mode = 'draining')
    AND (mode_before IS NULL OR mode IN ('offline', 'lost', 'auditing'))),
  ADD CONSTRAINT storage_bytes_limit CHECK (
    coalesce(capacity_bytes, 0) < 1152921504606846976 AND coalesce(observed_total_bytes, 0) < 1152921504606846976
    AND coalesce(observed_used_bytes, 0) < 1152921504606846976);

-- --- places --------------------------------------------------------------------------------------
-- One file below two roots would be two copies at two locations.
CREATE FUNCTION storage_place_kept() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE v_name text;
BEGIN
  -- what is only read may have another one within it
  IF NEW.interface = 'posix' AND (TG_OP = 'INSERT'
      OR (NEW.root, NEW.interface, NEW.managed) IS DISTINCT FROM (OLD.root, OLD.interface, OLD.managed)) THEN
    PERFORM pg_advisory_xact_lock(1684827507);
    SELECT s.name INTO v_name FROM storage s
     WHERE s.interface = 'posix' AND s.mode <> 'retired' AND s.storage_id <> NEW.storage_id
       AND (s.root = NEW.root OR (s.managed AND starts_with(NEW.root, rtrim(s.root, '/') || '/'))
            OR (NEW.managed AND starts_with(s.root, rtrim(NEW.root, '/') || '/'))) LIMIT 1;
    IF FOUND THEN
      PERFORM dlm_refuse(format('storage %s would lie within %s, or that within it', NEW.name, v_name));
    END IF;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER storage_place_kept BEFORE INSERT OR UPDATE OF root, interface, managed ON storage
  FOR EACH ROW EXECUTE FUNCTION storage_place_kept();

CREATE FUNCTION collection_is_no_ring() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.collection_id IN (SELECT collections_above(NEW.parent_id)) THEN
    PERFORM dlm_refuse(format('collection %s would lie within itself', NEW.name));
  END IF;
  RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER collection_is_no_ring AFTER INSERT OR UPDATE OF parent_id ON collection
  FOR EACH ROW WHEN (NEW.parent_id IS NOT NULL) EXECUTE FUNCTION collection_is_no_ring();

-- Nothing of a site was made, and no storage told anything, in the future.
CREATE FUNCTION dlm_not_ahead() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.created_at > dlm_latest() THEN
    PERFORM dlm_refuse(format('a row of %s cannot have been made in the future', TG_TABLE_NAME));
  END IF;
  RETURN NEW;
END $$;
DO $$
DECLARE v_table text;
BEGIN
  FOREACH v_table IN ARRAY ARRAY['location', 'storage', 'collection', 'hold', 'plan', 'policy_version', 'watch',
                                 'item_relation', 'delivery', 'principal'] LOOP
    EXECUTE format('CREATE TRIGGER not_ahead BEFORE INSERT OR UPDATE OF created_at ON %I
                    FOR EACH ROW EXECUTE FUNCTION dlm_not_ahead()', v_table);
  END LOOP;
END $$;
CREATE FUNCTION storage_not_ahead() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF greatest(NEW.observed_at, NEW.drain_since, NEW.retired_at) > dlm_latest() THEN
    PERFORM dlm_refuse(format('storage %s: what it told, its drain and its end are not in the future', NEW.name));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER storage_not_ahead BEFORE INSERT OR UPDATE OF observed_at, drain_since, retired_at ON storage
  FOR EACH ROW EXECUTE FUNCTION storage_not_ahead();
-- A worker that is lost is not waited for until next year. By the server's own clock, which costs nothing.
ALTER TABLE operation ADD CONSTRAINT operation_lease_limit CHECK (lease_until <= clock_timestamp() + interval '30 days');

-- --- seals ---------------------------------------------------------------------------------------
CREATE FUNCTION audit_seal_made() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE v_last record;
BEGIN
  SELECT day, seal INTO v_last FROM audit_seal WHERE feed = NEW.feed ORDER BY day DESC LIMIT 1;
  IF NEW.seal <> audit_seal_of(NEW) OR NEW.dropped_at IS NOT NULL
     OR NEW.day >= (greatest(dlm_now(), clock_timestamp()) AT TIME ZONE 'UTC')::date
     OR NEW.previous <> coalesce(v_last.seal, repeat('0', 64)) OR NEW.day <> coalesce(v_last.day + 1, NEW.day) THEN
    PERFORM dlm_refuse(format('the seal of %s %s is not the next one, or another''s', NEW.feed, NEW.day));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER audit_seal_made BEFORE INSERT ON audit_seal FOR EACH ROW EXECUTE FUNCTION audit_seal_made();

-- Retention: drop a month of a feed that is over, all of whose days are sealed and are as they were
-- then. The seals stay.
CREATE OR REPLACE FUNCTION dlm_drop_month(p_feed text, p_month date) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  v_first date := date_trunc('month', p_month)::date;
  v_end date := (date_trunc('month', p_month) + interval '1 month')::date;
  v_name text := p_feed || '_' || to_char(p_month, 'YYYYMM');
  v_rows bigint;
BEGIN
  PERFORM pg_advisory_xact_lock(1684827506);
  SELECT sum(s.rows) INTO v_rows FROM audit_seal s
   WHERE s.feed = p_feed AND s.day >= v_first AND s.day < v_end AND s.dropped_at IS NULL;
  IF v_rows IS NULL OR NOT EXISTS (SELECT FROM audit_seal s WHERE s.feed = p_feed AND s.day = v_end - 1) THEN
    PERFORM dlm_refuse(format('the days of %s are not all sealed, or were dropped before', v_name));
  END IF;
  IF EXISTS (SELECT FROM audit_seal s FULL JOIN audit_digests(p_feed, v_first, v_end - 1) g ON g.day = s.day AND s.feed = p_feed
              WHERE (s.day IS NULL OR (s.feed = p_feed AND s.day >= v_first AND s.day < v_end AND s.dropped_at IS NULL))
                AND (s.rows, s.digest) IS DISTINCT FROM (coalesce(g.rows, 0), coalesce(g.digest, repeat('0', 64)))) THEN
    PERFORM dlm_refuse(format('the rows of %s are not those that were sealed', v_name));
  END IF;
  EXECUTE format('DROP TABLE IF EXISTS %I', v_name);
  UPDATE audit_seal s SET dropped_at = clock_timestamp()
   WHERE s.feed = p_feed AND s.day >= v_first AND s.day < v_end AND s.dropped_at IS NULL;
  INSERT INTO event (noun, action, actor, detail) VALUES ('audit', 'dropped', dlm_actor(),
    jsonb_build_object('feed', p_feed, 'month', to_char(v_first, 'YYYY-MM'), 'rows', v_rows));
  RETURN v_rows;
END $$;

-- --- what is never removed, or never changes -----------------------------------------------------
-- Only a migration changes it, which puts this trigger off.
CREATE TRIGGER state_transition_kept BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON state_transition
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER policy_version_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON policy_version
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER rule_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON rule
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER manifest_file_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON manifest_file
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER operation_kept BEFORE DELETE OR TRUNCATE ON operation
  FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER evaluation_kept BEFORE TRUNCATE ON evaluation FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER tally_kept BEFORE TRUNCATE ON tally FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();
CREATE TRIGGER item_relation_kept BEFORE TRUNCATE ON item_relation FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

-- A manifest comes whole, with the item's digest.
CREATE FUNCTION manifest_comes_whole() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE v_oid uuid;
BEGIN
  SELECT n.oid INTO v_oid FROM (SELECT oid, count(*) AS files FROM new_rows GROUP BY oid) n
   WHERE n.files <> (SELECT count(*) FROM manifest_file m WHERE m.oid = n.oid) LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('item %s has a manifest already', v_oid));
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER manifest_comes_whole AFTER INSERT ON manifest_file
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION manifest_comes_whole();

CREATE FUNCTION operation_is_the_same() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (NEW.operation_id, NEW.kind, NEW.oid, NEW.uid) IS DISTINCT FROM (OLD.operation_id, OLD.kind, OLD.oid, OLD.uid) THEN
    PERFORM dlm_refuse(format('operation %s: what it is about never changes', OLD.operation_id));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER operation_is_the_same BEFORE UPDATE OF operation_id, kind, oid, uid ON operation
  FOR EACH ROW EXECUTE FUNCTION operation_is_the_same();

CREATE FUNCTION plan_is_proposed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.state <> 'PROPOSED' OR NEW.applied_at IS NOT NULL THEN
    PERFORM dlm_refuse('a plan starts as PROPOSED');
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER plan_is_proposed BEFORE INSERT ON plan FOR EACH ROW EXECUTE FUNCTION plan_is_proposed();

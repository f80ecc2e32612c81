-- What was announced and never let in can be taken back. Its bytes, if there are any, were not
-- looked at: they stay their owner's, and its item, if it has nothing else, is DELETED without a digest.

INSERT INTO state_transition VALUES
  ('item', 'INITIALISED', 'DELETED'),
  ('replica', 'PENDING', 'DELETED');

ALTER TABLE data_item DROP CONSTRAINT data_item_check;
ALTER TABLE data_item ADD CONSTRAINT data_item_check
  CHECK (state IN ('INITIALISED', 'DELETED') OR (size IS NOT NULL AND digest IS NOT NULL));

ALTER TABLE deletion DROP CONSTRAINT deletion_basis_check;
ALTER TABLE deletion ADD CONSTRAINT deletion_basis_check
  CHECK (basis IN ('item_expired', 'replica_expired', 'withdrawn'));
ALTER TABLE deletion DROP CONSTRAINT deletion_check1;
ALTER TABLE deletion ADD CONSTRAINT deletion_check1
  CHECK (basis <> 'replica_expired' OR jsonb_array_length(survivors) > 0);
ALTER TABLE deletion ADD CONSTRAINT deletion_check2
  CHECK (basis <> 'withdrawn' OR (step = 'release' AND from_state = 'PENDING'));

CREATE OR REPLACE FUNCTION deletion_after_recovery() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  v_floor timestamptz := proof_floor();
  v_uid uuid;
BEGIN
  IF v_floor IS NULL THEN
    RETURN NULL;
  END IF;
  SELECT n.uid INTO v_uid FROM new_rows n WHERE n.basis IN ('item_expired', 'withdrawn') AND recovery_unconfirmed() LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s: the catalogue was recovered at %s, no item expires before a person has confirmed it', v_uid, v_floor));
  END IF;
  SELECT n.uid INTO v_uid FROM new_rows n WHERE n.step = 'trash' AND EXISTS (
    SELECT FROM replica r WHERE r.uid = n.uid AND r.state IN ('READY', 'SUSPECT')
       AND (r.checked_at IS NULL OR r.checked_at < v_floor) OFFSET 0) LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s was not looked at since the catalogue was recovered at %s', v_uid, v_floor));
  END IF;
  SELECT n.uid INTO v_uid FROM new_rows n WHERE n.basis = 'replica_expired' AND EXISTS (
    SELECT FROM jsonb_array_elements(n.survivors) s
     WHERE NOT EXISTS (SELECT FROM replica r WHERE r.uid = (s->>'uid')::uuid AND r.state = 'READY'
                          AND r.checked_at >= v_floor OFFSET 0)) LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('replica %s: a survivor was not looked at since the catalogue was recovered at %s', v_uid, v_floor));
  END IF;
  RETURN NULL;
END $$;

-- The time of change that a registration saw tells an owner's file from a copy of ours: one that was
-- made anew in its place has another.
UPDATE replica SET mtime = NULL WHERE mtime IS NOT NULL AND uid IN (SELECT uid FROM operation WHERE kind = 'copy');

CREATE OR REPLACE FUNCTION replica_updated() RETURNS trigger LANGUAGE plpgsql
SET enable_nestloop = off AS $$
DECLARE
  bad record;
  v_any record;
  v_held boolean;
  v_now CONSTANT timestamptz := dlm_now();
  v_actor CONSTANT text := dlm_actor();
BEGIN
  SELECT bool_or(n.uid IS NULL OR n.oid <> o.oid OR n.storage_id <> o.storage_id
                 OR (n.path <> o.path AND o.state NOT IN ('PENDING', 'MISSING'))
                 OR (n.state <> o.state AND t.noun IS NULL)) AS illegal,
         bool_or(n.state = 'READY') AS ready,
         bool_or(n.state <> o.state AND n.state IN ('TRASHED', 'DELETED')) AS leaving
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
  -- only bytes that were observed and equal the item's digest make a replica READY
  IF v_any.ready THEN
    SELECT n.uid INTO bad FROM new_rows n
     WHERE n.state = 'READY' AND NOT EXISTS (
           SELECT FROM data_item i WHERE i.oid = n.oid AND i.digest = n.digest AND i.size = n.size
              AND i.state <> 'DELETED' OFFSET 0)
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

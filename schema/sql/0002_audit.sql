-- The audit: the append-only rows of event and deletion, sealed day by day in a chain of hashes.

ALTER TABLE event DROP CONSTRAINT event_noun_check;
ALTER TABLE event ADD CONSTRAINT event_noun_check
  CHECK (noun IN ('item', 'replica', 'storage', 'hold', 'operation', 'plan', 'audit'));
ALTER TABLE deletion ADD COLUMN size bigint CHECK (size >= 0);
COMMENT ON COLUMN deletion.size IS 'Bytes of the replica; NULL in certificates from before there was this column.';

CREATE TABLE audit_seal (
  feed        text NOT NULL CHECK (feed IN ('event', 'deletion')),
  day         date NOT NULL,
  rows        bigint NOT NULL CHECK (rows >= 0),
  digest      text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),
  key_sum     numeric NOT NULL,
  hash_sum    numeric NOT NULL,
  product_sum numeric NOT NULL,
  previous    text NOT NULL CHECK (previous ~ '^[0-9a-f]{64}$'),
  seal        text NOT NULL CHECK (seal ~ '^[0-9a-f]{64}$'),
  sealed_at   moment NOT NULL DEFAULT clock_timestamp(),
  dropped_at  moment,
  PRIMARY KEY (feed, day)
);
COMMENT ON TABLE audit_seal IS 'One row a feed and day that is over: a hash over its rows, chained to the day before.';
COMMENT ON COLUMN audit_seal.feed IS 'event or deletion.';
COMMENT ON COLUMN audit_seal.day IS 'Day in UTC: of an event its time, of a certificate that of its key.';
COMMENT ON COLUMN audit_seal.rows IS 'Rows of that day.';
COMMENT ON COLUMN audit_seal.digest IS 'SHA-256 chained over the rows in the order of their keys.';
COMMENT ON COLUMN audit_seal.key_sum IS 'Sum of the rows'' keys as numbers; with the next two it tells which one row is another.';
COMMENT ON COLUMN audit_seal.hash_sum IS 'Sum of 60 bits of each row''s hash.';
COMMENT ON COLUMN audit_seal.product_sum IS 'Sum of key times hash.';
COMMENT ON COLUMN audit_seal.previous IS 'Seal of the day before; of the first day zeros.';
COMMENT ON COLUMN audit_seal.seal IS 'SHA-256 over all the above.';
COMMENT ON COLUMN audit_seal.sealed_at IS 'When it was sealed.';
COMMENT ON COLUMN audit_seal.dropped_at IS 'When the rows were dropped by retention; the seal stays.';

CREATE FUNCTION dlm_chain_step(state bytea, line text) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT sha256(state || convert_to(line, 'UTF8'))
$$;
CREATE AGGREGATE dlm_chain(text) (SFUNC = dlm_chain_step, STYPE = bytea, INITCOND = '');

CREATE FUNCTION dlm_hash_number(line text) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT ('x' || left(encode(sha256(convert_to(line, 'UTF8')), 'hex'), 15))::bit(60)::bigint::numeric
$$;
CREATE FUNCTION dlm_key_number(key uuid) RETURNS numeric LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT ('x' || substr(h, 1, 15))::bit(60)::bigint::numeric * 295147905179352825856
       + ('x' || substr(h, 16, 15))::bit(60)::bigint::numeric * 256 + ('x' || substr(h, 31, 2))::bit(8)::integer
    FROM replace(key::text, '-', '') h
$$;
CREATE FUNCTION uuid7_moment(key uuid) RETURNS timestamptz LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
  SELECT to_timestamp(('x' || left(replace(key::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
$$;

-- The rows of a feed from a day to another as numbered lines of text, the same on every server
-- and for every session.
CREATE FUNCTION audit_lines(p_feed text, p_first date, p_last date)
RETURNS TABLE (day date, key numeric, line text) LANGUAGE sql STABLE
SET TimeZone = 'UTC' SET DateStyle = 'ISO, YMD' AS $$
  SELECT (e.at AT TIME ZONE 'UTC')::date, e.seq::numeric,
         ROW(e.seq, e.xid, e.at, e.noun, e.action, e.oid, e.uid, e.storage_id, e.old_state, e.new_state, e.actor, e.detail)::text
    FROM event e WHERE p_feed = 'event'
     AND e.at >= p_first::timestamp AT TIME ZONE 'UTC' AND e.at < (p_last + 1)::timestamp AT TIME ZONE 'UTC'
  UNION ALL
  SELECT (uuid7_moment(d.deletion_id) AT TIME ZONE 'UTC')::date, dlm_key_number(d.deletion_id),
         ROW(d.deletion_id, d.step, d.basis, d.uid, d.oid, d.storage_id, d.from_state, d.survivors, d.survivor_weight,
             d.target_phase, d.holds_examined, d.reason, d.plan_id, d.actor, d.proved_at, d.valid_until, d.xid, d.size)::text
    FROM deletion d WHERE p_feed = 'deletion'
     AND d.deletion_id >= uuid7_floor(p_first::timestamp AT TIME ZONE 'UTC')
     AND d.deletion_id < uuid7_floor((p_last + 1)::timestamp AT TIME ZONE 'UTC')
$$;

-- What the rows of each day give now. Spilled to disk where they are many; memory is bounded.
CREATE FUNCTION audit_digests(p_feed text, p_first date, p_last date)
RETURNS TABLE (day date, rows bigint, digest text, key_sum numeric, hash_sum numeric, product_sum numeric)
LANGUAGE sql STABLE AS $$
  SELECT l.day, count(*), encode(dlm_chain(l.line ORDER BY l.key), 'hex'), sum(l.key), sum(l.hash), sum(l.key * l.hash)
    FROM (SELECT a.day, a.key, a.line, dlm_hash_number(a.line) AS hash
            FROM audit_lines(p_feed, p_first, p_last) a) l
   GROUP BY l.day
$$;

CREATE FUNCTION audit_seal_of(s audit_seal) RETURNS text LANGUAGE sql STABLE SET DateStyle = 'ISO, YMD' AS $$
  SELECT encode(sha256(convert_to(ROW(s.feed, s.day, s.rows, s.digest, s.key_sum, s.hash_sum, s.product_sum, s.previous)::text, 'UTF8')), 'hex')
$$;

-- Seal the days of a feed that have none, from the first that has rows to p_last, 31 at most in one
-- transaction; how many. A day without rows is sealed too, so that a missing seal is noticed.
CREATE FUNCTION dlm_seal_days(p_feed text, p_last date) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  v_first date; v_previous text; v_new audit_seal; v_row record; v_count integer := 0;
BEGIN
  PERFORM pg_advisory_xact_lock(1684827506);
  SELECT s.day + 1, s.seal INTO v_first, v_previous FROM audit_seal s WHERE s.feed = p_feed ORDER BY s.day DESC LIMIT 1;
  IF v_first IS NULL THEN
    v_previous := repeat('0', 64);
    IF p_feed = 'event' THEN
      SELECT (min(at) AT TIME ZONE 'UTC')::date INTO v_first FROM event;
    ELSE
      SELECT (uuid7_moment(deletion_id) AT TIME ZONE 'UTC')::date INTO v_first FROM deletion ORDER BY deletion_id LIMIT 1;
    END IF;
  END IF;
  p_last := least(p_last, v_first + 30);
  FOR v_row IN
    SELECT d::date AS day, coalesce(g.rows, 0) AS rows, coalesce(g.digest, repeat('0', 64)) AS digest,
           coalesce(g.key_sum, 0) AS k, coalesce(g.hash_sum, 0) AS h, coalesce(g.product_sum, 0) AS p
      FROM generate_series(v_first::timestamp, p_last::timestamp, interval '1 day') d
      LEFT JOIN audit_digests(p_feed, v_first, p_last) g ON g.day = d::date ORDER BY 1
  LOOP
    v_new := ROW(p_feed, v_row.day, v_row.rows, v_row.digest, v_row.k, v_row.h, v_row.p, v_previous, '', clock_timestamp(), NULL)::audit_seal;
    v_new.seal := audit_seal_of(v_new);
    INSERT INTO audit_seal VALUES (v_new.*);
    v_previous := v_new.seal;
    v_count := v_count + 1;
  END LOOP;
  RETURN v_count;
END $$;

-- A seal never changes, but for the note that its rows were dropped; and then they are gone.
CREATE FUNCTION audit_seal_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (to_jsonb(NEW) - 'dropped_at') <> (to_jsonb(OLD) - 'dropped_at') OR OLD.dropped_at IS NOT NULL
     OR EXISTS (SELECT FROM audit_lines(OLD.feed, OLD.day, OLD.day)) THEN
    PERFORM dlm_refuse(format('the seal of %s %s never changes', OLD.feed, OLD.day));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER audit_seal_kept BEFORE UPDATE ON audit_seal FOR EACH ROW EXECUTE FUNCTION audit_seal_kept();
CREATE TRIGGER audit_seal_rows_kept BEFORE DELETE OR TRUNCATE ON audit_seal FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

-- Retention: drop a month of a feed, all of whose days are sealed. The seals stay.
CREATE FUNCTION dlm_drop_month(p_feed text, p_month date) RETURNS bigint LANGUAGE plpgsql AS $$
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
  EXECUTE format('DROP TABLE IF EXISTS %I', v_name);
  UPDATE audit_seal s SET dropped_at = clock_timestamp()
   WHERE s.feed = p_feed AND s.day >= v_first AND s.day < v_end AND s.dropped_at IS NULL;
  INSERT INTO event (noun, action, actor, detail) VALUES ('audit', 'dropped', dlm_actor(),
    jsonb_build_object('feed', p_feed, 'month', to_char(v_first, 'YYYY-MM'), 'rows', v_rows));
  RETURN v_rows;
END $$;

-- An operation that failed for good, and one that is tried again after that, are decisions to see.
CREATE FUNCTION operation_failed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (noun, action, oid, uid, old_state, new_state, actor, detail)
    VALUES ('operation', NEW.kind, NEW.oid, NEW.uid, OLD.state, NEW.state, dlm_actor(),
            jsonb_strip_nulls(jsonb_build_object('operation_id', NEW.operation_id, 'reason', NEW.reason,
              'error_code', NEW.error_code, 'error', NEW.error)));
  RETURN NULL;
END $$;
CREATE TRIGGER operation_failed AFTER UPDATE ON operation FOR EACH ROW
  WHEN (OLD.state <> NEW.state AND (NEW.state = 'FAILED' OR OLD.state = 'FAILED')) EXECUTE FUNCTION operation_failed();

-- What an old catalogue says is no proof: nothing is deleted on its word.

COMMENT ON TABLE recovery IS 'Each time this catalogue was brought back: from a backup, or from what storages tell. What was not looked at since proves nothing.';
COMMENT ON COLUMN recovery.recovery_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN recovery.recovered_at IS 'From then on a look is proof; later than any check that the old catalogue knew of.';
COMMENT ON COLUMN recovery.source IS 'The backup, or the storages.';
COMMENT ON COLUMN recovery.actor IS 'Who did it.';
COMMENT ON COLUMN recovery.last_seq IS 'The newest event that came with it.';
COMMENT ON COLUMN recovery.xid_shift IS 'Added to the transaction ids of later events, so that the feed goes on in order on another server.';
COMMENT ON COLUMN recovery.confirmed_at IS 'When a person said that holds and times of expiry are as they should be; until then no item expires.';
COMMENT ON COLUMN recovery.confirmed_by IS 'Who said so.';
CREATE TRIGGER recovery_kept BEFORE DELETE OR TRUNCATE ON recovery FOR EACH STATEMENT EXECUTE FUNCTION dlm_refuse_change();

CREATE FUNCTION recovery_only_confirmed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (NEW.recovery_id, NEW.recovered_at, NEW.source, NEW.actor, NEW.last_seq, NEW.xid_shift)
     IS DISTINCT FROM
     (OLD.recovery_id, OLD.recovered_at, OLD.source, OLD.actor, OLD.last_seq, OLD.xid_shift)
     OR OLD.confirmed_at IS NOT NULL THEN
    PERFORM dlm_refuse(format('recovery %s: what it says never changes', OLD.recovery_id));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER recovery_only_confirmed BEFORE UPDATE ON recovery FOR EACH ROW EXECUTE FUNCTION recovery_only_confirmed();

-- A look before this moment is no proof; NULL: all looks are.
CREATE FUNCTION proof_floor() RETURNS timestamptz LANGUAGE sql STABLE AS $$
  SELECT max(recovered_at) FROM recovery
$$;
CREATE FUNCTION recovery_unconfirmed() RETURNS boolean LANGUAGE sql STABLE AS $$
  SELECT EXISTS (SELECT FROM recovery WHERE confirmed_at IS NULL)
$$;

CREATE FUNCTION deletion_after_recovery() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  v_floor timestamptz := proof_floor();
  v_uid uuid;
BEGIN
  IF v_floor IS NULL THEN
    RETURN NULL;
  END IF;
  SELECT n.uid INTO v_uid FROM new_rows n WHERE n.basis = 'item_expired' AND recovery_unconfirmed() LIMIT 1;
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

CREATE OR REPLACE FUNCTION dlm_rule_certificates(p_name text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE v_rule text;
BEGIN
  FOREACH v_rule IN ARRAY ARRAY['deletion_of_unheld', 'deletion_after_recovery'] LOOP
    IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = p_name::regclass AND tgname = v_rule) THEN
      EXECUTE format('CREATE TRIGGER %I AFTER INSERT ON %I REFERENCING NEW TABLE AS new_rows
                      FOR EACH STATEMENT EXECUTE FUNCTION %I()', v_rule, p_name, v_rule);
    END IF;
  END LOOP;
END $$;
SELECT dlm_rule_certificates('deletion');
SELECT dlm_keep_partition(inhrelid::regclass::text) FROM pg_inherits WHERE inhparent = 'deletion'::regclass;

-- Another server counts its transactions from the start: the feed goes on in order, and what came
-- with a backup is visible at once.
CREATE OR REPLACE VIEW event_feed AS
  SELECT e.seq,
         (e.xid::text::numeric + coalesce((SELECT r.xid_shift FROM recovery r WHERE r.last_seq < e.seq
            ORDER BY r.last_seq DESC, r.recovery_id DESC LIMIT 1), 0))::text::xid8 AS xid,
         e.at, e.noun, e.action, e.oid, e.uid, e.storage_id, e.old_state, e.new_state, e.actor, e.detail
    FROM event e
   WHERE e.seq <= (SELECT max(last_seq) FROM recovery) OR e.xid < pg_snapshot_xmin(pg_current_snapshot());

-- How far each storage's description of itself has come: see dlm_core.catalogue.describe.
CREATE TABLE storage_export (
  storage_id  uuid PRIMARY KEY REFERENCES storage,
  digits      smallint NOT NULL CHECK (digits BETWEEN 1 AND 4),
  index_path  text NOT NULL,
  index_digest sha256_digest NOT NULL,
  seen_xid    xid8 NOT NULL,
  low_seq     bigint NOT NULL,
  next_xid    xid8 NOT NULL,
  next_seq    bigint NOT NULL,
  exported_at moment NOT NULL
);
COMMENT ON TABLE storage_export IS 'The newest description of itself that a storage carries, and which events it has.';
COMMENT ON COLUMN storage_export.storage_id IS 'The storage.';
COMMENT ON COLUMN storage_export.digits IS 'Its files are split by so many first digits of uri_bucket.';
COMMENT ON COLUMN storage_export.index_path IS 'The index, which names all the files.';
COMMENT ON COLUMN storage_export.index_digest IS 'Digest of the index.';
COMMENT ON COLUMN storage_export.seen_xid IS 'All events of lower transactions are in it.';
COMMENT ON COLUMN storage_export.low_seq IS 'All events up to this one are in it.';
COMMENT ON COLUMN storage_export.next_xid IS 'Once all lower transactions have ended, low_seq becomes next_seq.';
COMMENT ON COLUMN storage_export.next_seq IS 'The newest event when next_xid was noted.';
COMMENT ON COLUMN storage_export.exported_at IS 'When it was written.';
CREATE INDEX data_item_bucket ON data_item (uri_bucket);

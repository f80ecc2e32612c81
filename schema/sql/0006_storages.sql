-- Site path rules; storages that are lost and come back; how far a drain is; no secrets in a place.

ALTER TABLE storage ADD COLUMN path_rules jsonb CHECK (jsonb_typeof(path_rules) = 'array');
ALTER TABLE storage ADD COLUMN mode_reason text;
ALTER TABLE storage ADD COLUMN audit_after text;
ALTER TABLE storage ADD COLUMN drain_since moment;
ALTER TABLE storage ADD COLUMN drain_bytes bigint CHECK (drain_bytes >= 0);
COMMENT ON COLUMN storage.path_rules IS 'Where copies lie: rules in their order, each a list of steps {match, template}; NULL: scheme/path.';
COMMENT ON COLUMN storage.mode_reason IS 'Why it has its mode, where somebody had to say so.';
COMMENT ON COLUMN storage.audit_after IS 'While it is auditing: copies up to this path wait to be read; NULL: all do, or it is not.';
COMMENT ON COLUMN storage.drain_since IS 'Since when it is being drained; NULL: it is not.';
COMMENT ON COLUMN storage.drain_bytes IS 'Bytes that were on it then, without its trash.';
COMMENT ON COLUMN storage.mode IS 'read_write, read_only, draining (being emptied), offline, lost (declared broken), auditing (back, being read again) or retired (for good).';

ALTER TABLE storage DROP CONSTRAINT storage_mode_check;
ALTER TABLE storage ADD CONSTRAINT storage_mode_check
  CHECK (mode IN ('read_write', 'read_only', 'draining', 'offline', 'lost', 'auditing', 'retired'));
-- an upgrade fails on a password that is there: it has to be taken out, and changed
ALTER TABLE storage ADD CONSTRAINT storage_without_password
  CHECK (root !~ '://[^/]*@' AND config::text !~ '://[^/"]*@');

INSERT INTO state_transition VALUES ('replica', 'CORRUPTED', 'MISSING');
INSERT INTO state_transition
  SELECT 'storage', a, b FROM unnest(ARRAY['read_write', 'read_only', 'draining', 'offline']) a,
         unnest(ARRAY['read_write', 'read_only', 'draining', 'offline', 'lost', 'auditing', 'retired']) b WHERE a <> b;
INSERT INTO state_transition
  SELECT 'storage', 'auditing', b FROM unnest(ARRAY['read_write', 'read_only', 'draining', 'offline', 'lost']) b;
INSERT INTO state_transition VALUES ('storage', 'lost', 'auditing'), ('storage', 'lost', 'retired');

CREATE FUNCTION storage_mode_set() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.mode_reason IS NOT DISTINCT FROM OLD.mode_reason THEN
    NEW.mode_reason := NULL;
  END IF;
  NEW.audit_after := CASE WHEN NEW.mode = 'auditing' THEN '' END;
  NEW.drain_since := CASE WHEN NEW.mode = 'draining' THEN dlm_now() END;
  NEW.drain_bytes := CASE WHEN NEW.mode = 'draining' THEN (
    SELECT used_bytes - trashed_bytes FROM storage_usage WHERE storage_id = NEW.storage_id) END;
  RETURN NEW;
END $$;
CREATE TRIGGER storage_mode_set BEFORE UPDATE OF mode ON storage FOR EACH ROW
  WHEN (OLD.mode <> NEW.mode) EXECUTE FUNCTION storage_mode_set();

CREATE OR REPLACE FUNCTION storage_updated() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.mode = 'retired' AND NEW.mode <> 'retired' THEN
    PERFORM dlm_refuse(format('storage %s is retired; a retired storage does not come back', OLD.name));
  END IF;
  IF NEW.mode <> OLD.mode AND NOT EXISTS (SELECT FROM state_transition t
      WHERE t.noun = 'storage' AND t.old_state = OLD.mode AND t.new_state = NEW.mode) THEN
    PERFORM dlm_refuse(format('storage %s cannot go from %s to %s', OLD.name, OLD.mode, NEW.mode));
  END IF;
  -- what was on a lost storage is not there any more; anything else has to be moved off first
  IF NEW.mode = 'retired' AND OLD.mode <> 'retired'
     AND EXISTS (SELECT FROM replica WHERE storage_id = NEW.storage_id AND state <> 'DELETED'
                    AND NOT (OLD.mode = 'lost' AND state IN ('MISSING', 'TRASHED'))) THEN
    PERFORM dlm_refuse(format('storage %s still has replicas; drain it first', OLD.name));
  END IF;
  IF NEW.mode <> OLD.mode THEN
    INSERT INTO event (noun, action, storage_id, old_state, new_state, actor, detail)
      VALUES ('storage', 'mode', NEW.storage_id, OLD.mode, NEW.mode, dlm_actor(),
              nullif(jsonb_strip_nulls(jsonb_build_object('reason', NEW.mode_reason)), '{}'));
  END IF;
  IF NEW.path_rules IS DISTINCT FROM OLD.path_rules THEN
    INSERT INTO event (noun, action, storage_id, actor, detail)
      VALUES ('storage', 'paths', NEW.storage_id, dlm_actor(),
              jsonb_build_object('old', OLD.path_rules, 'new', NEW.path_rules));
  END IF;
  RETURN NULL;
END $$;

-- What goes with its storage was not found by reading: it is no finding of verification.
CREATE OR REPLACE FUNCTION replica_doubted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF (SELECT mode FROM storage WHERE storage_id = NEW.storage_id) NOT IN ('lost', 'auditing') THEN
    INSERT INTO event (noun, action, oid, uid, storage_id, actor, detail)
      VALUES ('replica', 'doubted', NEW.oid, NEW.uid, NEW.storage_id, dlm_actor(),
              jsonb_build_object('found', NEW.state, 'checked_at', OLD.checked_at, 'found_at', dlm_now()));
  END IF;
  RETURN NULL;
END $$;

CREATE OR REPLACE VIEW item_phase AS
  SELECT oid, sum(best)::smallint AS weight FROM (
    SELECT r.oid, s.location_id, max(phase_weight(s.phase)) AS best
      FROM replica r JOIN storage s USING (storage_id)
     WHERE r.state = 'READY' AND s.mode NOT IN ('retired', 'lost') GROUP BY r.oid, s.location_id) b
  GROUP BY oid;

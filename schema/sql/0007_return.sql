-- A storage that was away is, after its audit, what it was before.

ALTER TABLE storage ADD COLUMN mode_before text
  CHECK (mode_before IN ('read_write', 'read_only', 'draining'));
COMMENT ON COLUMN storage.mode_before IS 'While it is offline, lost or auditing: the mode it goes back to after an audit; NULL: not known.';

CREATE OR REPLACE FUNCTION storage_mode_set() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.mode_reason IS NOT DISTINCT FROM OLD.mode_reason THEN
    NEW.mode_reason := NULL;
  END IF;
  NEW.audit_after := CASE WHEN NEW.mode = 'auditing' THEN '' END;
  NEW.mode_before := CASE WHEN NEW.mode IN ('offline', 'lost', 'auditing') THEN
    CASE WHEN OLD.mode IN ('offline', 'lost', 'auditing') THEN OLD.mode_before ELSE OLD.mode END END;
  NEW.drain_since := CASE WHEN NEW.mode = 'draining' THEN dlm_now() END;
  NEW.drain_bytes := CASE WHEN NEW.mode = 'draining' THEN (
    SELECT used_bytes - trashed_bytes FROM storage_usage WHERE storage_id = NEW.storage_id) END;
  RETURN NEW;
END $$;

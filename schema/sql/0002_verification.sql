-- Verification as a service: which replica is to be read again, under which budget, and what was found.

ALTER TABLE storage ADD COLUMN verify_every_days integer DEFAULT 90 CHECK (verify_every_days BETWEEN 1 AND 36500);
ALTER TABLE storage ADD COLUMN verify_bytes_per_second bigint CHECK (verify_bytes_per_second > 0);
ALTER TABLE storage ADD COLUMN verify_bytes_per_day bigint CHECK (verify_bytes_per_day > 0);
ALTER TABLE storage ADD COLUMN verify_day date;
ALTER TABLE storage ADD COLUMN verify_day_bytes bigint NOT NULL DEFAULT 0 CHECK (verify_day_bytes >= 0);
COMMENT ON COLUMN storage.verify_every_days IS 'Replicas here are read again after so many days; NULL: only when asked for.';
COMMENT ON COLUMN storage.verify_bytes_per_second IS 'Verification reads at most so fast here; NULL: as fast as it goes.';
COMMENT ON COLUMN storage.verify_bytes_per_day IS 'Scheduled verification reads at most so much on a day (UTC); NULL: all that is due.';
COMMENT ON COLUMN storage.verify_day IS 'The day that the next column tells of.';
COMMENT ON COLUMN storage.verify_day_bytes IS 'Bytes planned to be read by scheduled verification on that day.';

ALTER TABLE replica ADD COLUMN told_at moment;
ALTER TABLE replica ADD COLUMN told_stamp text;
COMMENT ON COLUMN replica.told_at IS 'When the storage last told the stamp that it had at the last matching read. No proof: nothing was read.';
COMMENT ON COLUMN replica.told_stamp IS 'What the storage said of the content (its ETag) when it was last read and matched.';
CREATE INDEX replica_check ON replica (storage_id, (GREATEST(checked_at, told_at))) WHERE state = 'READY';

-- How old the last good look was when something was found: the time to detect is in the log. The
-- change of state is an event of its own; this one has no states, so that none is counted twice.
CREATE FUNCTION replica_doubted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (noun, action, oid, uid, storage_id, actor, detail)
    VALUES ('replica', 'doubted', NEW.oid, NEW.uid, NEW.storage_id, dlm_actor(),
            jsonb_build_object('found', NEW.state, 'checked_at', OLD.checked_at, 'found_at', dlm_now()));
  RETURN NULL;
END $$;
CREATE TRIGGER replica_doubted AFTER UPDATE OF state ON replica FOR EACH ROW
  WHEN (OLD.state = 'READY' AND NEW.state IN ('SUSPECT', 'CORRUPTED', 'MISSING')) EXECUTE FUNCTION replica_doubted();
CREATE INDEX event_doubted ON event (at) WHERE action = 'doubted';

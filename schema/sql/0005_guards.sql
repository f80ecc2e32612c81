-- Guards that were only in code: no copies on a retired storage; and what brings back a copy that was
-- condemned wrongly, and an expiry that a drain had put aside.

-- Inserting a replica locks its storage's row (the foreign key does), retiring waits for it, and so
-- the other way round: whoever comes second sees what the first one did.
CREATE FUNCTION replica_not_on_retired() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE bad text;
BEGIN
  SELECT s.name INTO bad FROM storage s
   WHERE s.mode = 'retired' AND s.storage_id IN (SELECT storage_id FROM new_rows) LIMIT 1;
  IF FOUND THEN
    PERFORM dlm_refuse(format('storage %s is retired and takes no replicas', bad));
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER replica_not_on_retired AFTER INSERT ON replica
  REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION replica_not_on_retired();

CREATE FUNCTION storage_retires() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  -- an update alone would not wait for a foreign key's lock
  PERFORM FROM storage WHERE storage_id = NEW.storage_id FOR UPDATE;
  RETURN NEW;
END $$;
CREATE TRIGGER storage_retires BEFORE UPDATE OF mode ON storage FOR EACH ROW
  WHEN (NEW.mode = 'retired' AND OLD.mode <> 'retired') EXECUTE FUNCTION storage_retires();

-- good bytes that were set aside come back, and are read again before they count
INSERT INTO state_transition VALUES ('replica', 'CORRUPTED', 'SUSPECT');

ALTER TABLE replica ADD COLUMN own_expires_at moment;
ALTER TABLE replica ADD COLUMN own_expiry_reason text;
COMMENT ON COLUMN replica.own_expires_at IS 'The expiry that it had when a drain or rebalancing let it expire now; it has that again if the drain is called off.';
COMMENT ON COLUMN replica.own_expiry_reason IS 'The reason of that.';

-- what lies in a collection, the collections in it included
CREATE INDEX collection_parent ON collection (parent_id) WHERE parent_id IS NOT NULL;

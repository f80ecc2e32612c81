-- An item that has expired stays so until it is restored: another time would be promised in vain, for
-- its copies go with the time that it had.
CREATE FUNCTION item_stays_expired() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  PERFORM dlm_refuse(format('item %s is %s: its time of expiry is over', NEW.uri, NEW.state));
  RETURN NEW;
END $$;
CREATE TRIGGER item_stays_expired BEFORE UPDATE OF expires_at ON data_item FOR EACH ROW
  WHEN (OLD.state IN ('EXPIRED', 'DELETED') AND NEW.state = OLD.state AND NEW.expires_at IS DISTINCT FROM OLD.expires_at)
  EXECUTE FUNCTION item_stays_expired();

COMMENT ON COLUMN replica.accessed_at IS 'When it came to be on this storage; what is there longest leaves first.';

-- The feed tells what happened: by hand nothing is added that would have. Who owns what, and of what kind
-- it is, can be shown on a line.

-- What tells of a state is written by the trigger that saw it change. Only rows that no trigger writes
-- reach this function (a condition of the trigger: it costs the others nothing).
CREATE FUNCTION event_by_hand() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.old_state IS NOT NULL OR NEW.new_state IS NOT NULL
     OR NOT (NEW.noun = 'audit' OR (NEW.noun = 'replica' AND NEW.action IN ('refused', 'brought_back'))) THEN
    PERFORM dlm_refuse(format('the event %s %s is written by what changes, not by hand', NEW.noun, NEW.action));
  END IF;
  IF NOT dlm_is_simulation() AND (NEW.xid <> pg_current_xact_id()
     OR NEW.seq > (SELECT last_value FROM event_seq)
     OR NEW.at NOT BETWEEN clock_timestamp() - interval '1 hour' AND clock_timestamp() + interval '1 hour') THEN
    PERFORM dlm_refuse(format('the event %s %s is of now, of its own transaction and has the next number', NEW.noun, NEW.action));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER event_by_hand BEFORE INSERT ON event FOR EACH ROW
  WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION event_by_hand();

-- A place that failed is tried again: the code says after an hour.
CREATE FUNCTION replica_excluded_long() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.excluded_until > greatest(dlm_now(), clock_timestamp()) + interval '30 days' THEN
    PERFORM dlm_refuse(format('replica %s is excluded for 30 days at most', NEW.uid));
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER replica_excluded_long BEFORE INSERT OR UPDATE OF excluded_until ON replica FOR EACH ROW
  WHEN (NEW.excluded_until > '2000-01-01Z') EXECUTE FUNCTION replica_excluded_long();

-- Rows from before this rule lose what cannot be shown; nothing follows from it, so no trigger needs to see it.
ALTER TABLE data_item DISABLE TRIGGER USER;
UPDATE data_item SET owner = nullif(trim(regexp_replace(owner, '[\x01-\x1f\x7f]', ' ', 'g')), '')
 WHERE owner = '' OR owner ~ '[\x01-\x1f\x7f]';
UPDATE data_item SET content_type = 'application/octet-stream' WHERE content_type = '' OR content_type ~ '[\x01-\x1f\x7f]';
ALTER TABLE data_item ENABLE TRIGGER USER;
ALTER TABLE data_item
  ADD CONSTRAINT data_item_owner_told CHECK (owner <> '' AND owner !~ '[\x01-\x1f\x7f]'),
  ADD CONSTRAINT data_item_content_type_told CHECK (content_type <> '' AND content_type !~ '[\x01-\x1f\x7f]');

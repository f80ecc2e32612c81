-- Limits of storages and of links between them, shared by the drainers; what drainers do now; urgency.

ALTER TABLE storage ADD COLUMN max_bytes_per_second bigint CHECK (max_bytes_per_second > 0);
ALTER TABLE storage ADD COLUMN max_concurrency integer CHECK (max_concurrency BETWEEN 1 AND 100000);
COMMENT ON COLUMN storage.max_bytes_per_second IS 'All drainers together read and write at most so many bytes a second; NULL: no limit.';
COMMENT ON COLUMN storage.max_concurrency IS 'All drainers together have at most so many payload files open there; NULL: no limit.';

CREATE TABLE link (
  source_id            uuid NOT NULL REFERENCES storage,
  destination_id       uuid NOT NULL REFERENCES storage,
  max_bytes_per_second bigint CHECK (max_bytes_per_second > 0),
  max_concurrency      integer CHECK (max_concurrency BETWEEN 1 AND 100000),
  PRIMARY KEY (source_id, destination_id),
  CHECK (num_nonnulls(max_bytes_per_second, max_concurrency) > 0)
);
COMMENT ON TABLE link IS 'Limits of the copies from one storage to another; a pair that is not here has none.';
COMMENT ON COLUMN link.source_id IS 'The storage that is read.';
COMMENT ON COLUMN link.destination_id IS 'The storage that is written.';
COMMENT ON COLUMN link.max_bytes_per_second IS 'All drainers together copy at most so many bytes a second; NULL: no limit.';
COMMENT ON COLUMN link.max_concurrency IS 'All drainers together copy at most so many files at once; NULL: no limit.';

-- Not logged: it tells of this moment only, and each drainer writes its row every few seconds.
CREATE UNLOGGED TABLE drainer (
  drainer_id uuid PRIMARY KEY,
  worker     text NOT NULL,
  beat_at    moment NOT NULL,
  uses       jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(uses) = 'object'),
  running    jsonb NOT NULL DEFAULT '[]' CHECK (jsonb_typeof(running) = 'array')
);
COMMENT ON TABLE drainer IS 'What drainers do at this moment; a row that is not renewed is that of a lost one. Unlogged.';
COMMENT ON COLUMN drainer.drainer_id IS 'Key, UUIDv7: new for every drainer.';
COMMENT ON COLUMN drainer.worker IS 'Host and process.';
COMMENT ON COLUMN drainer.beat_at IS 'When it last told.';
COMMENT ON COLUMN drainer.uses IS 'Storages and links that it uses, each with the files that it may have open there.';
COMMENT ON COLUMN drainer.running IS 'Its larger operations: key, step, bytes done and in all, since when.';

CREATE TABLE urgency (
  oid       uuid PRIMARY KEY REFERENCES data_item,
  priority  smallint NOT NULL DEFAULT 0 CHECK (priority BETWEEN -9 AND 9),
  needed_by moment,
  CHECK (priority <> 0 OR needed_by IS NOT NULL)
);
COMMENT ON TABLE urgency IS 'Items whose file work goes before or after that of others; what is not here has priority 0.';
COMMENT ON COLUMN urgency.oid IS 'The item.';
COMMENT ON COLUMN urgency.priority IS '-9 (first) to 9 (last).';
COMMENT ON COLUMN urgency.needed_by IS 'When its copies have to be there; what would miss it goes first and is told.';

CREATE INDEX urgency_needed ON urgency (needed_by) WHERE needed_by IS NOT NULL;

CREATE FUNCTION urgency_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO event (noun, action, oid, actor, detail)
    SELECT 'item', 'urgency', oid, dlm_actor(), CASE WHEN TG_OP = 'DELETE' THEN '{"priority": 0}'
           ELSE jsonb_build_object('priority', priority, 'needed_by', needed_by) END
      FROM changed ORDER BY oid;
  RETURN NULL;
END $$;
CREATE TRIGGER urgency_inserted AFTER INSERT ON urgency
  REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION urgency_changed();
CREATE TRIGGER urgency_updated AFTER UPDATE ON urgency
  REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION urgency_changed();
CREATE TRIGGER urgency_deleted AFTER DELETE ON urgency
  REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION urgency_changed();

ALTER TABLE operation ADD COLUMN deadline moment;
COMMENT ON COLUMN operation.deadline IS 'When it has to be done; NULL: whenever.';
CREATE INDEX operation_deadline ON operation (deadline)
  WHERE deadline IS NOT NULL AND state = 'QUEUED';

ALTER TABLE operation ADD COLUMN partial text;
COMMENT ON COLUMN operation.partial IS 'Temporary file that a try of this copy left, and from which the next one goes on.';
CREATE INDEX operation_partial ON operation (uid)
  WHERE partial IS NOT NULL AND state IN ('QUEUED', 'RUNNING');

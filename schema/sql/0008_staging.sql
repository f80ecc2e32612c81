-- Cold storages: files that have to be staged (brought to disk) before they can be read.

ALTER TABLE operation DROP CONSTRAINT operation_kind_check;
ALTER TABLE operation ADD CONSTRAINT operation_kind_check
  CHECK (kind IN ('admit', 'copy', 'verify', 'trash', 'purge', 'restore', 'stage'));

-- By path, not by replica: a directory payload has many files, and several operations may wait for
-- one file. No foreign key on replica: what lies in quarantine is waited for too.
CREATE TABLE staging (
  storage_id uuid NOT NULL REFERENCES storage,
  path       text NOT NULL CHECK (path <> ''),
  since      moment NOT NULL,
  polled_at  moment NOT NULL,
  retry_at   moment NOT NULL,
  asked_at   moment,
  error      text,
  PRIMARY KEY (storage_id, path)
);
COMMENT ON TABLE staging IS 'Files of cold storages that somebody waits to read; a row goes when its file is online, or too late.';
COMMENT ON COLUMN staging.storage_id IS 'The cold storage.';
COMMENT ON COLUMN staging.path IS 'Path below its root, percent-encoded.';
COMMENT ON COLUMN staging.since IS 'When it was found offline first; the deadline counts from here.';
COMMENT ON COLUMN staging.polled_at IS 'When it was looked at last; nobody waits any more if that is long ago.';
COMMENT ON COLUMN staging.retry_at IS 'Not asked for again before this.';
COMMENT ON COLUMN staging.asked_at IS 'When the storage last took the request; NULL: it did not yet.';
COMMENT ON COLUMN staging.error IS 'Why the storage did not take the last request.';

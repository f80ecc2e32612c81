-- When this catalogue was brought back from a backup or from what storages tell. A restore puts this
-- table into catalogues of older schemas too: hence IF NOT EXISTS.
CREATE TABLE IF NOT EXISTS recovery (
  recovery_id  uuid PRIMARY KEY,
  recovered_at timestamptz NOT NULL,
  source       text NOT NULL CHECK (source <> ''),
  actor        text NOT NULL CHECK (actor <> ''),
  last_seq     bigint NOT NULL,
  xid_shift    numeric NOT NULL CHECK (xid_shift >= 0),
  confirmed_at timestamptz,
  confirmed_by text,
  CHECK ((confirmed_at IS NULL) = (confirmed_by IS NULL))
);

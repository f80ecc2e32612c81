-- The catalogue. PostgreSQL 15 or newer. Words: docs/glossary.md; rules: docs/design.md.
-- Times are bounded to 2000..2200 so that a slipped unit or an epoch never gets in.

CREATE DOMAIN moment AS timestamptz
  CHECK (VALUE >= '2000-01-01 00:00+00' AND VALUE < '2200-01-01 00:00+00');
CREATE DOMAIN label AS text
  CHECK (VALUE ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$');
CREATE DOMAIN phase AS text
  CHECK (VALUE IN ('PLASMA', 'GAS', 'LIQUID', 'SOLID'));
CREATE DOMAIN sha256_digest AS text
  CHECK (VALUE ~ '^sha256:[0-9a-f]{64}$');

CREATE TABLE location (
  location_id uuid PRIMARY KEY,
  name        label NOT NULL UNIQUE,
  facility    text,
  city        text,
  country     text CHECK (country ~ '^[A-Z]{2}$'),
  created_at  moment NOT NULL DEFAULT now()
);

CREATE TABLE storage (
  storage_id     uuid PRIMARY KEY,
  name           label NOT NULL UNIQUE,
  location_id    uuid NOT NULL REFERENCES location,
  interface      text NOT NULL CHECK (interface ~ '^[a-z][a-z0-9]*$'),
  class          text NOT NULL CHECK (class IN ('disk', 'object', 'tape')),
  root           text NOT NULL CHECK (root <> ''),
  config         jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(config) = 'object'),
  phase          phase NOT NULL,
  mode           text NOT NULL DEFAULT 'read_write'
                 CHECK (mode IN ('read_write', 'read_only', 'draining', 'offline', 'retired')),
  managed        boolean NOT NULL DEFAULT true,
  capacity_bytes bigint CHECK (capacity_bytes > 0),
  high_watermark double precision NOT NULL DEFAULT 0.9,
  low_watermark  double precision NOT NULL DEFAULT 0.8,
  concurrency    integer CHECK (concurrency BETWEEN 1 AND 1024),
  trash_grace    interval CHECK (trash_grace >= interval '0'),
  observed_total_bytes bigint CHECK (observed_total_bytes >= 0),
  observed_used_bytes  bigint CHECK (observed_used_bytes >= 0),
  observed_at    moment,
  rebalance_after moment,
  created_at     moment NOT NULL DEFAULT now(),
  retired_at     moment,
  CHECK (0 < low_watermark AND low_watermark < high_watermark AND high_watermark <= 1),
  CHECK ((mode = 'retired') = (retired_at IS NOT NULL)),
  UNIQUE (interface, root, config)
);

CREATE TABLE collection (
  collection_id uuid PRIMARY KEY,
  name          text NOT NULL UNIQUE CHECK (name <> ''),
  parent_id     uuid REFERENCES collection,
  metadata      jsonb NOT NULL DEFAULT '{}',
  created_at    moment NOT NULL DEFAULT now(),
  CHECK (parent_id <> collection_id)
);

CREATE TABLE data_item (
  oid           uuid PRIMARY KEY,
  -- compared bytewise, so that prefixes are ranges of the index everywhere
  uri           text COLLATE "C" NOT NULL CHECK (uri ~ '^[a-z][a-z0-9+.-]*:[^/\s]' AND uri !~ '[\s\x01-\x1f]'),
  version       integer NOT NULL DEFAULT 1 CHECK (version >= 1),
  uri_bucket    text NOT NULL CHECK (uri_bucket ~ '^[0-9a-f]{5}$'),
  name          text NOT NULL GENERATED ALWAYS AS (substring(uri FROM '[^/:]*$')) STORED,
  state         text NOT NULL DEFAULT 'INITIALISED'
                CHECK (state IN ('INITIALISED', 'READY', 'CORRUPTED', 'EXPIRED', 'DELETED')),
  kind          text NOT NULL DEFAULT 'file' CHECK (kind IN ('file', 'directory')),
  size          bigint CHECK (size >= 0),
  digest        sha256_digest,
  content_type  text,
  target_phase  phase NOT NULL DEFAULT 'SOLID',
  phase_weight  smallint NOT NULL DEFAULT 0 CHECK (phase_weight >= 0),
  shortfall     text,
  collection_id uuid REFERENCES collection,
  owner         text,
  metadata      jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(metadata) = 'object'),
  tags          jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(tags) = 'object'),
  created_at    moment NOT NULL DEFAULT now(),
  expires_at    moment,
  expiry_reason text,
  UNIQUE (uri, version),
  CHECK (state IN ('INITIALISED') OR (size IS NOT NULL AND digest IS NOT NULL)),
  CHECK (state <> 'EXPIRED' OR expires_at IS NOT NULL),
  CHECK (expires_at >= created_at)
);
CREATE INDEX data_item_expiring ON data_item (expires_at)
  WHERE expires_at IS NOT NULL AND state IN ('READY', 'CORRUPTED');
CREATE INDEX data_item_below_target ON data_item (oid)
  WHERE shortfall IS NOT NULL;
CREATE INDEX data_item_collection ON data_item (collection_id) WHERE collection_id IS NOT NULL;
CREATE INDEX data_item_expired ON data_item (oid) WHERE state = 'EXPIRED';

CREATE TABLE manifest_file (
  oid    uuid NOT NULL REFERENCES data_item,
  path   text NOT NULL CHECK (path <> '' AND path !~ '^/'),
  size   bigint NOT NULL CHECK (size >= 0),
  digest sha256_digest NOT NULL,
  PRIMARY KEY (oid, path)
);

CREATE TABLE item_relation (
  subject_oid uuid NOT NULL REFERENCES data_item,
  relation    text NOT NULL CHECK (relation IN ('derived_from', 'supersedes', 'calibrates', 'part_of')),
  object_oid  uuid NOT NULL REFERENCES data_item,
  created_at  moment NOT NULL DEFAULT now(),
  PRIMARY KEY (subject_oid, relation, object_oid),
  CHECK (subject_oid <> object_oid)
);
CREATE INDEX item_relation_object ON item_relation (object_oid);

-- path is relative to the storage's root and percent-encoded like a uri (types.encode_path): text
-- holds no octets that are no UTF-8, file names may.
CREATE TABLE replica (
  uid            uuid PRIMARY KEY,
  oid            uuid NOT NULL REFERENCES data_item,
  storage_id     uuid NOT NULL REFERENCES storage,
  path           text NOT NULL CHECK (path <> '' AND path !~ '^/' AND path !~ '(^|/)\.\.(/|$)'),
  state          text NOT NULL DEFAULT 'PENDING'
                 CHECK (state IN ('PENDING', 'READY', 'SUSPECT', 'CORRUPTED', 'MISSING', 'TRASHED', 'DELETED')),
  size           bigint NOT NULL CHECK (size >= 0),
  digest         sha256_digest,
  mtime          double precision,
  created_at     moment NOT NULL DEFAULT now(),
  checked_at     moment,
  accessed_at    moment NOT NULL DEFAULT now(),
  expires_at     moment,
  expiry_reason  text,
  delete_after   moment,
  excluded_until moment,
  deletion_id    uuid,
  trashed_at     moment,
  absent_at      moment,
  released_at    moment,
  CHECK (state <> 'READY' OR (checked_at IS NOT NULL AND digest IS NOT NULL)),
  CHECK (state NOT IN ('TRASHED', 'DELETED') OR deletion_id IS NOT NULL),
  CHECK (state <> 'DELETED' OR absent_at IS NOT NULL OR released_at IS NOT NULL),
  CHECK (checked_at >= created_at)
);
CREATE INDEX replica_oid ON replica (oid);
-- One live replica of an item on a storage, and one owner of a path. A trashed replica keeps its
-- path until its bytes have been moved away, else the trashing could take a newer copy with it.
CREATE UNIQUE INDEX replica_item_storage ON replica (oid, storage_id)
  WHERE state NOT IN ('TRASHED', 'DELETED');
CREATE UNIQUE INDEX replica_storage_path ON replica (storage_id, path)
  WHERE state <> 'DELETED' AND trashed_at IS NULL;
CREATE INDEX replica_expiring ON replica (delete_after)
  WHERE delete_after IS NOT NULL AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING');
CREATE INDEX replica_leaving ON replica (storage_id)
  WHERE expires_at IS NOT NULL AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING');
CREATE INDEX replica_coldest ON replica (storage_id, accessed_at)
  WHERE expires_at IS NULL AND state IN ('READY', 'SUSPECT', 'CORRUPTED', 'MISSING');

CREATE TABLE policy_version (
  policy_version_id uuid PRIMARY KEY,
  content_hash      text NOT NULL UNIQUE CHECK (content_hash ~ '^[0-9a-f]{64}$'),
  content           text NOT NULL,
  actor             text NOT NULL,
  created_at        moment NOT NULL DEFAULT now()
);
CREATE TABLE rule (
  rule_id           uuid PRIMARY KEY,
  policy_version_id uuid NOT NULL REFERENCES policy_version,
  line              integer NOT NULL CHECK (line >= 1),
  name              text NOT NULL CHECK (name <> ''),
  definition        jsonb NOT NULL CHECK (jsonb_typeof(definition) = 'object'),
  UNIQUE (policy_version_id, name)
);

CREATE TABLE hold (
  hold_id       uuid PRIMARY KEY,
  oid           uuid REFERENCES data_item,
  collection_id uuid REFERENCES collection,
  uri_prefix    text CHECK (uri_prefix ~ '^[a-z][a-z0-9+.-]*:'),
  reason        text NOT NULL CHECK (reason <> ''),
  actor         text NOT NULL,
  created_at    moment NOT NULL DEFAULT now(),
  ends_at       moment,
  CHECK (num_nonnulls(oid, collection_id, uri_prefix) = 1),
  CHECK (ends_at >= created_at)
);
CREATE INDEX hold_oid ON hold (oid);
CREATE INDEX hold_collection ON hold (collection_id);

CREATE TABLE plan (
  plan_id      uuid PRIMARY KEY,
  kind         text NOT NULL CHECK (kind IN ('replication', 'expiry', 'rebalance')),
  content_hash text NOT NULL CHECK (content_hash ~ '^[0-9a-f]{64}$'),
  operations   bigint NOT NULL CHECK (operations >= 0),
  bytes        bigint NOT NULL CHECK (bytes >= 0),
  actor        text NOT NULL,
  created_at   moment NOT NULL DEFAULT now(),
  applied_at   moment
);

-- Partitioned by time through the UUIDv7 key, so that a single column stays the key.
CREATE TABLE operation (
  operation_id uuid PRIMARY KEY,
  kind         text NOT NULL CHECK (kind IN ('admit', 'copy', 'verify', 'trash', 'purge', 'restore')),
  state        text NOT NULL DEFAULT 'QUEUED'
               CHECK (state IN ('QUEUED', 'RUNNING', 'DONE', 'FAILED', 'CANCELLED')),
  oid          uuid NOT NULL, -- the item of the replica, which never changes
  uid          uuid NOT NULL REFERENCES replica,
  source_uid   uuid,
  plan_id      uuid REFERENCES plan,
  reason       text NOT NULL CHECK (reason <> ''),
  actor        text NOT NULL,
  priority     smallint NOT NULL DEFAULT 0,
  due_at       moment NOT NULL,
  attempts     integer NOT NULL DEFAULT 0 CHECK (attempts >= 0),
  lease_token  uuid,
  lease_until  moment,
  worker       text,
  error_code   text,
  error        text,
  created_at   moment NOT NULL DEFAULT now(),
  finished_at  moment,
  CHECK ((state = 'RUNNING') = (lease_token IS NOT NULL AND lease_until IS NOT NULL)),
  CHECK ((state IN ('DONE', 'FAILED', 'CANCELLED')) = (finished_at IS NOT NULL)),
  CHECK (state <> 'FAILED' OR error_code IS NOT NULL)
) PARTITION BY RANGE (operation_id);
CREATE INDEX operation_due ON operation (kind, priority, due_at) WHERE state = 'QUEUED';
CREATE INDEX operation_lease ON operation (lease_until) WHERE state = 'RUNNING';
CREATE INDEX operation_failed ON operation (kind, finished_at) WHERE state = 'FAILED';
CREATE INDEX operation_uid ON operation (uid);

-- Certificates, one for each step of a deletion; append-only.
CREATE TABLE deletion (
  deletion_id uuid PRIMARY KEY,
  step        text NOT NULL CHECK (step IN ('trash', 'purge', 'release')),
  basis       text NOT NULL CHECK (basis IN ('item_expired', 'replica_expired')),
  uid         uuid NOT NULL,
  oid         uuid NOT NULL,
  storage_id  uuid NOT NULL,
  from_state  text NOT NULL,
  survivors   jsonb NOT NULL CHECK (jsonb_typeof(survivors) = 'array'),
  survivor_weight smallint NOT NULL CHECK (survivor_weight >= 0),
  target_phase phase NOT NULL,
  holds_examined integer NOT NULL CHECK (holds_examined >= 0),
  reason      text NOT NULL CHECK (reason <> ''),
  plan_id     uuid REFERENCES plan,
  actor       text NOT NULL CHECK (actor <> ''),
  proved_at   moment NOT NULL,
  valid_until moment NOT NULL,
  xid         xid8 NOT NULL DEFAULT pg_current_xact_id(),
  CHECK (valid_until > proved_at),
  CHECK (basis = 'item_expired' OR jsonb_array_length(survivors) > 0)
) PARTITION BY RANGE (deletion_id);
CREATE INDEX deletion_uid ON deletion (uid);

CREATE SEQUENCE event_seq;
CREATE TABLE event (
  seq        bigint NOT NULL DEFAULT nextval('event_seq'),
  xid        xid8 NOT NULL DEFAULT pg_current_xact_id(),
  at         timestamptz NOT NULL DEFAULT clock_timestamp(),
  noun       text NOT NULL CHECK (noun IN ('item', 'replica', 'storage', 'hold', 'operation')),
  action     text NOT NULL,
  oid        uuid,
  uid        uuid,
  storage_id uuid,
  old_state  text,
  new_state  text,
  actor      text NOT NULL,
  detail     jsonb,
  PRIMARY KEY (seq, at)
) PARTITION BY RANGE (at);
ALTER SEQUENCE event_seq OWNED BY event.seq;
CREATE INDEX event_oid ON event (oid);

CREATE TABLE delivery (
  delivery_id  uuid PRIMARY KEY,
  state        text NOT NULL DEFAULT 'QUEUED' CHECK (state IN ('QUEUED', 'RUNNING', 'DONE', 'FAILED')),
  destination  text NOT NULL,
  request      jsonb NOT NULL,
  actor        text NOT NULL,
  created_at   moment NOT NULL DEFAULT now(),
  finished_at  moment
);
CREATE TABLE principal (
  principal_id uuid PRIMARY KEY,
  name         text NOT NULL UNIQUE CHECK (name <> ''),
  kind         text NOT NULL CHECK (kind IN ('user', 'group', 'service')),
  created_at   moment NOT NULL DEFAULT now()
);
CREATE TABLE "grant" (
  principal_id  uuid NOT NULL REFERENCES principal,
  role          text NOT NULL CHECK (role IN ('reader', 'writer', 'operator', 'admin')),
  collection_id uuid REFERENCES collection,
  UNIQUE NULLS NOT DISTINCT (principal_id, role, collection_id)
);

-- Items the planner has to look at again: written by the triggers, emptied by replication.
CREATE TABLE evaluation (
  oid      uuid PRIMARY KEY REFERENCES data_item,
  due_at   moment NOT NULL,
  attempts integer NOT NULL DEFAULT 0
);
CREATE INDEX evaluation_due ON evaluation (due_at);

-- Counts and bytes by state as signed deltas: exact in every transaction, no hot row.
CREATE TABLE tally (
  noun       text NOT NULL,
  storage_id uuid,
  state      text NOT NULL,
  n          bigint NOT NULL,
  bytes      bigint NOT NULL
);
CREATE INDEX tally_storage ON tally (storage_id, state);

CREATE TABLE watch (
  watch_id     uuid PRIMARY KEY,
  storage_id   uuid NOT NULL REFERENCES storage,
  path         text NOT NULL DEFAULT '',
  scheme       text NOT NULL CHECK (scheme ~ '^[a-z][a-z0-9+.-]*$'),
  options      jsonb NOT NULL DEFAULT '{}',
  interval     interval NOT NULL DEFAULT interval '30 seconds' CHECK (interval > interval '0'),
  scan_at      moment NOT NULL,
  created_at   moment NOT NULL DEFAULT now(),
  UNIQUE (storage_id, path)
);
CREATE TABLE watch_entry (
  watch_id uuid NOT NULL REFERENCES watch ON DELETE CASCADE,
  path     text NOT NULL,
  size     bigint NOT NULL,
  mtime    double precision NOT NULL,
  since    moment NOT NULL,
  PRIMARY KEY (watch_id, path)
);

-- The transition table: the one place that says which state may follow which.
CREATE TABLE state_transition (
  noun      text NOT NULL,
  old_state text NOT NULL,
  new_state text NOT NULL,
  PRIMARY KEY (noun, old_state, new_state)
);
INSERT INTO state_transition VALUES
  ('item', 'INITIALISED', 'READY'),
  ('item', 'READY', 'CORRUPTED'),
  ('item', 'READY', 'EXPIRED'),
  ('item', 'CORRUPTED', 'READY'),
  ('item', 'CORRUPTED', 'EXPIRED'),
  ('item', 'EXPIRED', 'READY'),
  ('item', 'EXPIRED', 'DELETED'),
  ('replica', 'PENDING', 'READY'),
  ('replica', 'PENDING', 'MISSING'),
  ('replica', 'PENDING', 'TRASHED'),
  ('replica', 'READY', 'SUSPECT'),
  ('replica', 'READY', 'MISSING'),
  ('replica', 'READY', 'TRASHED'),
  ('replica', 'SUSPECT', 'READY'),
  ('replica', 'SUSPECT', 'CORRUPTED'),
  ('replica', 'SUSPECT', 'MISSING'),
  ('replica', 'SUSPECT', 'TRASHED'),
  ('replica', 'CORRUPTED', 'PENDING'),
  ('replica', 'CORRUPTED', 'TRASHED'),
  ('replica', 'MISSING', 'PENDING'),
  ('replica', 'MISSING', 'SUSPECT'),
  ('replica', 'MISSING', 'TRASHED'),
  ('replica', 'TRASHED', 'READY'),
  ('replica', 'TRASHED', 'SUSPECT'),
  ('replica', 'TRASHED', 'MISSING'),
  ('replica', 'TRASHED', 'DELETED');

-- When a copy is made, deletions that were refused for want of it are looked for by item: of all the
-- replicas that copies were made of, hardly ever one has such.
CREATE INDEX replica_refused ON replica (oid) WHERE delete_after > expires_at;

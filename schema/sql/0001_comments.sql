-- What tables and columns mean; docs/schema.md is written from these (tests/schema/document.py).

COMMENT ON TABLE location IS 'A place with its own failure domain: site, machine room, facility, cloud region.';
COMMENT ON COLUMN location.location_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN location.name IS 'Unique name, as users say it.';
COMMENT ON COLUMN location.facility IS 'Institution or facility that runs the place.';
COMMENT ON COLUMN location.city IS 'City.';
COMMENT ON COLUMN location.country IS 'ISO 3166-1 code of two letters.';
COMMENT ON COLUMN location.created_at IS 'When it was added.';

COMMENT ON TABLE storage IS 'A volume at a location.';
COMMENT ON COLUMN storage.storage_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN storage.name IS 'Unique name, as users say it.';
COMMENT ON COLUMN storage.location_id IS 'Where it stands.';
COMMENT ON COLUMN storage.interface IS 'How it is reached: posix, s3, or one that a plug-in brings.';
COMMENT ON COLUMN storage.class IS 'disk, object or tape.';
COMMENT ON COLUMN storage.root IS 'Absolute folder (posix) or bucket/prefix (s3).';
COMMENT ON COLUMN storage.config IS 'What the interface needs besides; secrets by reference only.';
COMMENT ON COLUMN storage.phase IS 'Resilience class that one verified replica here gives an item.';
COMMENT ON COLUMN storage.mode IS 'read_write, read_only, draining (being emptied), offline or retired (for good).';
COMMENT ON COLUMN storage.managed IS 'Whether the DLM may write and delete here; what is not managed is only read, and released rather than deleted.';
COMMENT ON COLUMN storage.capacity_bytes IS 'Bytes the DLM may use; NULL: the storage is asked how large it is.';
COMMENT ON COLUMN storage.high_watermark IS 'Fill fraction above which freeing starts.';
COMMENT ON COLUMN storage.low_watermark IS 'Fill fraction at which freeing stops.';
COMMENT ON COLUMN storage.concurrency IS 'Transfers at once; NULL: what suits the interface.';
COMMENT ON COLUMN storage.trash_grace IS 'How long trash here can be restored; NULL: DLM_TRASH_GRACE_SECONDS.';
COMMENT ON COLUMN storage.observed_total_bytes IS 'Capacity as the storage last told it.';
COMMENT ON COLUMN storage.observed_used_bytes IS 'Use as the storage last told it, others'' files included.';
COMMENT ON COLUMN storage.observed_at IS 'When it told so.';
COMMENT ON COLUMN storage.rebalance_after IS 'Freeing found nothing to do here; it looks again from then on.';
COMMENT ON COLUMN storage.created_at IS 'When it was added.';
COMMENT ON COLUMN storage.retired_at IS 'When it was retired.';

COMMENT ON TABLE collection IS 'A named set of data items that are handled together; nested.';
COMMENT ON COLUMN collection.collection_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN collection.name IS 'Unique name.';
COMMENT ON COLUMN collection.parent_id IS 'The collection it belongs to.';
COMMENT ON COLUMN collection.metadata IS 'Free metadata.';
COMMENT ON COLUMN collection.created_at IS 'When it was made.';

COMMENT ON TABLE data_item IS 'The logical thing: metadata and one payload, of which replicas are copies.';
COMMENT ON COLUMN data_item.oid IS 'Key, UUIDv7.';
COMMENT ON COLUMN data_item.uri IS 'scheme:relative/path, percent-encoded; unique with the version.';
COMMENT ON COLUMN data_item.version IS 'From 1 on; a changed payload is a new version.';
COMMENT ON COLUMN data_item.uri_bucket IS 'First five hex digits of sha-1(uri), to split work and compare sites.';
COMMENT ON COLUMN data_item.name IS 'Last segment of the uri.';
COMMENT ON COLUMN data_item.state IS 'INITIALISED, READY, CORRUPTED (no good replica is known), EXPIRED or DELETED.';
COMMENT ON COLUMN data_item.kind IS 'file or directory.';
COMMENT ON COLUMN data_item.size IS 'Bytes of the payload.';
COMMENT ON COLUMN data_item.digest IS 'sha256:<hex> of the payload, of its manifest for a directory; a claim while INITIALISED.';
COMMENT ON COLUMN data_item.content_type IS 'Media type found when the payload was read.';
COMMENT ON COLUMN data_item.target_phase IS 'Resilience class that is wanted.';
COMMENT ON COLUMN data_item.phase_weight IS 'Sum over locations of the best verified replica there, as last planned: 4 SOLID, 2 LIQUID, 1 GAS.';
COMMENT ON COLUMN data_item.shortfall IS 'Why the target phase is not reached; NULL: it is.';
COMMENT ON COLUMN data_item.collection_id IS 'The collection it belongs to.';
COMMENT ON COLUMN data_item.owner IS 'Who owns it.';
COMMENT ON COLUMN data_item.metadata IS 'What extractors and users said of it.';
COMMENT ON COLUMN data_item.tags IS 'Tags as key and value.';
COMMENT ON COLUMN data_item.created_at IS 'When it was announced.';
COMMENT ON COLUMN data_item.expires_at IS 'From then on it may be deleted, last copy included; NULL: never.';
COMMENT ON COLUMN data_item.expiry_reason IS 'Why it expires.';

COMMENT ON TABLE manifest_file IS 'The files of a directory payload.';
COMMENT ON COLUMN manifest_file.oid IS 'The item.';
COMMENT ON COLUMN manifest_file.path IS 'Path within the payload, percent-encoded.';
COMMENT ON COLUMN manifest_file.size IS 'Bytes.';
COMMENT ON COLUMN manifest_file.digest IS 'sha256:<hex> of the file.';

COMMENT ON TABLE item_relation IS 'How one item relates to another.';
COMMENT ON COLUMN item_relation.subject_oid IS 'The item that is said something of.';
COMMENT ON COLUMN item_relation.relation IS 'derived_from, supersedes, calibrates or part_of.';
COMMENT ON COLUMN item_relation.object_oid IS 'The item it relates to.';
COMMENT ON COLUMN item_relation.created_at IS 'When it was noted.';

COMMENT ON TABLE replica IS 'One copy of a payload on one storage.';
COMMENT ON COLUMN replica.uid IS 'Key, UUIDv7.';
COMMENT ON COLUMN replica.oid IS 'The item it is a copy of.';
COMMENT ON COLUMN replica.storage_id IS 'Where it lies.';
COMMENT ON COLUMN replica.path IS 'Path below the storage''s root, percent-encoded.';
COMMENT ON COLUMN replica.state IS 'PENDING, READY (bytes observed and matched), SUSPECT, CORRUPTED, MISSING, TRASHED or DELETED.';
COMMENT ON COLUMN replica.size IS 'Bytes: announced while PENDING, observed from READY on.';
COMMENT ON COLUMN replica.digest IS 'sha256:<hex> as observed here.';
COMMENT ON COLUMN replica.mtime IS 'Time of the file in seconds since 1970, as the storage told it at registration.';
COMMENT ON COLUMN replica.created_at IS 'When it was announced or planned.';
COMMENT ON COLUMN replica.checked_at IS 'When its bytes were last read and matched.';
COMMENT ON COLUMN replica.accessed_at IS 'When it was last asked for; the coldest leave first.';
COMMENT ON COLUMN replica.expires_at IS 'From then on it does not count and may be deleted once others suffice; NULL: never.';
COMMENT ON COLUMN replica.expiry_reason IS 'Why it expires.';
COMMENT ON COLUMN replica.delete_after IS 'Next try to delete it: expires_at, or later after a refusal.';
COMMENT ON COLUMN replica.excluded_until IS 'It is not used as a source, nor made again, before then.';
COMMENT ON COLUMN replica.deletion_id IS 'The newest certificate for its deletion.';
COMMENT ON COLUMN replica.trashed_at IS 'When its bytes were out of the way, in the trash; the grace runs from then.';
COMMENT ON COLUMN replica.absent_at IS 'When its bytes were confirmed absent.';
COMMENT ON COLUMN replica.released_at IS 'When it was given back to its owner, bytes untouched.';

COMMENT ON TABLE policy_version IS 'A policy file as it was approved.';
COMMENT ON COLUMN policy_version.policy_version_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN policy_version.content_hash IS 'sha-256 (hex) of the content.';
COMMENT ON COLUMN policy_version.content IS 'The file.';
COMMENT ON COLUMN policy_version.actor IS 'Who approved it.';
COMMENT ON COLUMN policy_version.created_at IS 'When.';

COMMENT ON TABLE rule IS 'One rule of a policy version.';
COMMENT ON COLUMN rule.rule_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN rule.policy_version_id IS 'The file it stands in.';
COMMENT ON COLUMN rule.line IS 'The line it starts at.';
COMMENT ON COLUMN rule.name IS 'Name, unique in the file.';
COMMENT ON COLUMN rule.definition IS 'The parsed rule.';

COMMENT ON TABLE hold IS 'Forbids deletion of what it matches until it ends; matches by exactly one of item, collection, prefix.';
COMMENT ON COLUMN hold.hold_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN hold.oid IS 'The item it is on.';
COMMENT ON COLUMN hold.collection_id IS 'The collection it is on, nested ones included.';
COMMENT ON COLUMN hold.uri_prefix IS 'The start of the uris it is on.';
COMMENT ON COLUMN hold.reason IS 'Why.';
COMMENT ON COLUMN hold.actor IS 'Who placed it.';
COMMENT ON COLUMN hold.created_at IS 'When it was placed.';
COMMENT ON COLUMN hold.ends_at IS 'When it ends; NULL: not by itself.';

COMMENT ON TABLE plan IS 'A list of proposed operations.';
COMMENT ON COLUMN plan.plan_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN plan.kind IS 'replication, expiry or rebalance.';
COMMENT ON COLUMN plan.content_hash IS 'sha-256 (hex) of the list.';
COMMENT ON COLUMN plan.operations IS 'How many operations.';
COMMENT ON COLUMN plan.bytes IS 'How many bytes.';
COMMENT ON COLUMN plan.actor IS 'Who made it.';
COMMENT ON COLUMN plan.created_at IS 'When it was made.';
COMMENT ON COLUMN plan.applied_at IS 'When it was applied.';

COMMENT ON TABLE operation IS 'One queued unit of file work; partitioned by month through its key.';
COMMENT ON COLUMN operation.operation_id IS 'Key, UUIDv7: tells when it was queued.';
COMMENT ON COLUMN operation.kind IS 'admit, copy, verify, trash, purge or restore.';
COMMENT ON COLUMN operation.state IS 'QUEUED, RUNNING (leased), DONE, FAILED (for good, can be retried) or CANCELLED.';
COMMENT ON COLUMN operation.oid IS 'The item.';
COMMENT ON COLUMN operation.uid IS 'The replica it acts on or makes.';
COMMENT ON COLUMN operation.source_uid IS 'The replica a copy was read from.';
COMMENT ON COLUMN operation.plan_id IS 'The plan that asked for it.';
COMMENT ON COLUMN operation.reason IS 'Why it was queued.';
COMMENT ON COLUMN operation.actor IS 'Who queued it.';
COMMENT ON COLUMN operation.priority IS 'Lower goes first.';
COMMENT ON COLUMN operation.due_at IS 'Not before then.';
COMMENT ON COLUMN operation.attempts IS 'Tries so far.';
COMMENT ON COLUMN operation.lease_token IS 'Of who holds it now.';
COMMENT ON COLUMN operation.lease_until IS 'When it is due again unless its holder reports.';
COMMENT ON COLUMN operation.worker IS 'Host and process that last took it.';
COMMENT ON COLUMN operation.error_code IS 'Code of the last error.';
COMMENT ON COLUMN operation.error IS 'Text of the last error.';
COMMENT ON COLUMN operation.created_at IS 'When it was queued.';
COMMENT ON COLUMN operation.finished_at IS 'When it ended.';

COMMENT ON TABLE deletion IS 'Certificates: one for each step of a deletion; never changed. Partitioned by month through the key.';
COMMENT ON COLUMN deletion.deletion_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN deletion.step IS 'trash, purge or release.';
COMMENT ON COLUMN deletion.basis IS 'item_expired or replica_expired.';
COMMENT ON COLUMN deletion.uid IS 'The replica.';
COMMENT ON COLUMN deletion.oid IS 'Its item.';
COMMENT ON COLUMN deletion.storage_id IS 'Its storage.';
COMMENT ON COLUMN deletion.from_state IS 'The state it was in.';
COMMENT ON COLUMN deletion.survivors IS 'The verified copies that are left, with place, weight and when each was last read.';
COMMENT ON COLUMN deletion.survivor_weight IS 'What they give, as data_item.phase_weight.';
COMMENT ON COLUMN deletion.target_phase IS 'What was wanted.';
COMMENT ON COLUMN deletion.holds_examined IS 'How many holds were looked at.';
COMMENT ON COLUMN deletion.reason IS 'Why.';
COMMENT ON COLUMN deletion.plan_id IS 'The plan that asked for it.';
COMMENT ON COLUMN deletion.actor IS 'Who.';
COMMENT ON COLUMN deletion.proved_at IS 'When it was proven.';
COMMENT ON COLUMN deletion.valid_until IS 'Until when the proof is good.';
COMMENT ON COLUMN deletion.xid IS 'The transaction that wrote it.';

COMMENT ON TABLE event IS 'The append-only feed of changes; partitioned by month. Read it through the view event_feed.';
COMMENT ON COLUMN event.seq IS 'Order of writing, not of commit.';
COMMENT ON COLUMN event.xid IS 'The transaction; the feed shows only what lies below the oldest one running. A reader''s place is (xid, seq).';
COMMENT ON COLUMN event.at IS 'When it was written.';
COMMENT ON COLUMN event.noun IS 'item, replica, storage, hold or operation.';
COMMENT ON COLUMN event.action IS 'created, state, changed, mode, …';
COMMENT ON COLUMN event.oid IS 'The item concerned.';
COMMENT ON COLUMN event.uid IS 'The replica concerned.';
COMMENT ON COLUMN event.storage_id IS 'The storage concerned.';
COMMENT ON COLUMN event.old_state IS 'State or mode before.';
COMMENT ON COLUMN event.new_state IS 'State or mode after.';
COMMENT ON COLUMN event.actor IS 'Who did it.';
COMMENT ON COLUMN event.detail IS 'What else changed.';

COMMENT ON TABLE delivery IS 'Handing out data to a user.';
COMMENT ON COLUMN delivery.delivery_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN delivery.state IS 'QUEUED, RUNNING, DONE or FAILED.';
COMMENT ON COLUMN delivery.destination IS 'Where to.';
COMMENT ON COLUMN delivery.request IS 'What was asked for.';
COMMENT ON COLUMN delivery.actor IS 'Who asked.';
COMMENT ON COLUMN delivery.created_at IS 'When.';
COMMENT ON COLUMN delivery.finished_at IS 'When it ended.';

COMMENT ON TABLE principal IS 'Who may do something: a user, a group or a service.';
COMMENT ON COLUMN principal.principal_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN principal.name IS 'Unique name.';
COMMENT ON COLUMN principal.kind IS 'user, group or service.';
COMMENT ON COLUMN principal.created_at IS 'When it was added.';

COMMENT ON TABLE "grant" IS 'What a principal may do, everywhere or in a collection.';
COMMENT ON COLUMN "grant".principal_id IS 'Who.';
COMMENT ON COLUMN "grant".role IS 'reader, writer, operator or admin.';
COMMENT ON COLUMN "grant".collection_id IS 'Where; NULL: everywhere.';

COMMENT ON TABLE evaluation IS 'Items whose copies the planner has to look at; written by triggers, emptied by replication.';
COMMENT ON COLUMN evaluation.oid IS 'The item.';
COMMENT ON COLUMN evaluation.due_at IS 'Not before then.';
COMMENT ON COLUMN evaluation.attempts IS 'Looks that did not help so far.';

COMMENT ON TABLE tally IS 'Counts and bytes by state as signed deltas, to be summed; exact in every transaction.';
COMMENT ON COLUMN tally.noun IS 'item or replica.';
COMMENT ON COLUMN tally.storage_id IS 'The storage of replicas; NULL for items.';
COMMENT ON COLUMN tally.state IS 'The state.';
COMMENT ON COLUMN tally.n IS 'How many more, or fewer.';
COMMENT ON COLUMN tally.bytes IS 'Their bytes.';

COMMENT ON TABLE watch IS 'A watched folder: what appears there and stops growing is registered.';
COMMENT ON COLUMN watch.watch_id IS 'Key, UUIDv7.';
COMMENT ON COLUMN watch.storage_id IS 'The storage.';
COMMENT ON COLUMN watch.path IS 'The folder, percent-encoded; empty: the root.';
COMMENT ON COLUMN watch.scheme IS 'Scheme of the uris that are made.';
COMMENT ON COLUMN watch.options IS 'How paths become uris, and other terms.';
COMMENT ON COLUMN watch.interval IS 'How often it is looked at.';
COMMENT ON COLUMN watch.scan_at IS 'The next look.';
COMMENT ON COLUMN watch.created_at IS 'When it was added.';

COMMENT ON TABLE watch_entry IS 'What a watched folder showed and was not registered yet.';
COMMENT ON COLUMN watch_entry.watch_id IS 'The watch.';
COMMENT ON COLUMN watch_entry.path IS 'Path on the storage, percent-encoded.';
COMMENT ON COLUMN watch_entry.size IS 'Bytes at the last look.';
COMMENT ON COLUMN watch_entry.mtime IS 'Time of the file at the last look, seconds since 1970.';
COMMENT ON COLUMN watch_entry.since IS 'Since when size and time are the same.';

COMMENT ON TABLE state_transition IS 'The one place that says which state may follow which.';
COMMENT ON COLUMN state_transition.noun IS 'item or replica.';
COMMENT ON COLUMN state_transition.old_state IS 'From.';
COMMENT ON COLUMN state_transition.new_state IS 'To.';

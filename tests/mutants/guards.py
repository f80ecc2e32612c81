"""Mutants of what guards files against late workers and strangers, and good bytes against us."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

GUARDS = (
    Mutant(
        "late-worker-moves",
        "dlm_core/lifecycle/trash.py",
        '[p for p in pairs if p[0]["operation_id"] in held]',
        "list(pairs)",
        "a worker whose lease ran out moves what lies there now",
        ("lifecycle/test_late_workers.py::test_a_late_trashing_does_not_take_a_newer_copy",),
    ),
    Mutant(
        "cut-worker-moves",
        "dlm_core/lifecycle/trash.py",
        "partial(one, guard.around(adapter))",
        "partial(one, adapter)",
        "a worker whose locks are gone goes on moving what is newer",
        ("lifecycle/test_cut_workers.py::test_a_trashing_that_was_cut_does_not_take_newer_copies",),
    ),
    Mutant(
        "cut-worker-sets-aside",
        "dlm_core/lifecycle/quarantine.py",
        "uid: _quarantine(guarded, details[uid]",
        "uid: _quarantine(storage, details[uid]",
        "a worker whose locks are gone sets newer copies aside",
        (
            "lifecycle/test_cut_workers.py::test_a_look_that_was_cut_does_not_set_newer_copies_aside",
        ),
    ),
    Mutant(
        "whole-lease-quiet",
        "dlm_core/lifecycle/fence.py",
        "asked) - lease / 2",
        "asked)",
        "what begins at a lease's very end is not held up by a lock that is gone",
        ("lifecycle/test_cut_workers.py::test_the_second_half_of_a_lease_is_not_quiet",),
    ),
    Mutant(
        "slept-over-the-answer",
        "dlm_core/lifecycle/fence.py",
        "asked + quiet, ticks + quiet.total_seconds())",
        "clock() + quiet, time.monotonic() + quiet.total_seconds())",
        "a worker that is suspended with the answer in its hands takes its lease for young",
        ("lifecycle/test_cut_workers.py::test_who_sleeps_over_the_answer_has_slept",),
    ),
    Mutant(
        "one-clock-believed",
        "dlm_core/lifecycle/fence.py",
        "self._clock() < self._until and time",
        "time",
        "a machine that was suspended takes its lease for young",
        ("lifecycle/test_cut_workers.py::test_one_clock_that_went_on_is_enough_to_ask",),
    ),
    Mutant(
        "newer-object-deleted",
        "dlm_core/storages/s3.py",
        "if now is not None and _version(now) != _version(one):",
        "if now is None:",
        "a slow rename deletes the object that took the place of what it copied",
        ("storages/test_s3.py::test_what_was_put_there_during_a_rename_is_not_deleted",),
    ),
    Mutant(
        "copied-object-replaces",
        "dlm_core/storages/s3.py",
        "obstore.copy(store, source, key, overwrite=False)",
        "obstore.copy(store, source, key)",
        "a rename replaces the object that came to its destination after the look there",
        (
            "storages/test_s3.py::test_a_rename_replaces_nothing_that_came_after_its_look",
            "storages/test_s3.py::test_a_copy_by_the_server_replaces_nothing_that_came_after_its_look",
        ),
    ),
    Mutant(
        "late-look-sets-aside",
        "dlm_core/lifecycle/quarantine.py",
        "uids = [uid for operation_id, uid in pairs if operation_id in held]",
        "uids = [uid for _, uid in pairs]",
        "a worker whose lease ran out sets a newer copy aside",
        ("lifecycle/test_late_workers.py::test_a_late_look_does_not_set_a_newer_copy_aside",),
    ),
    Mutant(
        "trashed-copy-set-aside",
        "dlm_core/lifecycle/quarantine.py",
        'if now[uid]["state"] == details[uid]["state"]',
        "if True",
        "what lies where a trashed copy was is set aside for it",
        (
            "lifecycle/test_late_workers.py"
            "::test_a_look_does_not_set_aside_what_lies_where_a_trashed_copy_was",
        ),
    ),
    Mutant(
        "stranger-trashed",
        "dlm_core/lifecycle/trash.py",
        "_WITHOUT_BYTES = (ReplicaState.MISSING, ReplicaState.CORRUPTED)",
        "_WITHOUT_BYTES: tuple[str, ...] = ()",
        "a lost copy takes somebody's file to the trash",
        (
            "lifecycle/test_strangers.py"
            "::test_a_lost_copy_that_goes_takes_no_strangers_file_with_it",
        ),
    ),
    Mutant(
        "stranger-restored",
        "dlm_core/lifecycle/trash.py",
        "return seen if moved or _are_payload(seen, row) else None",
        "return seen",
        "a restore takes somebody's file for its own",
        ("lifecycle/test_strangers.py::test_a_restore_that_finds_a_stranger_leaves_it_alone",),
    ),
    Mutant(
        "stranger-condemned",
        "dlm_core/lifecycle/verify.py",
        '    if row["state"] in _LOST:\n        # its own',
        "    if False:\n        # its own",
        "somebody's file where a lost copy was is taken for it",
        ("lifecycle/test_strangers.py::test_a_look_for_a_lost_copy_does_not_set_a_stranger_aside",),
    ),
    Mutant(
        "stranger-for-the-trash",
        "dlm_core/lifecycle/trash.py",
        "if _is_half_way(storage, path, trashed, row):",
        "if storage.stat(path) is not None:",
        "a trashing done again takes somebody's file and loses the trash",
        (
            "lifecycle/test_strangers.py"
            "::test_a_trashing_that_is_done_again_leaves_a_stranger_alone",
        ),
    ),
    Mutant(
        "quarantine-forgotten",
        "dlm_core/lifecycle/verify.py",
        "good = find_good(storage, [details[uid] for uid in lost]) if lost else {}",
        "good: dict[uuid.UUID, str] = {}",
        "good bytes stay in quarantine",
        ("lifecycle/test_quarantine.py::test_what_is_set_aside_is_read_once_more_there",),
    ),
    Mutant(
        "quarantine-believed",
        "dlm_core/lifecycle/quarantine.py",
        "            if is_payload(storage, path, row):",
        "            if True:",
        "what lies in quarantine is brought back unread",
        ("lifecycle/test_quarantine.py::test_bytes_that_are_really_damaged_stay_aside",),
    ),
    Mutant(
        "lost-without-a-look",
        "dlm_core/lifecycle/decide.py",
        "if ReplicaState.CORRUPTED in states and item.state",
        "if False and item.state",
        "an item is called lost before quarantine is looked at",
        (
            "lifecycle/test_quarantine.py"
            "::test_no_item_is_called_lost_before_quarantine_is_looked_at",
        ),
    ),
    Mutant(
        "lost-for-good",
        "dlm_core/lifecycle/replicate.py",
        "if decision.search]",
        "if False]",
        "nobody looks for what is lost",
        ("lifecycle/test_quarantine.py::test_a_lost_item_is_looked_for_again_and_again",),
    ),
    Mutant(
        "copy-on-a-retired-storage",
        "schema/sql/0005_guards.sql",
        "WHERE s.mode = 'retired' AND",
        "WHERE false AND",
        "a replica is made on a retired storage",
        ("schema/test_guards.py::test_a_retired_storage_takes_no_replica",),
    ),
    Mutant(
        "retires-beside-a-copy",
        "schema/sql/0005_guards.sql",
        "PERFORM FROM storage WHERE storage_id = NEW.storage_id FOR UPDATE;",
        "NULL;",
        "a storage retires while a replica is being made there",
        ("schema/test_guards.py::test_of_a_copy_and_a_retirement_at_once_the_second_is_refused",),
    ),
    Mutant(
        "only-direct-members",
        "dlm_core/catalogue/plans.py",
        "UNION SELECT t.top, c.collection_id FROM tree t JOIN collection c ON c.parent_id = "
        "t.collection_id),",
        "UNION SELECT t.top, t.collection_id FROM tree t),",
        "the share of a collection is of its direct members",
        ("lifecycle/test_limits.py::test_the_share_of_a_collection_is_of_all_that_lies_in_it",),
    ),
    Mutant(
        "drained-for-good",
        "dlm_core/catalogue/replicas.py",
        "SET expires_at = own_expires_at, expiry_reason = own_expiry_reason,",
        "SET expires_at = NULL, expiry_reason = NULL,",
        "a drain that is called off takes a replica's own expiry away",
        ("catalogue/test_places.py::test_a_drain_does_not_wait_for_a_replicas_own_later_expiry",),
    ),
    Mutant(
        "doubt-for-ever",
        "dlm_core/lifecycle/check.py",
        "count = checks.look_again(connection, now)",
        "count = 0",
        "a doubted copy whose look failed waits for an operator",
        (
            "lifecycle/test_check.py"
            "::test_a_doubted_copy_whose_look_failed_is_looked_at_again_by_itself",
        ),
    ),
    Mutant(
        "offline-is-read",
        "dlm_core/storages/cold.py",
        "        if self._until.get(path, 0.0) > time.monotonic() or path in self.look([path]):\n",
        "        if True:\n",
        "a stub is read as if its zeros were the bytes",
        ("storages/test_stage_command.py::test_any_name_is_staged_in_one_call",),
    ),
    Mutant(
        "stub-is-online",
        "dlm_core/storages/stage_command.py",
        "status.st_blocks * 512 >= status.st_size",
        "status.st_size >= 0",
        "what a migration left behind counts as the file",
        ("storages/test_stage_command.py::test_any_name_is_staged_in_one_call",),
    ),
    Mutant(
        "staged-one-by-one",
        "dlm_core/lifecycle/staging.py",
        "        cold.stage(paths)\n",
        "        for path in paths:\n            cold.stage([path])\n",
        "a call a file: a tape goes to and fro",
        (
            "lifecycle/test_staging.py"
            "::test_a_copy_from_tape_waits_for_one_call_and_is_made_when_all_is_there",
        ),
    ),
    Mutant(
        "asked-at-every-look",
        "dlm_core/catalogue/staging.py",
        'row["due"] or row["path"] in fresh',
        "True",
        "what is on its way is asked for again and again",
        (
            "lifecycle/test_staging.py"
            "::test_a_copy_from_tape_waits_for_one_call_and_is_made_when_all_is_there",
        ),
    ),
    Mutant(
        "waiting-is-a-try",
        "dlm_core/lifecycle/work.py",
        "text, again, counted=False",
        "text, again, counted=True",
        "who waits for a tape runs out of tries",
        (
            "lifecycle/test_staging.py"
            "::test_a_copy_from_tape_waits_for_one_call_and_is_made_when_all_is_there",
        ),
    ),
    Mutant(
        "stub-is-damage",
        "dlm_core/lifecycle/verify.py",
        "error = believed(storage, files[look.operation_id], error)",
        "pass",
        "a file that migrates while it is read is called damaged",
        (
            "lifecycle/test_staging.py"
            "::test_a_file_that_goes_offline_while_it_is_read_is_not_taken_for_damaged",
        ),
    ),
    Mutant(
        "second-look-at-a-stub",
        "dlm_core/lifecycle/verify.py",
        'for row in targets if row["state"] == ReplicaState.SUSPECT}',
        "for row in targets if False}",
        "a storage that lies about what is online has a good copy condemned",
        (
            "lifecycle/test_staging.py"
            "::test_a_storage_that_lies_makes_nothing_corrupted_before_it_was_staged_anew",
        ),
    ),
    Mutant(
        "old-word-of-a-tape",
        "dlm_core/lifecycle/survivors.py",
        'if row["uid"] in away and row["checked_at"] < oldest}',
        "if False}",
        "an offline survivor counts however long ago it was read",
        (
            "lifecycle/test_staging.py"
            "::test_a_survivor_read_too_long_ago_stops_the_purge_until_it_is_read",
        ),
    ),
    Mutant(
        "tape-read-by-schedule",
        "dlm_core/catalogue/checks.py",
        "AND (verify_bytes_per_day IS NOT NULL OR NOT",
        "AND (true OR NOT",
        "scheduled checks recall a whole tape",
        ("lifecycle/test_staging.py::test_scheduled_checks_recall_no_more_than_their_budget",),
    ),
    Mutant(
        "claim-proven-as-a-whole",
        "dlm_core/lifecycle/trash.py",
        "for operations in _by_storage(context, claim):",
        "for operations in [claim.operations]:",
        "a hold that is placed while one storage is at work stops nothing on the next",
        (
            "lifecycle/test_purges.py"
            "::test_what_happens_during_a_purge_stops_it_on_the_next_storage",
        ),
    ),
    Mutant(
        "old-proof-goes-on",
        "dlm_core/lifecycle/trash.py",
        'if row["managed"] and context.clock() >= until:',
        "if False:",
        "bytes are removed on a proof that ran out",
        ("lifecycle/test_purges.py::test_nothing_is_removed_once_its_proof_is_too_old",),
    ),
    Mutant(
        "unseen-survivor-counts",
        "dlm_core/lifecycle/trash.py",
        "if not seen.issuperset(p.survivors)}",
        "if False}",
        "what became a survivor after the look stands in the certificate",
        ("lifecycle/test_purges.py::test_a_survivor_that_nobody_looked_at_is_none",),
    ),
    Mutant(
        "late-look-ends-a-doubt",
        "dlm_core/lifecycle/verify.py",
        "ready, now, only_from=[ReplicaState.READY])",
        "ready, now)",
        "a verdict that is written late makes a copy READY that was doubted since",
        ("lifecycle/test_late_workers.py::test_a_late_look_does_not_end_a_newer_doubt",),
    ),
    Mutant(
        "object-goes-with-its-prefix",
        "dlm_core/storages/s3.py",
        "if below and self._is_object(path):",
        "if False:",
        "the removal of an object takes what lies below its name",
        ("storages/test_s3.py::test_a_file_goes_without_what_only_begins_with_its_name",),
    ),
    Mutant(
        "shared-files-let-in",
        "dlm_core/lifecycle/admit.py",
        "mine = _unless_shared(connection, mine)",
        "mine = [*mine]",
        "a file in another item's directory is an item of its own",
        ("lifecycle/test_register.py::test_what_is_part_of_another_payload_is_not_admitted",),
    ),
    Mutant(
        "copy-in-a-directory",
        "dlm_core/lifecycle/replicate.py",
        "inside = places_inside(connection, [record for _, record in fresh], trees)",
        "inside: list[tuple[dict[str, Any], str]] = []",
        "a copy is put into another item's directory",
        ("lifecycle/test_paths.py::test_no_copy_lies_in_that_of_another_item",),
    ),
    Mutant(
        "doubt-cancelled",
        "dlm_core/lifecycle/verify.py",
        'if row["state"] == ReplicaState.SUSPECT and storage["mode"] == StorageMode.OFFLINE:',
        "if False:",
        "a look at a doubted copy is cancelled because its storage is away",
        ("lifecycle/test_check.py::test_a_doubt_outlasts_the_absence_of_its_storage",),
    ),
    Mutant(
        "index-on-the-way-in",
        "dlm_core/catalogue/replicas.py",
        "THEN r.check_from ELSE CAST(:now AS timestamptz) END",
        "THEN CAST(:now AS timestamptz) ELSE CAST(:now AS timestamptz) END",
        "letting in moves the next check and writes an entry in every index",
        ("lifecycle/test_register.py::test_the_next_check_counts_from_a_late_admission",),
    ),
    Mutant(
        "uncheckable-stays-due",
        "dlm_core/lifecycle/check.py",
        "    checks.put_off(connection, now)\n",
        "",
        "what cannot be checked starts run after run",
        ("lifecycle/test_check.py::test_what_cannot_be_checked_is_put_off",),
    ),
    Mutant(
        "clocks-not-compared",
        "dlm_core/catalogue/engine.py",
        "if max(ahead, behind) > tolerance:",
        "if False:",
        "a machine whose clock runs ahead lets expire what is not due",
        ("catalogue/test_clocks.py::test_a_machine_whose_clock_is_off_does_nothing",),
    ),
    Mutant(
        "worker-killer-for-ever",
        "dlm_core/catalogue/operations.py",
        "CASE WHEN o.attempts < :most THEN 'QUEUED' ELSE 'FAILED' END",
        "CASE WHEN o.attempts < :most THEN 'QUEUED' ELSE 'QUEUED' END",
        "an operation that ends its workers is tried for ever",
        (
            "catalogue/test_operations.py::test_what_lost_its_worker_at_the_last_try_has_failed",
            "lifecycle/test_cut_workers.py::test_a_copy_that_ends_its_workers_is_given_up",
        ),
    ),
    Mutant(
        "worker-killer-in-company",
        "dlm_core/catalogue/operations.py",
        "doubted OR first_value(doubted) OVER queue AS alone",
        "false AS alone",
        "what ends workers ends the work on all that was claimed with it",
        ("catalogue/test_operations.py::test_what_lost_its_worker_twice_is_claimed_by_itself",),
    ),
    Mutant(
        "copy-withdrawn",
        "dlm_core/catalogue/announcements.py",
        "o.kind <> 'admit'",
        "o.kind = 'purge'",
        "a copy that is being made is withdrawn like an announcement",
        ("lifecycle/test_withdraw.py::test_what_was_let_in_is_not_withdrawn",),
    ),
    Mutant(
        "owners-file-trashed",
        "dlm_core/lifecycle/strangers.py",
        """    if entry.size != row["size"]:
        return True
""",
        """    return False
""",
        "what an owner made of a registered file goes with the item that it was",
        (
            "lifecycle/test_strangers.py::"
            "test_what_its_owner_made_of_a_registered_file_is_the_owners",
        ),
    ),
    Mutant(
        "others-in-a-directory-trashed",
        "dlm_core/lifecycle/strangers.py",
        "    others = sorted(entry.path for entry in found if entry.path not in known)\n",
        "    found, others = [entry for entry in found if entry.path in known], []\n",
        "files that others put into a directory payload go with it",
        (
            "lifecycle/test_strangers.py::"
            "test_files_of_others_in_a_directory_payload_do_not_go_with_it",
        ),
    ),
    Mutant(
        "owners-directory-trashed",
        "dlm_core/lifecycle/strangers.py",
        "return resized or (touched and readable and not is_payload(storage, path, row))",
        "return False",
        "what an owner made of files in a registered directory goes with the item that it was",
        (
            "lifecycle/test_strangers.py::"
            "test_what_its_owner_made_of_a_registered_directory_is_the_owners",
        ),
    ),
)

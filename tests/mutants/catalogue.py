"""Mutants of the questions to the catalogue: proofs, plans, the queue."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

CATALOGUE = (
    Mutant(
        "proof-without-replica-locks",
        "dlm_core/catalogue/deletions.py",
        ('            ORDER BY uid FOR NO KEY UPDATE""",\n    )\n    if due'),
        ('            ORDER BY uid""",\n    )\n    if due'),
        "survivors are not locked while a deletion is proven",
        (
            "lifecycle/test_interleavings.py::test_a_deletion_waits_for_what_is_found_of_its_survivor",
        ),
        "peers: survivors looked at, not locked",
    ),
    Mutant(
        "taken-back-too-late",
        "dlm_core/catalogue/deletions.py",
        "    if due is not None:",
        "    if False:",
        "what was due before its lock was had is deleted, due or not",
        (
            "lifecycle/test_interleavings.py::test_an_expiry_that_is_taken_back_while_its_deletion_waits_is_none",
        ),
    ),
    Mutant(
        "proof-without-item-locks",
        "dlm_core/catalogue/deletions.py",
        ('            ORDER BY oid FOR NO KEY UPDATE""",\n    )\n    run('),
        ('            ORDER BY oid""",\n    )\n    run('),
        "planning and deletion of one item do not take turns",
        (("lifecycle/test_interleavings.py::test_a_deletion_waits_for_a_target_that_is_raised"),),
        "Rucio: a source deleted while another rule was stuck",
    ),
    Mutant(
        "proof-without-hold-lock",
        "dlm_core/catalogue/deletions.py",
        ('    run(connection, "LOCK TABLE hold IN SHARE MODE")\n    run(connection, "DROP'),
        '    run(connection, "DROP',
        "a hold slips in between proof and certificate",
        (
            (
                "lifecycle/test_interleavings.py::test_a_deletion_waits_for_a_hold_that_is_being_placed"
            ),
        ),
    ),
    Mutant(
        "expiry-without-hold-lock",
        "dlm_core/catalogue/expiring.py",
        '    run(connection, "LOCK TABLE hold IN SHARE MODE")\n    items',
        "    items",
        "a hold that is being placed does not keep its item from expiring in good order",
        ("lifecycle/test_interleavings.py::test_a_hold_placed_first_keeps_the_item",),
    ),
    Mutant(
        "pending-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "WHERE r.state = 'READY' AND s.mode",
        "WHERE r.state IN ('READY', 'PENDING') AND s.mode",
        "a copy under way counts as a survivor",
        ("lifecycle/test_survivors.py::test_only_what_was_read_and_matched_is_a_survivor",),
        "SKA DLM 1: unfinished copies count as resilience",
    ),
    Mutant(
        "suspect-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "WHERE r.state = 'READY' AND s.mode",
        "WHERE r.state IN ('READY', 'SUSPECT') AND s.mode",
        "a doubted copy counts as a survivor",
        ("lifecycle/test_survivors.py::test_only_what_was_read_and_matched_is_a_survivor",),
        "SKA DLM 1: so does a CORRUPTED sibling",
    ),
    Mutant(
        "trashed-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "WHERE r.state = 'READY' AND s.mode",
        "WHERE r.state IN ('READY', 'TRASHED') AND s.mode",
        "a copy in the trash counts as a survivor",
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_two_deletions_of_two_copies_of_one_item_take_turns"
            ),
            "lifecycle/test_survivors.py::test_only_what_was_read_and_matched_is_a_survivor",
        ),
        "SKA DLM 6: DELETED copies are counted",
    ),
    Mutant(
        "two-volumes-are-two-locations",
        "dlm_core/catalogue/deletions.py",
        "FROM good GROUP BY oid, location_id",
        "FROM good GROUP BY oid, storage_id",
        "survivors on two volumes of one location count twice",
        ("lifecycle/test_survivors.py::test_two_volumes_of_one_location_are_one_survivor",),
        "SKA DLM 5: no failure domains",
    ),
    Mutant(
        "offline-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "s.mode IN ('read_write', 'read_only')",
        "s.mode IN ('read_write', 'read_only', 'offline')",
        "a copy that nobody can reach counts as a survivor",
        ("lifecycle/test_survivors.py::test_only_what_was_read_and_matched_is_a_survivor",),
    ),
    Mutant(
        "expiring-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "     AND (r.expires_at IS NULL OR r.expires_at > known.now)\n",
        "",
        "a copy that is leaving itself counts as a survivor",
        ("lifecycle/test_survivors.py::test_only_what_was_read_and_matched_is_a_survivor",),
    ),
    Mutant(
        "hold-not-looked-at",
        "dlm_core/catalogue/deletions.py",
        '    if row["held"]:',
        "    if False:",
        "a proof ignores the holds",
        ("lifecycle/test_lifecycle.py::test_a_hold_keeps_item_and_trash",),
    ),
    Mutant(
        "expiry-ignores-holds",
        "dlm_core/catalogue/expiring.py",
        ('_UNHELD = " AND NOT EXISTS (SELECT FROM holds_on(i.oid, i.uri, i.collection_id))"'),
        '_UNHELD = ""',
        "items under a hold are expired",
        ("lifecycle/test_lifecycle.py::test_a_hold_keeps_item_and_trash",),
    ),
    Mutant(
        "target-not-needed",
        "dlm_core/catalogue/deletions.py",
        'row["survivor_weight"] < row["needed"]:',
        "False:",
        (
            "a copy goes though the others do not reach the target: a drain trashes before "
            "the copy is made"
        ),
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_a_replica_expires_only_once_the_copies_it_assumes_are_there"
            ),
            ("lifecycle/test_lifecycle.py::test_a_drained_storage_ends_empty_and_may_then_retire"),
        ),
        "MinIO: expires objects whose tiering never happened",
    ),
    Mutant(
        "last-copy-goes",
        "dlm_core/catalogue/deletions.py",
        '    elif basis == "replica_expired" and not survivors:',
        "    elif False:",
        "the last copy goes because its replica's time is over",
        ("lifecycle/test_lifecycle.py::test_the_last_copy_never_goes_with_its_replica",),
        "SKA DLM 2 and 3: no copies left is taken as GAS",
    ),
    Mutant(
        "item-deleted-with-copies",
        "dlm_core/catalogue/deletions.py",
        (
            "              AND NOT EXISTS (SELECT FROM replica r WHERE r.oid = i.oid AND "
            'r.state <> \'DELETED\')""",'
        ),
        '           """,',
        "an item is DELETED with its first replica",
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_an_expired_item_goes_in_two_steps_with_certificates"
            ),
        ),
        "SKA DLM 17",
    ),
    Mutant(
        "planned-replica-of-any",
        "dlm_core/catalogue/expiring.py",
        "  SELECT FROM plan_entry k WHERE k.plan_id = :plan AND k.uid = r.uid)",
        "  SELECT FROM plan_entry k WHERE k.plan_id = :plan)",
        "an approved plan lets other replicas through than it names",
        (("lifecycle/test_limits.py::test_an_approved_plan_touches_no_other_replica"),),
    ),
    Mutant(
        "due-before-grace",
        "dlm_core/catalogue/operations.py",
        " AND due_at <= :now {picky}",
        " {picky}",
        "work is taken before it is due: a purge before its grace ends",
        ("lifecycle/test_lifecycle.py::test_trash_can_be_restored_until_its_grace_ends",),
    ),
    Mutant(
        "claim-without-lock",
        "dlm_core/catalogue/operations.py",
        (" LIMIT :limit FOR UPDATE SKIP LOCKED),\n           chosen"),
        (" LIMIT :limit),\n           chosen"),
        "two workers claim the same operations",
        (("catalogue/test_operations.py::test_what_one_claims_another_does_not_wait_for_nor_get"),),
        "Rucio: reapers fight each other",
    ),
    Mutant(
        "claim-waits",
        "dlm_core/catalogue/operations.py",
        (" LIMIT :limit FOR UPDATE SKIP LOCKED),\n           chosen"),
        (" LIMIT :limit FOR UPDATE),\n           chosen"),
        "a worker waits for another's claim",
        (("catalogue/test_operations.py::test_what_one_claims_another_does_not_wait_for_nor_get"),),
        "SKA DLM 9: no row locking",
    ),
    Mutant(
        "lease-not-set",
        "dlm_core/catalogue/operations.py",
        "        until=now + lease,\n",
        "        until=now,\n",
        "a claim is held by nobody",
        ("catalogue/test_operations.py::test_a_lease_holds_until_its_end",),
    ),
    Mutant(
        "lease-never-ends",
        "dlm_core/catalogue/operations.py",
        ("SELECT operation_id FROM operation WHERE state = 'RUNNING' AND lease_until < :now"),
        "SELECT operation_id FROM operation WHERE state = 'RUNNING' AND false",
        "what a lost worker had is never done",
        ("catalogue/test_operations.py::test_a_lease_that_ran_out_is_given_to_another",),
        "SKA DLM 8: stuck for ever",
    ),
    Mutant(
        "lease-of-the-living-ends",
        "dlm_core/catalogue/operations.py",
        ("SELECT operation_id FROM operation WHERE state = 'RUNNING' AND lease_until < :now"),
        "SELECT operation_id FROM operation WHERE state = 'RUNNING'",
        "work is taken away from a worker that is alive",
        ("catalogue/test_operations.py::test_a_lease_holds_until_its_end",),
    ),
    Mutant(
        "lost-lease-writes",
        "dlm_core/catalogue/operations.py",
        "              AND lease_token = :token AND state = 'RUNNING' ORDER BY",
        "              AND state = 'RUNNING' ORDER BY",
        "a worker whose lease ran out writes results",
        ("catalogue/test_operations.py::test_who_lost_its_lease_writes_nothing",),
        "SKA DLM 7: results of another's job",
    ),
    Mutant(
        "lost-lease-finishes",
        "dlm_core/catalogue/operations.py",
        "            WHERE o.operation_id = u.operation_id AND o.lease_token = :token\n",
        "            WHERE o.operation_id = u.operation_id\n",
        "a worker whose lease ran out ends another's operation",
        ("catalogue/test_operations.py::test_who_lost_its_lease_writes_nothing",),
        "SKA DLM 7: results of another's job",
    ),
    Mutant(
        "lost-lease-is-done",
        "dlm_core/catalogue/operations.py",
        'WHERE operation_id = ANY(:ids) AND lease_token = :token AND state = \'RUNNING\'"""',
        'WHERE operation_id = ANY(:ids) AND state = \'RUNNING\'"""',
        "a worker whose lease ran out says of another's operation that it is done",
        ("catalogue/test_operations.py::test_who_lost_its_lease_writes_nothing",),
    ),
    Mutant(
        "back-off-without-end",
        "dlm_core/catalogue/operations.py",
        "        if attempts >= self.max_attempts:",
        "        if False:",
        "what never succeeds is tried for ever and never FAILED",
        (
            "lifecycle/test_register.py::test_a_vanished_payload_is_not_admitted",
            "catalogue/test_operations.py::test_tries_end",
        ),
        "SKA DLM 3: refused every 10 s for ever",
    ),
    Mutant(
        "word-of-a-storage-for-the-last-copy",
        "dlm_core/catalogue/checks.py",
        "WHERE x.oid = r.oid AND x.uid <> r.uid",
        "WHERE true OR x.oid = r.oid AND x.uid <> r.uid",
        "the last good copy is not read, its storage's word is taken",
        ("lifecycle/test_check.py::test_the_last_good_copy_is_always_read",),
        "listings and words trusted",
    ),
    Mutant(
        "no-limit-of-a-run",
        "dlm_core/catalogue/plans.py",
        "    if items > limits.run_items:",
        "    if False:",
        "one run trashes as much as is due",
        (
            (
                "lifecycle/test_limits.py"
                "::test_a_stop_names_the_limit_what_was_found_and_the_command"
            ),
            ("lifecycle/test_lifecycle.py::test_a_run_that_would_delete_too_much_deletes_nothing"),
        ),
        "an expiry rule matched a whole bucket",
    ),
    Mutant(
        "no-limit-of-a-day",
        "dlm_core/catalogue/plans.py",
        "    if items > limits.day_items:",
        "    if False:",
        "many small runs trash as much as is due",
        ("lifecycle/test_limits.py::test_a_day_has_a_limit_of_its_own",),
        "Rucio: reapers that overshoot",
    ),
    Mutant(
        "no-limit-of-a-collection",
        "dlm_core/catalogue/plans.py",
        "    if limits.fraction >= 1:",
        "    if True:",
        "a whole collection expires by itself",
        ("lifecycle/test_limits.py::test_most_of_a_collection_does_not_go_by_itself",),
        "an expiry rule matched a whole bucket",
    ),
    Mutant(
        "plan-after-its-time",
        "dlm_core/catalogue/plans.py",
        "WHERE state = 'APPROVED' AND valid_until > :now ORDER BY plan_id",
        "WHERE state = 'APPROVED' AND CAST(:now AS timestamptz) IS NOT NULL ORDER BY plan_id",
        "an approval that ran out is acted on",
        ("lifecycle/test_limits.py::test_approvals_and_proposals_run_out",),
    ),
    Mutant(
        "old-word-is-survivor",
        "dlm_core/catalogue/deletions.py",
        "r.checked_at >= known.floor AS seen",
        "true AS seen",
        "after a restore of the catalogue a copy that nobody looked at since is a survivor",
        ("lifecycle/test_backup.py::test_a_survivor_that_was_not_looked_at_is_none",),
    ),
    Mutant(
        "unconfirmed-recovery-expires",
        "dlm_core/catalogue/deletions.py",
        """    elif basis == "item_expired" and row["unconfirmed"]:""",
        """    elif basis == "item_expired" and False:""",
        "items go by times that an old catalogue had",
        ("lifecycle/test_backup.py::test_no_item_expires_before_a_person_confirms",),
    ),
    Mutant(
        "restore-unmarked",
        "dlm_core/catalogue/backup.py",
        "    after = recovery.mark_sql(source, actor, now)",
        """    after = \"\"""",
        "a restored catalogue is believed as if it had never been away",
        ("lifecycle/test_backup.py::test_a_drill_loses_nothing",),
    ),
    Mutant(
        "export-passes-late-commits",
        "dlm_core/catalogue/describe.py",
        """    if int(around["seen_xid"]) >= int(progress["next_xid"]):""",
        "    if True:",
        "a change that commits late is missing in a storage's description of itself",
        ("lifecycle/test_export.py::test_a_late_commit_is_not_passed_over",),
    ),
)

"""Mutants of the rules that the database keeps by itself."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

RULES = (
    Mutant(
        "ready-without-a-copy",
        "schema/sql/0016_sense.sql",
        "WHEN (NEW.state = 'READY' AND OLD.state <> 'READY') EXECUTE FUNCTION data_item_has_copy",
        "WHEN (false) EXECUTE FUNCTION data_item_has_copy",
        "psql makes an item READY of which nothing was read",
        ("schema/test_sense.py::test_an_item_is_not_ready_without_a_copy",),
    ),
    Mutant(
        "two-trash-one-each",
        "schema/sql/0016_sense.sql",
        "     ORDER BY oid FOR NO KEY UPDATE;\n",
        "     ORDER BY oid;\n",
        "of two who trash one copy each neither waits, and none is left",
        ("schema/test_untrue.py::test_of_two_who_trash_one_copy_each_the_second_is_refused",),
    ),
    Mutant(
        "survivor-invented",
        "schema/sql/0016_sense.sql",
        "     WHERE k.good IS NOT TRUE OR e.survivor = e.uid)",
        "     WHERE e.survivor = e.uid)",
        "a certificate names survivors that are none",
        ("schema/test_untrue.py::test_a_certificate_names_what_is_so",),
    ),
    Mutant(
        "events-by-hand",
        "schema/sql/0017_telling.sql",
        "  WHEN (pg_trigger_depth() = 0)",
        "  WHEN (false)",
        "psql tells of what did not happen",
        ("schema/test_sense.py::test_an_event_is_told_by_what_changed",),
    ),
    Mutant(
        "present-moved",
        "schema/sql/0016_sense.sql",
        "              WHEN dlm_is_simulation() THEN",
        "              WHEN true THEN",
        "dlm.now lets anything expire",
        ("schema/test_untrue.py::test_the_present_is_moved_by_an_hour_at_most",),
    ),
    Mutant(
        "two-spellings",
        "schema/sql/0016_sense.sql",
        "CHECK (dlm_is_encoded(path) AND NOT starts_with",
        "CHECK (NOT starts_with",
        "one file is two replicas by two spellings of its path",
        ("schema/test_untrue.py::test_a_path_and_a_uri_have_one_spelling",),
    ),
    Mutant(
        "certificate-not-needed",
        "schema/sql/0016_sense.sql",
        "        WHEN NOT EXISTS (\n             SELECT FROM deletion d",
        "        WHEN false AND NOT EXISTS (\n             SELECT FROM deletion d",
        "psql trashes without a certificate",
        ("schema/test_rules.py::test_nothing_is_trashed_without_a_certificate",),
    ),
    Mutant(
        "certificate-of-any-time",
        "schema/sql/0016_sense.sql",
        " AND d.valid_until >= dlm_now()\n",
        "\n",
        "a certificate allows a deletion after its time",
        (
            (
                "schema/test_rules.py"
                "::test_nothing_is_deleted_but_trash_with_a_proof_that_is_good_now"
            ),
        ),
        "git-annex: a proof has an end",
    ),
    Mutant(
        "certificate-of-another-transaction",
        "schema/sql/0016_sense.sql",
        "d.step = 'trash' AND d.xid = pg_current_xact_id()",
        "d.step = 'trash'",
        "an old certificate allows a new trashing",
        ("schema/test_rules.py::test_a_certificate_of_another_transaction_does_not_trash",),
    ),
    Mutant(
        "last-copy-by-psql",
        "schema/sql/0016_sense.sql",
        "        WHEN NOT EXISTS (SELECT FROM (SELECT state",
        "        WHEN false AND NOT EXISTS (SELECT FROM (SELECT state",
        "the database lets the last good copy go",
        ("schema/test_rules.py::test_the_last_good_copy_stays_until_its_item_has_expired",),
        "SKA DLM 2: decreasing the phase deletes every copy",
    ),
    Mutant(
        "unread-is-ready",
        "schema/sql/0016_sense.sql",
        "i.oid = n.oid AND i.digest = n.digest AND i.size = n.size\n",
        "i.oid = n.oid AND i.size = n.size\n",
        "a replica with another digest is READY",
        ("schema/test_rules.py::test_only_observed_bytes_make_a_replica_ready",),
        "SKA DLM 7: set READY with 0 bytes",
    ),
    Mutant(
        "item-expires-early",
        "schema/sql/0016_sense.sql",
        (
            "       AND (n.expires_at > dlm_now() OR EXISTS (SELECT FROM holds_on(n.oid, "
            "n.uri, n.collection_id))) LIMIT 1;"
        ),
        ("       AND EXISTS (SELECT FROM holds_on(n.oid, n.uri, n.collection_id)) LIMIT 1;"),
        "an item expires before its time",
        (
            (
                "schema/test_rules.py"
                "::test_an_item_expires_only_past_its_time_and_goes_only_after_its_replicas"
            ),
        ),
        "SKA DLM 3: goes whatever its expiration says",
    ),
    Mutant(
        "item-expires-under-hold",
        "schema/sql/0016_sense.sql",
        (
            "       AND (n.expires_at > dlm_now() OR EXISTS (SELECT FROM holds_on(n.oid, "
            "n.uri, n.collection_id))) LIMIT 1;"
        ),
        "       AND n.expires_at > dlm_now() LIMIT 1;",
        "an item under a hold expires",
        ("schema/test_rules.py::test_a_hold_keeps_items_and_replicas",),
    ),
    Mutant(
        "item-changes-unseen",
        "schema/sql/0016_sense.sql",
        "                 OR (n.state <> o.state AND t.noun IS NULL)\n",
        "",
        "an item goes from any state to any other",
        ("schema/test_rules.py::test_items_go_where_the_table_says_and_nowhere_else",),
    ),
    Mutant(
        "item-without-tally",
        "schema/sql/0016_sense.sql",
        "FROM changed WHERE moved OR grown\n        UNION ALL",
        "FROM changed WHERE moved\n        UNION ALL",
        "the counts of bytes drift when sizes become known",
        ("schema/test_rules.py::test_the_tally_is_a_recount_after_any_changes",),
    ),
    Mutant(
        "digest-of-any-letters",
        "schema/sql/0011_cheaper.sql",
        " AND substr(VALUE, 8) ~ '^[0-9a-f]+$'",
        "",
        "what is no digest is taken for one",
        ("schema/test_rules.py::test_nonsense_is_refused_and_sense_is_not",),
    ),
    Mutant(
        "event-not-written",
        "schema/sql/0016_sense.sql",
        "        FROM changed WHERE moved OR expiring OR certified),",
        "        FROM changed WHERE expiring OR certified),",
        "a replica's change of state is not in the log",
        ("schema/test_rules.py::test_every_change_of_state_is_an_event",),
    ),
    Mutant(
        "tally-wrong",
        "schema/sql/0016_sense.sql",
        "SELECT storage_id, a, -1, -old_size FROM",
        "SELECT storage_id, a, -1, -size FROM",
        "bytes per storage do not add up",
        ("schema/test_rules.py::test_the_tally_is_a_recount_after_any_changes",),
    ),
    Mutant(
        "feed-skips",
        "schema/sql/0004_recovery.sql",
        " OR e.xid < pg_snapshot_xmin(pg_current_snapshot());",
        " OR true;",
        "a reader of the feed misses what is committed late",
        ("schema/test_rules.py::test_the_feed_never_skips_a_late_commit",),
        "SKA DLM 9: outbox",
    ),
    Mutant(
        "retired-with-trash",
        "schema/sql/0006_storages.sql",
        "EXISTS (SELECT FROM replica WHERE storage_id = NEW.storage_id AND state <> 'DELETED'",
        "EXISTS (SELECT FROM replica WHERE storage_id = NEW.storage_id AND state = 'READY'",
        "a storage retires with replicas on it",
        ("schema/test_rules.py::test_a_storage_retires_only_when_empty_and_for_good",),
    ),
    Mutant(
        "sql-phases-swapped",
        "schema/sql/0001_functions.sql",
        "WHEN 'LIQUID' THEN 2 WHEN 'GAS' THEN 1",
        "WHEN 'LIQUID' THEN 1 WHEN 'GAS' THEN 2",
        "the database weighs phases otherwise",
        (("schema/test_agreement.py::test_phases_weigh_the_same_everywhere"),),
    ),
    Mutant(
        "sizes-of-32-bits",
        "schema/sql/0001_tables.sql",
        "  size           bigint NOT NULL CHECK",
        "  size           integer NOT NULL CHECK",
        "a payload of 3 GiB is out of range",
        ("schema/test_agreement.py::test_alembic_finds_no_difference",),
        "SKA DLM 10: 32-bit sizes",
    ),
    Mutant(
        "deleted-comes-back",
        "schema/sql/0001_tables.sql",
        "  ('replica', 'TRASHED', 'DELETED')",
        ("  ('replica', 'DELETED', 'READY'),\n  ('replica', 'TRASHED', 'DELETED')"),
        "DELETED goes back to READY",
        (("schema/test_rules.py::test_the_table_reaches_every_state_and_deleted_never_goes_back"),),
        "SKA DLM 10: set_state allows DELETED to READY",
    ),
    Mutant(
        "audit-ignores-size",
        "schema/sql/0002_audit.sql",
        "d.proved_at, d.valid_until, d.xid, d.size)::text",
        "d.proved_at, d.valid_until, d.xid)::text",
        "a changed certificate is not noticed",
        ("catalogue/test_seals.py::test_every_column_is_sealed",),
    ),
    Mutant(
        "audit-ignores-detail",
        "schema/sql/0002_audit.sql",
        "e.new_state, e.actor, e.detail)::text",
        "e.new_state, e.actor)::text",
        "a changed event is not noticed",
        ("catalogue/test_seals.py::test_every_column_is_sealed",),
    ),
    Mutant(
        "seals-unchained",
        "schema/sql/0002_audit.sql",
        "    v_previous := v_new.seal;\n",
        "",
        "a day that was written anew is not noticed",
        (
            "catalogue/test_seals.py::test_the_seals_themselves_are_looked_at",
            (
                "catalogue/test_seals.py"
                "::test_an_untouched_log_verifies_and_sealing_again_changes_nothing"
            ),
        ),
    ),
    Mutant(
        "lock-shortened",
        "schema/sql/0002_holds.sql",
        "  IF OLD.locked AND (NOT NEW.locked OR NEW.ends_at < OLD.ends_at) THEN",
        "  IF OLD.locked AND NOT NEW.locked THEN",
        "a retention lock is shortened",
        ("schema/test_holds.py::test_a_lock_cannot_be_shortened_or_turned_aside",),
    ),
    Mutant(
        "lock-ends-by-any-clock",
        "schema/sql/0002_holds.sql",
        "    THEN least(dlm_now(), clock_timestamp()) ELSE dlm_now() END",
        "    THEN dlm_now() ELSE dlm_now() END",
        "a clock put forward ends a retention lock",
        ("schema/test_holds.py::test_a_lock_does_not_end_by_a_clock_that_was_put_forward",),
    ),
    Mutant(
        "certificate-under-hold",
        "schema/sql/0016_sense.sql",
        "  IF EXISTS (SELECT FROM hold) THEN",
        "  IF false THEN",
        "a certificate is written for what is held",
        ("schema/test_holds.py::test_no_certificate_is_written_for_what_is_held",),
    ),
    Mutant(
        "one-approves-twice",
        "schema/sql/0002_plans.sql",
        "SELECT count(DISTINCT actor)",
        "SELECT count(actor)",
        "one person approves in the place of two",
        (("lifecycle/test_limits.py::test_two_people_have_to_approve_where_the_site_says_so"),),
    ),
    Mutant(
        "other-entries-approved",
        "schema/sql/0002_plans.sql",
        " OR plan_hash(NEW.plan_id) IS DISTINCT FROM NEW.content_hash) THEN",
        ") THEN",
        "what was slipped into a plan is approved with it",
        ("lifecycle/test_limits.py::test_entries_that_were_slipped_in_are_not_approved",),
    ),
    Mutant(
        "old-word-certified",
        "schema/sql/0013_withdrawal.sql",
        "  IF v_floor IS NULL THEN",
        "  IF true THEN",
        "the database takes certificates that rest on what an old catalogue said",
        ("lifecycle/test_backup.py::test_the_database_itself_refuses_certificates_of_old_words",),
    ),
)

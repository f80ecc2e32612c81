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
        "late-look-sets-aside",
        "dlm_core/lifecycle/verify.py",
        "uids = [look.uid for look in damaged if look.operation_id in held]",
        "uids = [look.uid for look in damaged]",
        "a worker whose lease ran out sets a newer copy aside",
        ("lifecycle/test_late_workers.py::test_a_late_look_does_not_set_a_newer_copy_aside",),
    ),
    Mutant(
        "trashed-copy-set-aside",
        "dlm_core/lifecycle/verify.py",
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
        '    if row["state"] == ReplicaState.MISSING:\n        # its own',
        "    if False:\n        # its own",
        "somebody's file where a lost copy was is taken for it",
        ("lifecycle/test_strangers.py::test_a_look_for_a_lost_copy_does_not_set_a_stranger_aside",),
    ),
)

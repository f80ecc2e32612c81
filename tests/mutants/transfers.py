"""Mutants of limits that drainers share, copies by servers, and copies that go on."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRANSFERS = (
    Mutant(
        "limit-for-each-drainer",
        "dlm_core/catalogue/traffic.py",
        "None if rate is None else rate / count",
        "rate",
        "each drainer reads as fast as all of them together may",
        ("lifecycle/test_traffic.py::test_bytes_and_places_are_shared_evenly",),
    ),
    Mutant(
        "place-given-twice",
        "dlm_core/catalogue/traffic.py",
        "max(0, min(-(-most // count), most - sum(others)))",
        "-(-most // count)",
        "more files are open on a storage than it takes, while drainers come and go",
        ("lifecycle/test_traffic.py::test_bytes_and_places_are_shared_evenly",),
    ),
    Mutant(
        "busy-storage-claimed",
        "dlm_core/lifecycle/work.py",
        "avoid=context.traffic.filled(),",
        "avoid=(),",
        "a slow storage takes all claims of a drainer",
        ("lifecycle/test_traffic.py::test_a_slow_storage_holds_up_only_what_goes_there",),
    ),
    Mutant(
        "server-copy-believed",
        "dlm_core/transfers/mover.py",
        "        return file.direct\n",
        "        file.proven = file.direct\n        return file.direct\n",
        "a copy that a server made by itself is not read back",
        (
            "transfers/test_mover.py"
            "::test_a_copy_by_the_kernel_that_differs_is_the_fault_of_who_has_other_bytes",
        ),
    ),
    Mutant(
        "source-blamed-for-partial",
        "dlm_core/transfers/resuming.py",
        "            if not begun:\n                raise\n",
        "            raise\n",
        "bytes that went bad in a partial file make a good source SUSPECT",
        ("lifecycle/test_resume.py::test_damage_to_what_was_left_is_not_the_sources",),
    ),
    Mutant(
        "partial-swept",
        "dlm_core/transfers/sweep.py",
        " and copy not in keep",
        "",
        "what a queued copy goes on from is cleared away",
        ("lifecycle/test_resume.py::test_what_a_queued_copy_goes_on_from_is_not_swept",),
    ),
)

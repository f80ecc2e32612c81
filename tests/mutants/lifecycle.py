"""Mutants of what is decided and done to files."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LIFECYCLE = (
    Mutant(
        "expiry-state-looked-at-before",
        "dlm_core/catalogue/browse.py",
        "            WHERE oid = :oid AND state NOT IN ('EXPIRED', 'DELETED')\"\"\",",
        '            WHERE oid = :oid""",',
        "an item that expires at this moment is told to have more time",
        (
            "lifecycle/test_interleavings.py::"
            "test_an_expiry_that_is_put_off_when_its_item_has_expired_is_refused",
        ),
    ),
    Mutant(
        "rebalance-looks-at-the-coldest-only",
        "dlm_core/lifecycle/rebalance.py",
        "        if last is None:\n",
        "        if True:\n",
        "a storage stays full for the sake of its coldest copies, which have no other place",
        (
            "lifecycle/test_rebalance.py::"
            "test_a_copy_that_may_leave_is_found_behind_those_that_may_not",
            "lifecycle/test_rebalance.py::"
            "test_cold_copies_that_cannot_leave_do_not_hide_a_warmer_one_that_can",
        ),
    ),
    Mutant(
        "offline-is-registered",
        "dlm_core/lifecycle/admit.py",
        '    if storage["mode"] in (StorageMode.OFFLINE, StorageMode.AUDITING):\n',
        "    if False:\n",
        "a copy on an offline storage is let in by bytes that are read there",
        ("lifecycle/test_register.py::test_admissions_wait_for_a_storage_that_is_not_read",),
    ),
    Mutant(
        "token-used-again",
        "dlm_core/lifecycle/work.py",
        "context, token = self._context, new_id()",
        "context, token = self._context, uuid.UUID(int=7)",
        "all claims have the same token",
        ("catalogue/test_operations.py::test_every_claim_has_a_token_of_its_own",),
        "SKA DLM 7: rclone job-id reuse",
    ),
    Mutant(
        "error-swallowed",
        "dlm_core/lifecycle/work.py",
        "QUEUED if due else OperationState.FAILED",
        "QUEUED if due else OperationState.DONE",
        "a permanent failure is told as DONE",
        (
            "lifecycle/test_lifecycle.py"
            "::test_a_restore_never_removes_a_file_that_somebody_put_in_its_place",
        ),
        "SKA DLM 7: a broken copy is READY",
    ),
    Mutant(
        "trash-error-swallowed",
        "dlm_core/lifecycle/trash.py",
        ("    except DlmError as error:\n        failure = error\n    return Effected"),
        ("    except DlmError:\n        pass\n    return Effected"),
        "file work that failed is taken as done",
        (("storages/test_faults.py::test_a_removal_that_is_only_said_to_be_done_is_not_believed"),),
    ),
    Mutant(
        "grace-ignored",
        "dlm_core/lifecycle/trash.py",
        "due = now + (context.settings.trash_grace if grace is None else grace)",
        "due = now",
        "what was trashed is purged at once",
        ("lifecycle/test_lifecycle.py::test_trash_can_be_restored_until_its_grace_ends",),
    ),
    Mutant(
        "grace-a-second-short",
        "dlm_core/lifecycle/trash.py",
        "due = now + (context.settings.trash_grace if grace is None else grace)",
        (
            "due = now + (context.settings.trash_grace if grace is None else grace) - "
            "timedelta(seconds=1)"
        ),
        "a purge comes a second before the grace ends",
        ("lifecycle/test_lifecycle.py::test_the_grace_is_kept_to_its_last_second",),
    ),
    Mutant(
        "foreign-file-moved",
        "dlm_core/lifecycle/trash.py",
        ('    if not row["managed"]:\n        return  # the bytes belong'),
        ("    if False:\n        return  # the bytes belong"),
        "a file that is not the DLM's is moved to the trash",
        (("lifecycle/test_lifecycle.py::test_unmanaged_files_are_released_and_never_touched"),),
    ),
    Mutant(
        "no-new-proof-at-purge",
        "dlm_core/lifecycle/trash.py",
        "    good = [p for p in proofs if p.refusal is None and p.uid not in blind]",
        "    good = list(proofs)",
        "a purge believes the proof of its trashing",
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_a_survivor_that_is_gone_stops_the_purge_and_brings_the_trash_back"
            ),
        ),
        "Iceberg: expire_snapshots removed live files",
    ),
    Mutant(
        "survivors-not-looked-at",
        "dlm_core/lifecycle/trash.py",
        "    unseen = look_at_survivors(context, proofs)\n",
        "    unseen: set[uuid.UUID] = set()\n",
        "a purge trusts the catalogue about its survivors",
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_a_survivor_that_is_gone_stops_the_purge_and_brings_the_trash_back"
            ),
        ),
        "dCache 4742: the catalogue was trusted, the storages not asked",
    ),
    Mutant(
        "outage-is-a-look",
        "dlm_core/lifecycle/survivors.py",
        '            unseen.update(row["uid"] for row in mine)\n',
        "",
        "survivors on a storage that is down count as seen",
        (
            (
                "storages/test_faults.py"
                "::test_a_survivor_that_may_not_be_looked_at_puts_the_purge_off"
            ),
        ),
        "losses elsewhere: stale belief",
    ),
    Mutant(
        "survivor-changed",
        "dlm_core/lifecycle/survivors.py",
        " or any(_is_another(entry, row) for entry in found)",
        "",
        "a survivor that was written to since its last check is believed by its size",
        (
            "lifecycle/test_survivors.py::"
            "test_a_survivor_that_was_changed_since_its_last_look_is_read_before_a_purge",
        ),
        "found by an audit of our own",
    ),
    Mutant(
        "registration-without-doubt",
        "dlm_core/lifecycle/register.py",
        "        context.transact(lambda c: doubt(c, context, [one], _OTHER_BYTES, later))\n",
        "",
        "a registration that reads other bytes leaves the copy READY, a survivor",
        (
            "lifecycle/test_register_again.py::"
            "test_what_has_other_bytes_is_no_copy_of_its_item_any_more",
        ),
        "found by an audit of our own",
    ),
    Mutant(
        "survivor-not-read",
        "dlm_core/lifecycle/survivors.py",
        'if row["checked_at"] < oldest or',
        "if",
        "a survivor that was not read for long is believed by its size",
        ("storages/test_faults.py::test_a_survivor_with_a_flipped_bit_stops_the_purge",),
        "SKA DLM 12: no fixity",
    ),
    Mutant(
        "removal-believed",
        "dlm_core/lifecycle/trash.py",
        ("    storage.remove(path)\n    if storage.stat(path) is not None:\n"),
        ("    storage.remove(path)\n    if False:\n"),
        "a purge believes that it removed what it should",
        (("storages/test_faults.py::test_a_removal_that_is_only_said_to_be_done_is_not_believed"),),
        "SKA DLM 15",
    ),
    Mutant(
        "restored-unread",
        "dlm_core/lifecycle/trash.py",
        (
            '            elif (e.result.digest, e.result.size) == (e.row["item_digest"], '
            'e.row["item_size"]):\n'
            '                good.append(replicas.Seen(e.row["uid"], e.result.size, '
            "e.result.digest))"
        ),
        (
            "            elif True:\n"
            '                good.append(replicas.Seen(e.row["uid"], e.row["item_size"], '
            'e.row["item_digest"]))'
        ),
        "what comes out of the trash is believed unread",
        ("lifecycle/test_lifecycle.py::test_damage_in_the_trash_gets_its_second_look",),
    ),
    Mutant(
        "restore-over-a-stranger",
        "dlm_core/lifecycle/trash.py",
        (
            "        if not is_payload(storage, path, row):\n"
            "            raise\n"
            "        storage.remove(trashed)\n"
        ),
        ("        storage.remove(path)\n        storage.rename(trashed, path)\n"),
        "a restore replaces somebody's file",
        (
            (
                "lifecycle/test_lifecycle.py"
                "::test_a_restore_never_removes_a_file_that_somebody_put_in_its_place"
            ),
        ),
    ),
    Mutant(
        "outage-is-missing",
        "dlm_core/lifecycle/verify.py",
        '        return "", look.error\n',
        "        return ReplicaState.MISSING, look.error\n",
        "during an outage all copies are MISSING",
        ("lifecycle/test_check.py::test_an_outage_of_a_storage_that_is_only_read_proves_nothing",),
        "a lost S3 prefix",
    ),
    Mutant(
        "corrupted-at-first-look",
        "dlm_core/lifecycle/verify.py",
        '    second = row["state"] == ReplicaState.SUSPECT',
        "    second = True",
        "one read that differs condemns a copy",
        ("lifecycle/test_quarantine.py::test_what_is_set_aside_is_read_once_more_there",),
    ),
    Mutant(
        "wrong-digest-is-ready",
        "dlm_core/lifecycle/verify.py",
        (
            "    if (look.observation.digest, look.observation.size) == "
            '(row["item_digest"], row["item_size"]):'
        ),
        '    if look.observation.size == row["item_size"]:',
        "a verification looks at the size only",
        (("lifecycle/test_lifecycle.py::test_damage_is_noticed_and_repaired_from_a_good_copy"),),
        "SKA DLM 12: no checksum is compared",
    ),
    Mutant(
        "quarantine-deletes",
        "dlm_core/lifecycle/quarantine.py",
        (
            '        storage.rename(decode_path(row["path"]), '
            'quarantine_path(str(row["uid"]), token.hex))'
        ),
        '        storage.remove(decode_path(row["path"]))',
        "damaged bytes are deleted, not set aside",
        (("storages/test_faults.py::test_a_bit_that_flips_at_rest_is_found_set_aside_and_mended"),),
    ),
    Mutant(
        "pending-is-reached",
        "dlm_core/lifecycle/decide.py",
        "    ready = [r for r in replicas if r.state == ReplicaState.READY]",
        (
            "    ready = [r for r in replicas if r.state in (ReplicaState.READY, "
            "ReplicaState.PENDING)]"
        ),
        "a planned copy is taken as made",
        ("lifecycle/test_decide.py::test_pending_copies_are_expected_but_never_reached",),
        "SKA DLM 1 and 6",
    ),
    Mutant(
        "planner-ignores-locations",
        "dlm_core/lifecycle/decide.py",
        (
            "        best[storage.location_id] = max(best.get(storage.location_id, 0), "
            "storage.weight)"
        ),
        ("        best[storage.location_id] = best.get(storage.location_id, 0) + storage.weight"),
        "the planner counts two volumes of one location twice",
        (
            (
                "lifecycle/test_decide.py"
                "::test_a_second_volume_at_the_same_location_is_no_second_failure_domain"
            ),
        ),
        "SKA DLM 5: no failure domains",
    ),
    Mutant(
        "modes-ignored",
        "dlm_core/lifecycle/decide.py",
        ("    if storage.mode != StorageMode.READ_WRITE:\n        return storage.mode"),
        ("    if False:\n        return storage.mode"),
        "copies are planned on retired and read-only storages",
        ("lifecycle/test_decide.py::test_modes_management_and_space_are_respected",),
        "SKA DLM 5: picks retired and read-only storages",
    ),
    Mutant(
        "space-promised-twice",
        "dlm_core/lifecycle/decide.py",
        "        self._free[storage_id] -= size\n",
        "        pass\n",
        "one batch plans more copies than there is room for",
        ("lifecycle/test_decide.py::test_space_is_not_promised_twice",),
        "SKA DLM 5: capacity is not looked at",
    ),
    Mutant(
        "draining-counts",
        "dlm_core/lifecycle/decide.py",
        "    return expired or storage.mode not in _COUNTING_MODES",
        "    return expired",
        "copies on a storage that is being drained are counted on",
        ("lifecycle/test_decide.py::test_a_copy_on_a_storage_that_is_drained_is_not_counted_on",),
    ),
    Mutant(
        "phases-swapped",
        "dlm_core/types.py",
        '"GAS": 1, "LIQUID": 2,',
        '"GAS": 2, "LIQUID": 1,',
        "GAS is worth more than LIQUID",
        ("schema/test_agreement.py::test_phases_weigh_the_same_everywhere",),
    ),
    Mutant(
        "copy-to-a-draining-storage",
        "dlm_core/lifecycle/replicate.py",
        ('    if storage["mode"] != StorageMode.READ_WRITE:\n        return f'),
        ("    if False:\n        return f"),
        "a copy planned before a drain is made in spite of it",
        (
            "lifecycle/test_lifecycle.py::test_a_planned_copy_is_not_made_where_it_is_not_wanted_any_more",
        ),
    ),
    Mutant(
        "damaged-source-copied",
        "dlm_core/transfers/tiny.py",
        "    if found != digest or len(data) != size:",
        "    if len(data) != size:",
        "a small file is copied without a look at what was read",
        ("transfers/test_mover.py::test_a_damaged_source_is_never_visible",),
        "SKA DLM 12: no checksum is compared",
    ),
    Mutant(
        "no-read-back",
        "dlm_core/transfers/mover.py",
        "in_chunks(pool, self.prover.read_back, unproven, self.prover.opened_ahead)",
        "in_chunks(pool, self.prover.read_back, [], self.prover.opened_ahead)",
        "the digest of the source is believed of the destination",
        (
            (
                "transfers/test_mover.py"
                "::test_bytes_changed_on_the_way_are_noticed_at_the_destination"
            ),
        ),
        "SKA DLM 7: 0 bytes of 5 MiB, READY",
    ),
    Mutant(
        "final-name-at-once",
        "dlm_core/transfers/mover.py",
        "if self.atomic else temp_path(name)",
        'if True else temp_path(f"{slot:x}/{task.token}")',
        "a copy is written under its final name",
        (
            "transfers/test_mover.py::test_a_directory_appears_whole_or_not_at_all",
            (
                "transfers/test_mover.py"
                "::test_bytes_changed_on_the_way_are_noticed_at_the_destination"
            ),
        ),
        "SKA DLM 14: the partial file stays",
    ),
    Mutant(
        "renamed-before-verified",
        "dlm_core/transfers/mover.py",
        (
            "        in_chunks(pool, self.prover.read_back, unproven, self.prover.opened_ahead)\n"
            "        results = self.publisher.publish(copies, pool)\n"
        ),
        (
            "        results = self.publisher.publish(copies, pool)\n"
            "        in_chunks(pool, self.prover.read_back, unproven, self.prover.opened_ahead)\n"
        ),
        "a copy is visible before it was verified",
        (
            (
                "transfers/test_mover.py"
                "::test_bytes_changed_on_the_way_are_noticed_at_the_destination"
            ),
        ),
        "JADE: checksum at the destination comes first",
    ),
    Mutant(
        "far-digest-not-compared",
        "dlm_core/transfers/proving.py",
        "told.items():\n            waiting[path].proven = digest == waiting[path].digest",
        "told.items():\n            waiting[path].proven = bool(digest)",
        "any digest that the far side tells is taken for the right one",
        ("lifecycle/test_far.py::test_a_bit_that_flips_on_its_way_is_never_shown",),
        "SKA DLM 12: no checksum is compared",
    ),
    Mutant(
        "far-link-followed",
        "dlm_core/storages/sftp.py",
        "            return await session.sftp.realpath(full) != full",
        "            return await session.sftp.realpath(full) is None",
        "a link on the far side leads out of the root",
        ("storages/test_sftp.py::test_symbolic_links_lead_nowhere",),
    ),
    Mutant(
        "stranger-adopted",
        "dlm_core/transfers/mover.py",
        "        elif (seen.size, seen.digest) == (file.size, file.digest):",
        "        elif seen.size == file.size:",
        "other bytes of the same size at the destination are adopted",
        ("transfers/test_mover.py::test_other_bytes_at_the_destination_stay",),
        "SKA DLM 12: no-check-dest",
    ),
    Mutant(
        "overwrite-at-destination",
        "dlm_core/storages/kernel.py",
        "new_folder, os.fsencode(new), _RENAME_NOREPLACE",
        "new_folder, os.fsencode(new), 0",
        "a rename replaces what is there",
        ("transfers/test_mover.py::test_other_bytes_at_the_destination_stay",),
        "SKA DLM 12: no-check-dest",
    ),
    Mutant(
        "no-mount-is-empty",
        "dlm_core/storages/posix.py",
        "        if self._mount is not None and not os.path.ismount(self._mount):",
        "        if False:",
        "a file system that is not mounted is an empty storage",
        ("storages/test_posix.py::test_an_empty_mount_point_is_an_outage",),
        "a lost S3 prefix matched a whole bucket",
    ),
    Mutant(
        "path-escapes",
        "dlm_core/storages/posix.py",
        ' or "/../" in framed',
        "",
        "a path with '..' leads out of the storage",
        ("storages/test_conformance.py::test_the_contract_is_kept",),
    ),
    Mutant(
        "links-followed",
        "dlm_core/storages/kernel.py",
        "_OpenHow(flags, mode, _RESOLVE_NO_SYMLINKS)",
        "_OpenHow(flags, mode, 0)",
        "a symbolic link leads out of the storage",
        ("storages/test_posix.py::test_links_out_of_the_root_are_not_followed",),
    ),
    Mutant(
        "sweep-of-everything",
        "dlm_core/transfers/sweep.py",
        "if mtime < limit and",
        "if True and",
        "the sweep clears what a copy is writing",
        ("transfers/test_sweep.py::test_only_what_nobody_writes_any_more_is_swept",),
        "Kyoto: a cleaning step removed 77 TB",
    ),
    Mutant(
        "secret-shown",
        "dlm_core/storages/config.py",
        'value="(not shown)",',
        "value=str(config),",
        "an error shows what stands in a storage's config",
        ("storages/test_open.py::test_a_secret_in_the_config_is_refused_and_not_shown",),
        "SKA DLM 18: get_storage_config returns secrets",
    ),
    Mutant(
        "brought-digest-trusted",
        "dlm_core/lifecycle/admit.py",
        "    if claimed is not None and claimed != seen.digest:",
        "    if False:",
        "a digest that was brought along is not compared",
        ("lifecycle/test_register.py::test_brought_checksums_are_compared_not_trusted",),
        "SKA DLM 11: the payload is never verified",
    ),
    Mutant(
        "old-trashing-moves",
        "dlm_core/lifecycle/trash.py",
        """    if row["unproven"]:\n        return""",
        """    if False:\n        return""",
        "a trashing of an old catalogue takes what lies in the place by now",
        ("lifecycle/test_backup.py::test_an_old_trashing_moves_nothing_after_a_restore",),
    ),
    Mutant(
        "rebuild-unmarked",
        "dlm_core/lifecycle/rebuild.py",
        "    recovery.distrust(connection, told, context.actor, context.clock())\n",
        "    del told\n",
        "items of a rebuilt catalogue expire before a person has looked",
        ("lifecycle/test_rebuild.py::test_nothing_goes_on_the_word_of_a_description",),
    ),
    Mutant(
        "manifest-not-compared",
        "dlm_core/lifecycle/description.py",
        "        if found != file.digest:",
        "        if False:",
        "a damaged description is taken for what a storage holds",
        ("lifecycle/test_rebuild.py::test_a_damaged_file_is_told_and_left_out",),
    ),
    Mutant(
        "audit-skipped",
        "dlm_core/catalogue/lost.py",
        "    states = [ReplicaState.READY, ReplicaState.MISSING]",
        "    states = [ReplicaState.MISSING]",
        "what was READY before its storage was away counts unread",
        ("lifecycle/test_lost.py::test_a_storage_that_comes_back_is_read_before_it_counts",),
    ),
    Mutant(
        "audit-ends-early",
        "dlm_core/lifecycle/lost.py",
        "        if not catalogue.waits_for_looks(connection, storage_id):",
        "        if True:",
        "a storage is used again before all on it was read",
        ("lifecycle/test_lost.py::test_nothing_is_deleted_on_the_strength_of_what_was_not_read",),
    ),
    Mutant(
        "lost-counts",
        "dlm_core/catalogue/deletions.py",
        "   WHERE r.state = 'READY' AND s.mode IN ('read_write', 'read_only')",
        "   WHERE r.state = 'READY' AND s.mode IN ('read_write', 'read_only', 'lost')",
        "a deletion rests on a storage that was declared lost",
        ("lifecycle/test_lost.py::test_no_deletion_rests_on_a_lost_storage",),
    ),
    Mutant(
        "rules-into-private",
        "dlm_core/lifecycle/paths.py",
        "    if top == PRIVATE:",
        "    if False:",
        "a path rule puts copies among the DLM's own files",
        ("lifecycle/test_paths.py::test_no_rule_leads_out_of_the_root_or_to_what_is_the_dlms_own",),
    ),
    Mutant(
        "rules-untried",
        "dlm_core/lifecycle/rules.py",
        "    if meetings:",
        "    if False:",
        "path rules are used by which copies meet",
        ("lifecycle/test_paths.py::test_rules_by_which_copies_would_meet_are_refused",),
    ),
    Mutant(
        "stale-keys",
        "dlm_core/storages/s3_keys.py",
        "            if time.monotonic() >= self._until:",
        "            if not self._keys:",
        "a rotated key is not found before a restart",
        ("storages/test_rotation.py::test_keys_are_kept_for_a_moment",),
    ),
    Mutant(
        "password-in-a-root",
        "dlm_core/storages/open.py",
        "    if _CREDENTIALS.search(root):",
        "    if False:",
        "a URL with a password is taken, and shown",
        ("storages/test_open.py::test_a_secret_in_a_value_is_refused_and_not_shown",),
    ),
    Mutant(
        "xrootd-rename-replaces",
        "dlm_core/storages/xrootd.py",
        "        if self._look(path) is not None:\n            raise PayloadExistsError",
        "        if False:\n            raise PayloadExistsError",
        "XRootD's rename replaces what is there",
        ("storages/test_xrootd.py::test_the_protocol_would_overwrite_and_we_do_not",),
    ),
    Mutant(
        "rclone-copy-unread",
        "dlm_core/storages/rclone.py",
        "            if first != second:",
        "            if False:",
        "where rclone cannot move, the source goes though its copy was not read",
        ("storages/test_rclone.py::test_a_copy_that_is_other_bytes_costs_the_source_nothing",),
    ),
    Mutant(
        "rclone-part-believed",
        "dlm_core/storages/rclone_reading.py",
        "            if sure and not first",
        "            if sure or not first",
        "what rclone says is a part of a file may be its beginning",
        (
            "storages/test_ranges.py::test_whatever_a_web_server_makes_of_rclones_range_the_bytes_are_right",
        ),
    ),
    Mutant(
        "rclone-moves-unlooked",
        "dlm_core/storages/rclone.py",
        "strict=True) if kind is None]",
        "strict=True)]",
        "what rclone moves together replaces what is there",
        ("storages/test_rclone_many.py::test_what_is_there_already_stays",),
    ),
    Mutant(
        "rclone-count-believed",
        "dlm_core/storages/rclone.py",
        "                return [name for name in free if name not in there]",
        "                return [name for name in free]",
        "a file that rclone left where it was is taken for moved",
        ("storages/test_rclone_many.py::test_a_count_is_not_believed_where_a_file_is_still_there",),
    ),
)

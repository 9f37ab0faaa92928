"""Bugs in the pool of stored prefixes."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.pool.client.copying",
        "pool_bounds",
        (
            "chunks_checksum_is_compared_on_its_low_word",
            "Copying._take",
            "checksums == chunks.checksums",
            "(checksums ^ chunks.checksums) & 0xFFFFFFFF == 0",
            "a_loaded_chunk_is_good_only_if_all_of_its_checksum_is",
        ),
    ),
    *bugs(
        "pdtransport.pool.core.store",
        "pool_bounds",
        (
            "references_of_one_chunk_overflow",
            "ChunkStore._grant_read",
            "self.index.refs[entry] == MAX_REFS",
            "False",
            "references_stop_at_the_most_that_are_counted",
        ),
        (
            "share_of_a_reader_is_ignored",
            "ChunkStore._grant_read",
            "request.session.held_bytes + nbytes > self.settings.client_bytes",
            "False",
            "a_reader_holds_no_more_than_its_share",
        ),
        (
            "share_of_a_writer_is_ignored",
            "ChunkStore._begin",
            "request.session.held_bytes + nbytes > self.settings.client_bytes",
            "False",
            "a_writer_holds_no_more_than_its_share",
        ),
        (
            "share_of_who_takes_over_is_ignored",
            "ChunkStore._abandon",
            "request.session.held_bytes + self.index.nbytes[entry] <= self.settings.client_bytes",
            "True",
            "who_takes_a_write_over_stays_within_its_share",
        ),
    ),
    *bugs(
        "pdtransport.pool.core.batches",
        "pool_bounds",
        (
            "references_of_many_chunks_overflow",
            "load",
            "int(index.refs_column[entries].max()) > MAX_REFS - count",
            "False",
            "references_stop_at_the_most_that_are_counted",
        ),
        (
            "share_of_a_reader_of_many_is_ignored",
            "load",
            "session.held_bytes + nbytes > store.settings.client_bytes",
            "False",
            "a_reader_holds_no_more_than_its_share",
        ),
        (
            "share_of_a_writer_of_many_is_ignored",
            "store",
            "session.held_bytes + nbytes > store.settings.client_bytes",
            "False",
            "a_writer_holds_no_more_than_its_share",
        ),
    ),
    *bugs(
        "pdtransport.pool.core.store",
        "pool_store",
        (
            "reader_is_believed_that_a_chunk_is_damaged",
            "ChunkStore.damaged",
            "self._verify(",
            "False and self._verify(",
            "damage_is_believed_only_if_it_is_there",
        ),
    ),
    *bugs(
        "pdtransport.pool.core.budget",
        "pool_store",
        (
            "hard_pins_take_all_memory",
            "MemoryBudget.pin",
            "HARD_PIN_SHARE * self.frames.count",
            "self.frames.count",
            "hard_pins_can_not_take_all_memory",
        ),
    ),
    *bugs(
        "pdtransport.pool.tiers.envelope",
        "pool_bounds",
        (
            "chunk_of_another_key_is_opened",
            "_unsealed",
            "found.key != key",
            "False",
            "a_tier_that_gives_another_chunk_back_is_not_believed",
        ),
    ),
    *bugs(
        "pdtransport.pool.core.prefetched",
        "pool_bounds",
        (
            "hints_are_never_forgotten",
            "Hints.tick",
            "+ FORGOTTEN_S <= now",
            "+ FORGOTTEN_S <= 0",
            "a_hint_that_nobody_follows_gives_its_share_back",
        ),
    ),
    *bugs(
        "pdtransport.system.private_files",
        "pool_bounds",
        (
            "pool_directory_of_another_user_is_used",
            "closed_to_others",
            "found.st_uid == os.getuid()",
            "True",
            "a_pools_directory_of_another_user_is_refused",
        ),
    ),
    *bugs(
        "pdtransport.pool.tiers.envelope",
        "pool_digest",
        (
            "digests_key_is_not_asked_for",
            "Opening.place",
            "if self._signer is not None:",
            "if False:",
            "a_forger_without_the_key_is_refused_by_name",
        ),
        (
            "digest_is_not_compared",
            "Opening.finish",
            "if self._signer is not None:",
            "if False:",
            "no_byte_of_a_signed_chunk_can_be_changed",
        ),
    ),
    *bugs(
        "pdtransport.pool.server.open_tiers",
        "pool_digest",
        (
            "tier_that_others_can_write_to_goes_without_digests",
            "_signer_of",
            "and not tier.exposed",
            "",
            "a_tier_that_others_can_write_to_does_not_go_without",
        ),
    ),
    *bugs(
        "pdtransport.pool.tiers.disk",
        "pool_digest",
        (
            "links_below_the_disks_directory_are_followed",
            "_listed",
            "_FOLDER | os.O_NOFOLLOW",
            "_FOLDER",
            "no_link_leads_out_of_a_directory_that_others_can_write_to",
        ),
    ),
    *bugs(
        "pdtransport.pool.messages",
        "pool_bounds",
        (
            "pool_of_another_version_is_understood",
            "parsed",
            "version != POOL_VERSION",
            "False",
            "a_pool_of_another_version_is_not_understood",
        ),
    ),
]

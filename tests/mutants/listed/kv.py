"""Bugs in keys, fingerprints and the geometry of a cache."""

from __future__ import annotations

from tests.mutants.place import Mutant, bugs

BUGS: list[Mutant] = [
    *bugs(
        "pdtransport.kv.keys",
        "keys",
        (
            "block_size_is_not_in_block_keys",
            "block_keys",
            "root.update(_length(block_size))",
            "pass",
            "golden_block_keys",
        ),
    ),
    *bugs(
        "pdtransport.kv.keys",
        "chunk_keys",
        (
            "place_of_a_picture_is_not_in_the_key",
            "chunk_keys",
            "places[seen] - first",
            "0",
            "a_picture_changes_the_chunks_from_where_it_begins",
        ),
        (
            "lossy_chunks_share_the_key",
            "chunk_keys",
            "if space.codec:",
            "if False:",
            "whatever_kv_depends_on_changes_every_key",
        ),
    ),
    *bugs(
        "pdtransport.kv.fingerprint",
        "fingerprint",
        (
            "fields_of_the_peer_alone_are_not_compared",
            "compare",
            "{*ours, *yours}",
            "{*ours}",
            "a_field_that_one_side_lacks_is_a_mismatch",
        ),
    ),
    *bugs(
        "pdtransport.kv.geometry",
        "geometry",
        (
            "page_after_the_last_is_held",
            "KVGeometry.runs",
            "ids.max() >= self.num_blocks",
            "ids.max() > self.num_blocks",
            "pages_and_heads_not_held_are_refused",
        ),
        (
            "replicas_do_not_share_the_load",
            "head_sources",
            "first + me % (end - first)",
            "first",
            "replicas_share_the_load",
        ),
    ),
    *bugs(
        "pdtransport.kv.arrays",
        "geometry",
        (
            "strided_array_is_dense",
            "Layout.dense",
            "given == dense",
            "True",
            "an_array_that_is_not_dense_is_refused",
        ),
    ),
]

"""The interface of a placement policy: its inputs, a request and the candidate servers, and its result.

A policy gets immutable values, never the router's own objects. It chooses among the servers that can serve the request
now, and again for each retry. See docs/adding/policy.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pdtransport.router.settings import RouterPlacement

Role = Literal["prefill", "decode"]


class RequestView(NamedTuple):
    """A request that needs a server."""

    role: Role  # of the server to choose; decode's is chosen first
    decode: str  # name of the decode server that was chosen, if role is prefill; else empty
    model: str  # as the client wrote it
    stream: bool
    prompt_tokens: int  # exact for token ids, else characters / 4
    prompt_bytes: int  # of the prompt's JSON text
    # Digests of the prompt's first 1, 2, ... chunks (affinity_chunk_chars); they differ by model and cache_salt.
    prefix_keys: tuple[bytes, ...]


class ServerView(NamedTuple):
    """A server that can serve the request, with the work in progress there that this router sent."""

    name: str  # unique within its role
    url: str
    requests: int
    prompt_tokens: int
    load: int  # what least_loaded compares: prompt_tokens of a prefill server, requests of a decode server


class PlacementPolicy(ABC):
    """Chooses servers. The router calls it from one thread, one call at a time.

    Raises:
        SettingsError: the settings are unusable, or something is missing; the router then does not start.
    """

    def __init__(self, settings: RouterPlacement) -> None:
        self.settings = settings

    @abstractmethod
    def choose(self, request: RequestView, servers: Sequence[ServerView]) -> str:
        """Return the name of one of ``servers``, which is not empty.

        If this raises, answers too late or names no candidate, the failure is counted and ``least_loaded`` chooses.
        """

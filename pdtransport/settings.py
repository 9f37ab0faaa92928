"""The settings of one instance, as one tree of pydantic models.

The connector's ``kv_connector_extra_config``, ``topology.yaml`` and the Python API all parse into these models, so each
setting has one name, one default and one description. Units are in the names: ``_s`` seconds, ``_bytes`` bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pdtransport.errors import SettingsError
from pdtransport.system.hosts import CURVE_PEER, checked_peer, is_loopback

LinkName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,32}$")]  # links/registry.py knows which links exist

# Default control port of rank 0 by kv_role, so that a prefill and a decode server on one host need no settings. Each
# role has room for 100 workers (ranks times data-parallel replicas) before its ports reach those of the next role.
DEFAULT_PORTS = {"kv_both": 7570, "kv_producer": 7670, "kv_consumer": 7770}


class Section(BaseModel):
    """Base of every settings section: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class _Checked(Section):
    """A section of :class:`Settings`, which Python code can also construct by itself."""

    if not TYPE_CHECKING:  # type checkers derive the parameters from the fields

        def __init__(self, **data: Any) -> None:
            """Raises SettingsError: one line that names the key, what is wrong and what is allowed."""
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise SettingsError(f"{type(self).__name__}: {one_line(error)}") from None

        # Let pydantic bypass __init__ for a nested section, which must raise pydantic's own error, not SettingsError.
        __init__.__pydantic_base_init__ = True


class ControlSettings(_Checked):
    """The ZeroMQ control channel."""

    host: str = Field(
        "127.0.0.1",
        description="Address that this instance binds and at which peers reach it. If unset, read from the variable "
        "PDTRANSPORT_CONTROL_HOST.",
    )
    port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port of rank 0; rank r binds port + r, replicas follow. Unset: 7670 for kv_producer, 7770 for "
        "kv_consumer, 7570 for kv_both and the Python API. 0 lets the system choose (Python API only). "
        "If unset, read from the variable PDTRANSPORT_CONTROL_PORT.",
    )
    heartbeat_s: float = Field(0.5, gt=0, le=60, description="Interval between heartbeats on an open connection.")
    liveness_s: float = Field(
        2.0,
        gt=0,
        le=600,
        description="A peer that was silent for this long counts as dead, and its transfers end. (The end of a "
        "process, or closed connections, are noticed within a second.)",
    )
    connect_s: float = Field(
        2.0,
        gt=0,
        le=600,
        description="A peer that did not answer Hello for this long counts as unreachable, and its transfers fail.",
    )
    max_frame_bytes: int = Field(
        4 << 20,
        ge=4096,
        le=64 << 20,
        description="Maximum size of a control frame; larger ones are refused before they are read.",
    )
    curve_public_key_file: Path | None = Field(
        None, description="CURVE key pair of this instance; made with `pdlaunch keys`. Unset: no encryption."
    )
    curve_secret_key_file: Path | None = Field(None, description="Secret key of this instance's CURVE key pair.")
    curve_server_key: str | None = Field(
        None,
        description="Z85 public key that peers we connect to must hold. Default: our own public key (one shared pair).",
    )
    curve_allowed_keys: tuple[str, ...] | None = Field(
        None, description="Z85 public keys that may connect. Default: only our own public key (one shared pair)."
    )
    allow_plaintext: bool = Field(
        False,
        description="Allow addresses other than loopback without CURVE, for this instance and its peers, on a "
        "trusted, isolated network.",
    )
    peers: tuple[str, ...] | None = Field(
        None,
        max_length=4096,
        description="Hosts from which pages may be fetched when a request names them: addresses, networks "
        "(10.1.0.0/16), names, or curve:KEY for any host that proves that key. Unset: only loopback "
        "addresses of this machine; callers of the Python API are not restricted. pdlaunch fills it in.",
    )

    @field_validator("peers")
    @classmethod
    def _checked_peers(cls, peers: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if peers is None else tuple(checked_peer(peer) for peer in peers)

    @model_validator(mode="after")
    def _closed_by_default(self) -> ControlSettings:
        if (self.curve_public_key_file is None) != (self.curve_secret_key_file is None):
            raise ValueError("curve_public_key_file and curve_secret_key_file must be set together")
        if self.curve_secret_key_file is None and any(peer.startswith(CURVE_PEER) for peer in self.peers or ()):
            raise ValueError(
                "peers: a curve:KEY entry needs a key pair: set curve_public_key_file and curve_secret_key_file"
            )
        if self.needs_keys(self.host):
            raise ValueError(
                f"host {self.host!r} is not loopback, so the control channel needs CURVE keys: make a pair with "
                "`pdlaunch keys DIR` and set curve_public_key_file and curve_secret_key_file, or allow_plaintext: "
                "true on a trusted network"
            )
        return self

    def base_port(self, role: str = "kv_both") -> int:
        """Control port of rank 0 of an instance whose ``kv_role`` is ``role``. 0: the system chooses."""
        return DEFAULT_PORTS.get(role, DEFAULT_PORTS["kv_both"]) if self.port is None else self.port

    def needs_keys(self, host: str) -> bool:
        """Whether traffic with ``host`` leaves this machine and needs CURVE keys that are not set.

        False if there are keys, or plaintext is allowed.
        """
        return self.curve_secret_key_file is None and not self.allow_plaintext and not is_loopback(host)


class LinkSettings(_Checked):
    """The links that move pages between two workers."""

    order: tuple[LinkName, ...] = Field(
        ("cuda_ipc", "cma", "ucx"),
        min_length=1,
        description="Links to try for a pair, best first; the first that both ends can use is used. cuda_ipc is for "
        "KV in GPU memory, cma and shm (only tried if listed) for KV in host memory; links for the other "
        "kind of memory are skipped. Other packages add links by entry point.",
    )
    require: LinkName | None = Field(
        None, description="Refuse a peer that can't use this link, instead of using a slower one."
    )
    batch_bytes: int = Field(
        4 << 20, ge=64 << 10, le=256 << 20, description="Largest batch of host memory: pages gathered into one send."
    )
    window_bytes: int = Field(
        64 << 20,
        ge=256 << 10,
        description="Maximum bytes of one transfer that are announced but not yet received by decode.",
    )
    gpu_batch_bytes: int = Field(
        1 << 30,
        ge=64 << 10,
        le=4 << 30,
        description="Largest batch of GPU memory, copied by one kernel. Smaller batches overlap slightly more, but "
        "make a GPU shared by prefill and decode switch between the two more often.",
    )
    gpu_window_bytes: int = Field(
        4 << 30,
        ge=256 << 10,
        description="window_bytes for transfers from GPU memory, which need no intermediate memory.",
    )
    staging_bytes: int = Field(
        32 << 20,
        ge=512 << 10,
        description="Size of each of the ucx link's two rings of staging slots, one for sending and one for receiving.",
    )
    gpu_slot_bytes: int = Field(
        16 << 20,
        ge=64 << 10,
        le=256 << 20,
        description="Size of the ucx link's staging slots for GPU memory, which is also its largest batch; must be "
        "equal on both ends.",
    )
    gpu_staging_bytes: int = Field(
        64 << 20,
        ge=512 << 10,
        description="Size of each of the ucx link's two rings of these slots, allocated at first use; a prefill "
        "worker uses one, a decode worker the other. In GPU memory, in addition to the model, if UCX "
        "sends it directly; else in pinned host memory.",
    )
    ucx_gpu_memory: Literal["auto", "direct", "staged"] = Field(
        "auto",
        description="How the ucx link moves GPU memory. direct: UCX sends it (GPUDirect, CUDA IPC), or the peer is "
        "refused; staged: through pinned host memory; auto: direct where UCX can, else staged.",
    )
    min_bandwidth_bytes_s: float = Field(
        0, ge=0, description="Refuse a pair whose measured bandwidth is below this. 0: only measure and report."
    )
    probe_bytes: int = Field(
        4 << 20,
        ge=0,
        le=256 << 20,
        description="Bytes of scratch memory that are moved a few times to measure each pair, at most one batch. 0: "
        "no measurement.",
    )


class DeadlineSettings(_Checked):
    """Deadlines of all waits. Each starts when the awaited event becomes possible."""

    retry_s: float = Field(
        0.25, gt=0, le=60, description="How long to wait for an answer before a message is sent again."
    )
    answer_s: float = Field(
        5.0, gt=0, le=600, description="How long a live peer may leave messages unanswered before the transfer fails."
    )
    arrival_s: float = Field(
        15.0,
        gt=0,
        le=3600,
        description="How long to wait for prefill to learn of a granted transfer's request (which may be lost).",
    )
    queue_s: float = Field(
        600.0,
        gt=0,
        le=86400,
        description="How long a request may queue on a live prefill instance before its first page.",
    )
    stall_s: float = Field(60.0, gt=0, le=3600, description="Longest pause between batches once pages flow.")
    verify_s: float = Field(10.0, gt=0, le=600, description="From commit to all pages placed and verified.")
    hold_s: float = Field(
        30.0, gt=0, le=3600, description="How long prefill keeps finished pages that no decode instance has claimed."
    )
    claim_s: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="How long prefill keeps pages that a decode instance has claimed while its request is queued.",
    )
    ack_s: float = Field(
        30.0, gt=0, le=3600, description="From commit until decode's ack; then prefill frees its pages."
    )
    resends: int = Field(
        2, ge=0, le=100, description="How often a damaged batch is sent again before the transfer fails."
    )


class IntegritySettings(_Checked):
    """Whether pages are verified."""

    checksum: Literal["full", "off"] = Field(
        "full",
        description="on: checksum every page at its source and verify it at its destination. off: trust the link.",
    )


class ObserveSettings(_Checked):
    """What a worker records about finished transfers."""

    recent_transfers: int = Field(
        512, ge=0, le=65536, description="Number of finished transfers whose timeline a worker keeps."
    )
    audit_dir: Path | None = Field(
        None,
        description="Directory for a JSON line with the SHA-256 of each sent and received block (for tests; slow).",
    )


class PatchSettings(_Checked):
    """Hooks into vLLM's own code that have no other setting. A hook whose check of vLLM's code fails is off."""

    engine_probe: bool = Field(
        True, description="Answer GET /pd/engine in vLLM's HTTP server: routers notice engines that hang."
    )
    late_caching: bool = Field(
        True,
        description="Enter a received request's blocks into the prefix cache during its first step, not before it. "
        "Part of step_ahead.",
    )
    hold_back: bool = Field(
        True,
        description="Process a received request's first token before the next step is launched, if launching takes "
        "as long as computing. Part of step_ahead.",
    )
    engine_loop: bool = Field(
        True,
        description="End the wait of an idle engine step when a client request arrives, instead of waiting at "
        "most 4 ms.",
    )
    first_token: bool = Field(True, description="Let decode continue from the first token that prefill sampled.")
    cached_usage: bool = Field(
        True,
        description="Report as cached the prompt tokens that prefill found in its caches, not all transferred tokens.",
    )
    adapter_generations: bool = Field(
        True, description="Keep separate prefix-cache entries for each content of a replaced LoRA adapter."
    )
    early_digest: bool = Field(True, description="Start the digest of the checkpoint before the model is loaded.")
    packed_weights: bool = Field(
        True,
        description="Checksum weights before CPU kernels pack them, after which they can't be read. Without this, "
        "weights that may have changed count as different.",
    )


MAX_SALT = 4096  # characters


class PoolUse(_Checked):
    """How an engine uses the shared pool of stored prefixes (``pdpool``)."""

    name: str = Field("default", pattern=r"^[A-Za-z0-9._\-]{1,32}$", description="Name of the pool on this host.")
    dir: Path | None = Field(None, description="Directory of the pool. Default: that of pdpool.")
    address: str | None = Field(
        None,
        max_length=300,
        description="tcp://HOST:PORT of a pool on another host (pdpool --listen), instead of name and dir. It uses the "
        "keys and links of this instance, and must be able to reach control.host.",
    )
    staging_bytes: int = Field(
        128 << 20,
        ge=1 << 20,
        le=64 << 30,
        description="Staging memory of each of a worker's two clients of such a pool.",
    )
    load: bool = Field(
        True,
        description="Load chunks of prompts from the pool. Requires the engine's kv_load_failure_policy: recompute.",
    )
    hint: bool = Field(
        True,
        description="Send hints, so that the pool reads the chunks of queued requests from lower tiers into memory.",
    )
    store: bool = Field(True, description="Store the chunks of computed prompts in the pool.")
    generated: bool = Field(
        True, description="Also store the chunks that answers complete: they are part of the next turn's prompt."
    )
    salt: str = Field(
        "",
        max_length=MAX_SALT,
        repr=False,
        description="Only engines with the same salt find each other's chunks; each request's cache_salt is added. "
        "Put a secret salt into salt_file: command lines are visible to all users of a machine, and vLLM "
        "logs them.",
    )
    salt_file: Path | None = Field(None, description="File with the salt, instead of salt.")
    tenant: str = Field(
        "",
        pattern=r"^([A-Za-z0-9._\-]{1,64})?$",
        description="Tenant whose quota the stored chunks count against.",
    )
    chunk_blocks: int = Field(
        1,
        ge=1,
        le=4096,
        description="vLLM blocks per chunk, the unit of storing and loading. Must be equal for engines that share "
        "chunks.",
    )
    shards: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="Number of parts, by KV heads, in which a chunk is stored. Engines of different tensor-parallel "
        "sizes share chunks if all set the largest of their sizes. Default: the engine's own size.",
    )
    codec: str = Field(
        "none",
        pattern=r"^[a-z0-9][a-z0-9._\-]{0,31}$",
        description="fp8 or int4: tiers below the pool's memory may store the chunks lossily, with one scale per "
        "head. Only engines with the same setting share chunks. none: loaded bytes equal the stored "
        "bytes.",
    )
    lookup_s: float = Field(
        0.1,
        gt=0,
        le=60,
        description="Lookup timeout; on expiry the request does not use the pool.",
    )
    load_s: float = Field(5.0, gt=0, le=600, description="Load timeout; on expiry vLLM recomputes.")
    store_s: float = Field(
        5.0,
        gt=0,
        le=600,
        description="Store timeout, queueing included; on expiry the store is abandoned and its pages are freed.",
    )
    hand_off_s: float | None = Field(
        None,
        ge=0,
        le=3600,
        description="Prefill frees a finished prompt's pages if decode has not granted room for them within this "
        "time and the pool has all whole chunks; decode then loads these from the pool, if it uses it. "
        "Unset: prefill holds them until deadlines.hold_s.",
    )
    max_queued_chunks: int = Field(
        1024,
        ge=1,
        le=1 << 20,
        description="Maximum number of chunks queued for storing in a worker; further ones are not stored.",
    )

    @model_validator(mode="after")
    def _one_salt(self) -> PoolUse:
        if self.salt and self.salt_file is not None:
            raise ValueError("salt and salt_file are both set: keep one")
        if self.address is not None and self.dir is not None:
            raise ValueError("address and dir are both set: keep one")
        return self

    def with_salt(self) -> PoolUse:
        """A copy with the salt read from ``salt_file``.

        Raises:
            SettingsError: the file can't be read, is empty or too long; the text never shows the salt.
        """
        if self.salt_file is None:
            return self
        try:
            salt = self.salt_file.read_bytes()[: MAX_SALT + 1].decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsError(f"pool.salt_file: can't read {self.salt_file}: {reason}") from None
        if not 0 < len(salt) <= MAX_SALT:
            raise SettingsError(f"pool.salt_file: {self.salt_file} holds no salt of 1 to {MAX_SALT} characters")
        return self.model_copy(update={"salt": salt, "salt_file": None})


class Settings(_Checked):
    """All settings of one instance of pdtransport."""

    control: ControlSettings = ControlSettings()
    links: LinkSettings = LinkSettings()
    deadlines: DeadlineSettings = DeadlineSettings()
    integrity: IntegritySettings = IntegritySettings()
    observe: ObserveSettings = ObserveSettings()
    pool: PoolUse | None = Field(None, description="Use a shared pool of stored prefixes on this host. Unset: none.")
    max_transfers: int = Field(
        4096,
        ge=1,
        le=1 << 20,
        description="Maximum number of live transfers, and of early grants, of an instance; further ones are refused.",
    )
    tombstones: int = Field(
        16384,
        ge=16,
        le=1 << 22,
        description="Number of ended transfers that an instance remembers, to answer late messages about them.",
    )
    model_id: str | None = Field(
        None,
        description="Name that identifies the loaded weights, instead of a digest over every byte of the checkpoint. "
        "Set it only if engines with the same name certainly have the same weights.",
    )
    weights_digest_s: float = Field(
        1800.0,
        gt=0,
        le=86400,
        description="How long a start may wait for the digest of the checkpoint, which is computed while the model "
        "loads and remembered in $XDG_CACHE_HOME/pdtransport.",
    )
    share_received: Literal["all", "trusted", "none"] = Field(
        "all",
        description="Which received KV may enter this vLLM instance's prefix cache and the pool, where other "
        "requests find it: all, that of trusted_producers, or none. The request itself always uses it.",
    )
    trusted_producers: tuple[Annotated[str, Field(min_length=1, max_length=300)], ...] = Field(
        (),
        max_length=1024,
        description="Prefill workers whose KV may be shared: HOST as requests name it, ADDRESS, NETWORK (10.0.0.0/24), "
        "HOST:PORT or HOST:FIRST-LAST (a port for each rank). Only with share_received: trusted.",
    )
    watch_weights: bool = Field(
        True,
        description="Checksum the loaded weights at start, and again after anything that may change them "
        "(reload_weights, wake_up, update_weights, any collective_rpc not known to be harmless), so that "
        "changed weights get another identity. False: asserts that they never change while this engine "
        "runs.",
    )
    idle_wait_s: float = Field(
        0.05,
        ge=0,
        le=0.1,
        description="How long an engine step with nothing to compute waits for a transfer to end, instead of "
        "polling. Client requests end the wait; if vLLM's engine is not as expected and they can't be "
        "detected, it is at most 4 ms.",
    )

    step_ahead: bool = Field(
        True,
        description="Resume a request in the first engine step after its pages arrived, not two steps later. No "
        "effect if vLLM's scheduler is not as expected.",
    )
    short_priming: bool = Field(
        True,
        description="Prime vLLM's detokenizer with a long prompt's last tokens only: the answer's first token is "
        "sent up to 13 ms sooner for 16,000 tokens. Requires vLLM's statistics to be on.",
    )

    spin_s: float | None = Field(
        None,
        ge=0,
        le=60,
        description="How long vLLM's processes spin for each other's next message before they sleep. Default: 0.001 "
        "on the CPU platform, where spinning takes cores from the model; elsewhere vLLM's own value of 1 "
        "s.",
    )

    patches: PatchSettings = PatchSettings()

    def calling_anyone(self) -> Settings:
        """A copy without ``control.peers``, for a transport whose callers enforce it themselves."""
        return self.model_copy(update={"control": self.control.model_copy(update={"peers": None})})

    @model_validator(mode="after")
    def _producers(self) -> Settings:
        if (self.share_received == "trusted") != bool(self.trusted_producers):
            raise ValueError("share_received: trusted and trusted_producers go together: set both, or neither")
        return self

    @field_validator("model_id")
    @classmethod
    def _not_blank(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("model_id is blank: leave it out or give the weights a name")
        return value

    @classmethod
    def parse(cls, raw: dict[str, Any] | None, *, where: str = "kv_connector_extra_config") -> Settings:
        """Parse ``raw``. ``PDTRANSPORT_CONTROL_HOST`` and ``PDTRANSPORT_CONTROL_PORT`` are defaults for missing values.

        Raises:
            SettingsError: one line that names the key, what is wrong and what is allowed.
        """
        data = dict(raw or {})
        control = dict(data.get("control") or {}) if isinstance(data.get("control") or {}, dict) else data["control"]
        if isinstance(control, dict):
            for key, variable in (("host", "PDTRANSPORT_CONTROL_HOST"), ("port", "PDTRANSPORT_CONTROL_PORT")):
                if key not in control and os.environ.get(variable):
                    control[key] = os.environ[variable]
        data["control"] = control
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SettingsError(f"{where}: {one_line(error)}") from None


def one_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as ``key.path: what is wrong``, and the number of further problems."""
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    path = ".".join(str(part) for part in first["loc"]) or "value"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {message}{more}"

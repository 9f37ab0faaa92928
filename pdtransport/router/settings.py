"""The router's settings: one model for ``pdrouter``, the ``router:`` section of ``topology.yaml`` and Python."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from pdtransport.errors import SettingsError
from pdtransport.router.keyfiles import ClientKey, all_keys, client_keys
from pdtransport.serving.keyfiles import read_lines
from pdtransport.serving.site_settings import HOSTS_HELP, ORIGINS_HELP, HostName, Origin
from pdtransport.settings import ControlSettings, Section, one_line

MAX_ENDPOINTS = 256  # per role; each has a probe task and its own metric series


class EndpointSettings(Section):
    """One vLLM server."""

    url: str = Field(description="Base URL of the server, without /v1: http://127.0.0.1:8100")
    name: str = Field("", description="Name in headers, traces and metrics. Default: host:port of the URL.")
    control_host: str | None = Field(
        None,
        description="Address of rank 0's control channel. Default: learned from the server's metrics, or prefill's "
        "first answer.",
    )
    control_port: int | None = Field(None, ge=1, le=65535, description="Port of rank 0's control channel.")
    tp_size: int = Field(
        1, ge=1, le=1024, description="Tensor-parallel ranks; used until an answer gives their number."
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("url"), str):
            url = data["url"].strip().rstrip("/")
            data = {**data, "url": url, "name": data.get("name") or urlsplit(url).netloc}
        return data

    @model_validator(mode="after")
    def _usable(self) -> EndpointSettings:
        parts = urlsplit(self.url)
        try:
            _ = parts.port
        except ValueError:  # the error's text would show the value, which may be part of user:password@host
            raise ValueError("a server URL must have a numeric port, and no user or password") from None
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"{self.url!r} is not a server URL: give http://HOST:PORT")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("a server URL must not have a user, password, query or fragment")
        if not self.name.isprintable() or len(self.name) > 128:
            raise ValueError("a name must have at most 128 printable characters")
        if (self.control_host is None) != (self.control_port is None):
            raise ValueError("control_host and control_port must be set together")
        return self

    @classmethod
    def parse(cls, text: str) -> EndpointSettings:
        """Parse ``URL[@CONTROL_HOST:PORT[/TP_SIZE]]``.

        Raises:
            ValueError: one line that says what is wrong.
        """
        url, at, control = text.partition("@")
        if not at:
            return cls(url=url)
        address, _, ranks = control.partition("/")
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or (ranks and not ranks.isdecimal()):
            raise ValueError(f"{control!r} is not a control address: give URL@HOST:PORT or URL@HOST:PORT/TP_SIZE")
        return cls(url=url, control_host=host.strip("[]"), control_port=int(port), tp_size=int(ranks or 1))


def _endpoint(value: Any) -> Any:
    return EndpointSettings.parse(value) if isinstance(value, str) else value


_Endpoint = Annotated[EndpointSettings, BeforeValidator(_endpoint)]


class RouterTimeouts(Section):
    """All timeouts of the router."""

    connect_s: float = Field(5.0, gt=0, le=600, description="Opening a connection to a server.")
    prefill_s: float = Field(
        600.0,
        gt=0,
        le=86400,
        description="Prefill's whole answer, queueing included; on expiry decode serves alone.",
    )
    first_byte_s: float = Field(
        900.0, gt=0, le=86400, description="The first bytes of a streamed answer from decode, queueing included."
    )
    stall_s: float = Field(300.0, gt=0, le=86400, description="Longest pause of decode within an answer.")
    client_stall_s: float = Field(
        120.0, gt=0, le=86400, description="A client that reads nothing for this long is disconnected."
    )
    client_head_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="Receiving a request line and headers, from the opening of a new connection or from the first "
        "byte on a reused one; on expiry it is closed.",
    )
    client_body_s: float = Field(60.0, gt=0, le=3600, description="Receiving a client's whole request body.")
    total_s: float = Field(3600.0, gt=0, le=604800, description="One request, from its arrival to its last byte.")
    drain_s: float = Field(
        10.0, ge=0, le=3600, description="Time for requests in progress to finish when the router stops."
    )
    worker_status_s: float = Field(1.0, gt=0, le=60, description="Fetching the workers' part of a trace.")


class RouterHealth(Section):
    """When a server counts as healthy."""

    interval_s: float = Field(
        2.0, gt=0, le=3600, description="Interval between health checks (GET /health) of each server."
    )
    timeout_s: float = Field(5.0, gt=0, le=600, description="A health check unanswered for this long has failed.")
    engine_s: float = Field(
        5.0,
        ge=0,
        le=600,
        description="A server is unhealthy while its engine takes longer than this to answer between two steps; its "
        "/health answers even if the engine is stopped. 0: engines are not probed.",
    )
    backoff_max_s: float = Field(
        30.0, gt=0, le=3600, description="An unhealthy server is checked at intervals that double up to this."
    )
    failures: int = Field(
        2,
        ge=1,
        le=100,
        description="Consecutive unanswered checks that make a server unhealthy (one refused connection is enough).",
    )
    eject_after: int = Field(
        3,
        ge=1,
        le=1000,
        description="Consecutive failed requests after which a server is ejected, if another can serve.",
    )
    eject_s: float = Field(10.0, gt=0, le=3600, description="How long a server stays ejected.")


class RouterHandOff(Section):
    """Reports on the outcome of hand-offs."""

    wait_s: float = Field(
        0.02,
        ge=0,
        le=5,
        description="How long decode's first bytes may be held back for its workers' report on the hand-off, which "
        "normally arrives first. 0: not at all.",
    )
    warn_after: int = Field(
        10,
        ge=1,
        le=1_000_000,
        description="Consecutive requests that a pair of servers fails to hand over before a warning is logged.",
    )


class RouterPlacement(Section):
    """Which server gets a request."""

    policy: str = Field(
        "least_loaded",
        description="Placement policy: least_loaded, or another package's entry point in the group "
        "pdtransport.router.placement.",
    )
    affinity_entries: int = Field(
        65536,
        ge=0,
        le=1 << 22,
        description="Prompt-prefix chunks remembered for each role, about 200 bytes each. 0: none.",
    )
    affinity_chunk_chars: int = Field(
        1024, ge=64, le=1 << 20, description="Characters of the prompt's JSON text in one chunk."
    )
    affinity_chunks: int = Field(64, ge=1, le=4096, description="Maximum number of chunks of one prompt to match.")
    affinity_margin_tokens: int = Field(
        16384,
        ge=0,
        description="A prefill server that had the prefix is chosen while it has at most this many more prompt "
        "tokens in progress than the least loaded.",
    )
    affinity_margin_requests: int = Field(
        8,
        ge=0,
        description="A decode server that had the prefix is chosen while it has at most this many more requests in "
        "progress than the least loaded.",
    )


class RouterPoolHint(Section):
    """Hints to the shared pool about prompts that will be needed soon."""

    url: str | None = Field(
        None, description="HTTP API of the pool (pdpool --http): http://HOST:PORT. Unset: no hints are sent."
    )
    key_file: Path | None = Field(None, description="File with a key of that API (pdpool --http-key-file).")
    salt_file: Path | None = Field(
        None,
        description="The engines' pool.salt_file; required if they have a salt, because the pool needs it to "
        "compute keys.",
    )
    text: Literal["off", "tokenize"] = Field(
        "off",
        description="Text prompts. tokenize: get their token ids from a prefill server first, which then tokenizes "
        "them twice. off: leave hints to the engines, which send them once a request waits.",
    )
    timeout_s: float = Field(2.0, gt=0, le=60, description="A hint that takes longer is abandoned.")
    max_queued: int = Field(
        64, ge=1, le=4096, description="Maximum number of hints in progress; further ones are dropped."
    )

    @field_validator("url", mode="before")
    @classmethod
    def _bare(cls, url: Any) -> Any:
        return url.strip().rstrip("/") if isinstance(url, str) else url

    @model_validator(mode="after")
    def _whole(self) -> RouterPoolHint:
        if self.url is None:
            return self
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or "@" in self.url or parts.path.strip("/"):
            raise ValueError("url must be http://HOST:PORT of the pool's HTTP API, without user and path")
        if self.key_file is None:
            raise ValueError("url needs key_file, a file with a key of the pool's HTTP API")
        return self


class RouterSettings(Section):
    """All settings of the router."""

    prefill: tuple[_Endpoint, ...] = Field(
        min_length=1,
        max_length=MAX_ENDPOINTS,
        description="Prefill servers, each URL[@CONTROL_HOST:PORT[/TP_SIZE]].",
    )
    decode: tuple[_Endpoint, ...] = Field(
        min_length=1,
        max_length=MAX_ENDPOINTS,
        description="Decode servers, each URL[@CONTROL_HOST:PORT[/TP_SIZE]].",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on. 0 lets the system choose.")
    admin_host: str = Field("127.0.0.1", description="Address that the admin port listens on.")
    admin_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Serve /pd/* and /metrics on this port only. Unset: on the main port, for loopback clients only, "
        "or with an admin key for its holders.",
    )
    admin_api_key: SecretStr | None = Field(
        None,
        description="Key that /pd/* and /metrics require from every client as Authorization: Bearer KEY. Also read "
        "from the variable PDROUTER_ADMIN_API_KEY.",
    )
    admin_api_key_file: Path | None = Field(None, description="File with such keys, one a line; read at start.")
    allowed_hosts: tuple[HostName, ...] = Field((), max_length=64, description=HOSTS_HELP)
    allowed_origins: tuple[Origin, ...] = Field(
        (), max_length=64, description=ORIGINS_HELP.format(paths="/v1/* (no others)")
    )
    dispatch: Literal["concurrent", "serial"] = Field(
        "concurrent",
        description="concurrent: prefill and decode get a request at once. serial: decode after prefill's answer.",
    )
    first_token: Literal["auto", "off"] = Field(
        "auto",
        description="auto: a stream begins with the token that prefill sampled and decode continues from it, where "
        "the result is exact: the first token comes earlier, the gap to the second is longer. off: decode samples it.",
    )
    api_key: SecretStr | None = Field(
        None,
        description="Key that clients must send as Authorization: Bearer KEY. Also read from the variable "
        "PDROUTER_API_KEY.",
    )
    api_key_file: Path | None = Field(
        None,
        description="File with such keys, one a line; read at start. A line KEY TENANT separates the prefixes cached "
        "by this tenant's requests from all others'; if there are several keys, a key without a tenant "
        "is its own tenant.",
    )
    share_prefixes: bool = Field(
        False,
        description="Requests with keys without a tenant share cached prefixes: such clients can learn by timing "
        "what others sent.",
    )
    tenant_secret_file: Path | None = Field(
        None,
        description="File with the secret (32 characters or more) from which each tenant's cache_salt is derived: "
        "the same for all routers; if it changes, cached prefixes are no longer found. Also read from "
        "the variable PDROUTER_TENANT_SECRET.",
    )
    upstream_api_key: SecretStr | None = Field(
        None,
        description="Key that the servers require. Also read from the variable PDROUTER_UPSTREAM_API_KEY. Unset: a "
        "client's Authorization header is passed on, unless the router has client keys.",
    )
    upstream_api_key_file: Path | None = Field(None, description="File with the key that the servers require.")
    max_body_bytes: int = Field(
        16 << 20, ge=1024, le=1 << 30, description="Maximum size of a request body; larger ones are refused (413)."
    )
    max_inflight: int = Field(
        1024, ge=1, le=1 << 20, description="Maximum number of requests in progress; further ones are refused (503)."
    )
    max_buffered_bytes: int = Field(
        512 << 20,
        ge=1024,
        description="Maximum total size of request bodies held; further requests are refused (503). Memory use is up "
        "to 5 times this.",
    )
    max_connections: int = Field(
        4096,
        ge=1,
        le=1 << 20,
        description="Maximum number of client connections. A further one replaces the longest idle one, or is closed "
        "if none is idle.",
    )
    max_idle_per_client: int = Field(
        1024,
        ge=1,
        le=1 << 20,
        description="Maximum number of idle connections of one client address; a further one replaces its longest "
        "idle one.",
    )
    max_header_bytes: int = Field(
        16384, ge=1024, le=1 << 20, description="Longest header line of a client or a server."
    )
    max_prefill_response_bytes: int = Field(
        8 << 20, ge=4096, le=1 << 30, description="Maximum size of prefill's answer; a larger one counts as failed."
    )
    stream_buffer_bytes: int = Field(
        65536,
        ge=1024,
        le=16 << 20,
        description="Bytes of an answer that are buffered for a slow client (up to twice as many).",
    )
    upstream_connections: int = Field(
        1024,
        ge=1,
        le=1 << 20,
        description="Maximum number of connections to one server; further requests wait for one.",
    )
    keep_alive_s: float = Field(75.0, gt=0, le=3600, description="How long an idle client connection is kept.")
    upstream_keep_alive_s: float = Field(
        4.0,
        ge=0.1,
        le=3600,
        description="How long an idle server connection is kept (vLLM closes its own after 5 s).",
    )
    min_disagg_tokens: int = Field(
        0,
        ge=0,
        description="Prompts of fewer tokens (estimated as characters / 4 for text) go to decode alone.",
    )
    min_disagg_bytes: int = Field(0, ge=0, description="Prompts of fewer bytes of JSON go to decode alone.")
    prefill_retries: int = Field(
        1, ge=0, le=10, description="Number of other prefill servers to try before decode serves alone."
    )
    decode_retries: int = Field(1, ge=0, le=10, description="Number of retries after decode fails.")
    retry_after_s: int = Field(1, ge=0, le=3600, description="Retry-After header of a 503.")
    traces: int = Field(1024, ge=0, le=1 << 20, description="Number of requests whose timeline is kept.")
    curve_public_key_file: Path | None = Field(
        None,
        description="CURVE key pair for watching workers and fetching their status, if they require CURVE.",
    )
    curve_secret_key_file: Path | None = Field(None, description="Secret key of that pair.")
    curve_server_key: str | None = Field(
        None, description="Z85 public key that workers must hold. Default: our own public key (one shared pair)."
    )
    allow_plaintext: bool = Field(
        False,
        description="Watch workers on other machines and fetch their status without CURVE, on a trusted, isolated "
        "network.",
    )
    timeouts: RouterTimeouts = RouterTimeouts()
    health: RouterHealth = RouterHealth()
    hand_off: RouterHandOff = RouterHandOff()
    placement: RouterPlacement = RouterPlacement()
    pool_hint: RouterPoolHint = RouterPoolHint()

    @model_validator(mode="after")
    def _distinct(self) -> RouterSettings:
        for role, endpoints in (("prefill", self.prefill), ("decode", self.decode)):
            names = [endpoint.name for endpoint in endpoints]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {role} servers are called {twice[0]!r}: give each its own URL or name")
        if (self.curve_public_key_file is None) != (self.curve_secret_key_file is None):
            raise ValueError("curve_public_key_file and curve_secret_key_file must be set together")
        return self

    @property
    def control(self) -> ControlSettings:
        """Settings for watching workers and fetching their status."""
        return ControlSettings(
            curve_public_key_file=self.curve_public_key_file,
            curve_secret_key_file=self.curve_secret_key_file,
            curve_server_key=self.curve_server_key,
            allow_plaintext=self.allow_plaintext,
        )

    @classmethod
    def build(cls, raw: dict[str, Any], *, where: str = "router") -> RouterSettings:
        """Validate ``raw``.

        Raises:
            SettingsError: one line that names the key and says what is wrong with it.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise SettingsError(f"{where}: {one_line(error)}") from None

    def client_keys(self) -> tuple[ClientKey, ...]:
        """Keys of which clients must send one; empty: no key is needed.

        Raises:
            SettingsError: a key file can't be read, holds no key, or has an invalid line.
        """
        return client_keys(self.api_key, self.api_key_file, "api_key")

    def tenant_secret(self) -> str | None:
        """The secret from which tenants' salts are derived, if it is set.

        Raises:
            SettingsError: its file can't be read or is empty.
        """
        lines = all_keys(None, self.tenant_secret_file, "tenant_secret")
        return lines[0] if lines else None

    def admin_keys(self) -> tuple[str, ...]:
        """Keys of which /pd/* and /metrics need one; empty: no key is needed.

        Raises:
            SettingsError: a key file can't be read or holds no key.
        """
        return all_keys(self.admin_api_key, self.admin_api_key_file, "admin_api_key")

    def pool_secrets(self) -> tuple[str, str]:
        """The key of the pool's HTTP API and the engines' salt; empty if there is none.

        Raises:
            SettingsError: a file can't be read or is empty.
        """
        files = {"key_file": self.pool_hint.key_file, "salt_file": self.pool_hint.salt_file}
        key, salt = ("" if file is None else read_lines(file, f"pool_hint.{name}")[0] for name, file in files.items())
        return key, salt

    def server_key(self) -> str | None:
        """The key sent to servers, if one is set.

        Raises:
            SettingsError: the key file can't be read or holds no key.
        """
        keys = all_keys(self.upstream_api_key, self.upstream_api_key_file, "upstream_api_key")
        return keys[0] if keys else None

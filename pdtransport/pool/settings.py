"""Settings of the pool: one model for ``pdpool`` and for Python."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pdtransport.errors import SettingsError
from pdtransport.serving.site_settings import HOSTS_HELP, ORIGINS_HELP, HostName, Origin
from pdtransport.settings import ControlSettings, Settings, one_line
from pdtransport.system.hosts import CURVE_PEER, checked_peer

MAX_TENANTS = 256  # tenants with a quota
MAX_FOREIGN_TIERS = 4
OWN_TIERS = ("memory", "disk", "redis", "s3")
MAX_CHUNK_BYTES = 1 << 30
STAGING_BYTES = 128 << 20  # staging memory of a client of a remote pool; its copies are cut to fit
PolicyName = Literal["lru", "fifo", "mru", "lfu", "s3fifo"]
CODEC_NAME = r"^[a-z0-9][a-z0-9._\-]{0,31}$"
DESCRIPTORS = 4096  # soft limit of open files that pdpool asks for: one a client, API connection or remote connection
MAX_SOCKET_PATH = 107  # bytes that Linux allows for the path of a Unix socket

UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d{1,15})\s?([KMGT]iB)?")

TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._\-]{1,64}$")]
TierName = Annotated[str, Field(pattern=CODEC_NAME)]
CodecName = Annotated[str, Field(pattern=CODEC_NAME)]


def parse_size(text: str) -> int | None:
    """Parse a size in bytes: a number, or a number with a unit such as 64GiB; None if the text is no size."""
    parts = _SIZE.fullmatch(text)
    return None if parts is None else int(parts[1]) * UNITS[parts[2] or ""]


class AnyTierSettings(BaseModel):
    """Settings of every tier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: int = Field(ge=1 << 20, description="Maximum total size of its chunks.")
    codec: CodecName = Field(
        "none",
        description="Lossless codec: none, zstd (byte-shuffled; needs the zstandard package), or another package's.",
    )
    item_bytes: Literal[1, 2, 4] = Field(
        2, description="Bytes of one element of the KV cache, which zstd's byte shuffle sorts by: 2 for bfloat16."
    )


class TierSettings(AnyTierSettings):
    """Settings of every tier that comes with pdtransport."""

    threads: int = Field(2, ge=1, le=64, description="Chunks that are read or written at once.")


class ForeignTierSettings(AnyTierSettings):
    """Settings of a tier that another package adds, see :mod:`pdtransport.pool.tiers.registry`."""

    options: dict[str, str | int | float | bool] = Field({}, description="Options passed to the tier.")


class DiskSettings(TierSettings):
    """Settings of the disk tier: one checksummed file a chunk."""

    path: Path = Field(description="Directory for chunk files, used by this pool alone; created if missing.")
    threads: int = Field(8, ge=1, le=64, description="Chunks that are read or written at once.")
    direct: Literal["auto", "off"] = Field(
        "auto", description="auto: bypass the page cache where the file system supports it; off: use it."
    )


class RedisSettings(TierSettings):
    """Settings of the tier in Redis or Valkey."""

    url: str = Field(
        pattern=r"^(redis|rediss|unix)://[^@]*$",
        description="redis://host:port/0, rediss:// for TLS, or unix://path. No password in it: password_file.",
    )
    password_file: Path | None = Field(None, description="File with the password, if the server requires one.")
    timeout_s: float = Field(2.0, gt=0, le=60, description="Timeout of a request; on expiry the server counts as down.")
    rescan_s: float = Field(
        30.0, ge=0, le=86400, description="How often to look for chunks that other pools wrote. 0: at start only."
    )


class HttpSettings(BaseModel):
    """Settings of the HTTP API, which shows and manages the pool's content."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str = Field(
        pattern=r"^(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]+):\d{1,5}$",
        description="HOST:PORT to serve the HTTP API on; port 0: any free port.",
    )
    key_file: Path = Field(
        description="File with keys, one a line; requests show one as Authorization: Bearer KEY. Required on loopback "
        "too, because every user of the machine can reach it."
    )
    max_body_bytes: int = Field(4 << 20, ge=1 << 10, le=64 << 20, description="Longest request body.")
    allowed_hosts: tuple[HostName, ...] = Field((), max_length=64, description=HOSTS_HELP)
    allowed_origins: tuple[Origin, ...] = Field((), max_length=64, description=ORIGINS_HELP.format(paths="/pool/*"))

    @model_validator(mode="after")
    def _port(self) -> HttpSettings:
        if self.address[1] > 65535:
            raise ValueError(f"port {self.address[1]} is above 65535")
        return self

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


class RemoteSettings(BaseModel):
    """Settings of the listener for clients on other hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str = Field(
        description="HOST:PORT at which clients on other hosts reach this pool; pages use the next port as well. An "
        "address other than loopback needs CURVE keys."
    )
    curve_public_key_file: Path | None = Field(
        None, description="CURVE key pair that this pool and its clients share; made with `pdlaunch keys`."
    )
    curve_secret_key_file: Path | None = Field(None, description="Secret key of that pair.")
    allow_plaintext: bool = Field(False, description="Allow connections without keys, on a trusted, isolated network.")
    peers: tuple[str, ...] = Field(
        (),
        max_length=4096,
        description="Further addresses and networks (10.1.0.0/16) from which clients' pages may be fetched, besides "
        "the address that a client connects from: for clients with a control.host on another interface.",
    )
    liveness_s: float = Field(
        10.0,
        gt=0,
        le=600,
        description="A client that was silent for this long is disconnected, and all that it holds is released.",
    )
    max_clients: int = Field(64, ge=1, le=1024, description="Maximum number of connected clients on other hosts.")

    @model_validator(mode="after")
    def _can_be(self) -> RemoteSettings:
        host, colon, port = self.listen.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 1 <= int(port) <= 65534:
            raise ValueError(f"listen is {self.listen!r}: give HOST:PORT, with a port of 1 to 65534")
        self.control(0)
        return self

    @field_validator("peers")
    @classmethod
    def _checked_peers(cls, peers: tuple[str, ...]) -> tuple[str, ...]:
        checked = tuple(checked_peer(peer) for peer in peers)
        for peer in checked:
            if "/" not in peer or peer.startswith(CURVE_PEER):
                raise ValueError(f"{peer[:80]!r} is neither an address nor a network: write 10.1.2.3, or 10.1.0.0/16")
        return checked

    @property
    def networks(self) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
        return tuple(ipaddress.ip_network(peer) for peer in self.peers)

    @property
    def host(self) -> str:
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])

    def control(self, offset: int) -> ControlSettings:
        """The settings of a control channel at these settings' port plus ``offset``.

        Raises:
            ValueError: CURVE keys are missing.
        """
        try:
            return ControlSettings.model_validate(
                {
                    "host": self.host,
                    "port": self.port + offset,
                    "curve_public_key_file": self.curve_public_key_file,
                    "curve_secret_key_file": self.curve_secret_key_file,
                    "allow_plaintext": self.allow_plaintext,
                    "liveness_s": self.liveness_s,
                }
            )
        except ValidationError as error:
            raise ValueError(one_line(error)) from None

    def settings(self) -> Settings:
        """The settings of the transport that moves pages, which listens at the next port."""
        return Settings(control=self.control(1))


class S3Settings(TierSettings):
    """Settings of the tier in S3-compatible object storage."""

    bucket: str = Field(pattern=r"^[A-Za-z0-9._\-]{3,255}$", description="Bucket for the chunks; it must exist.")
    endpoint: str | None = Field(
        None, pattern=r"^https?://[^@\s]+$", description="http(s)://host:port of the server. Default: AWS."
    )
    region: str = Field(
        "us-east-1", pattern=r"^[A-Za-z0-9\-]{1,64}$", description="Region that requests are signed for."
    )
    prefix: str = Field(
        "pdtkv",
        pattern=r"^[A-Za-z0-9._\-]+(/[A-Za-z0-9._\-]+)*$",
        max_length=512,
        description="Prefix of object names.",
    )
    credentials_file: Path | None = Field(
        None,
        description="File with the key and its secret, in the format of ~/.aws/credentials. Default: the usual places "
        "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, the instance's role).",
    )
    profile: str | None = Field(None, max_length=64, description="Profile in the credentials file. Default: default.")
    addressing: Literal["auto", "path", "virtual"] = Field(
        "auto",
        description="Where the bucket name goes: in the path, or in the host name. auto: in the path if "
        "endpoint is set.",
    )
    threads: int = Field(8, ge=1, le=64, description="Chunks that are read or written at once.")
    timeout_s: float = Field(
        5.0,
        gt=0,
        le=60,
        description="Timeout of connecting, and of each wait for data; on expiry the server counts as down.",
    )
    rescan_s: float = Field(
        300.0, ge=0, le=86400, description="How often to look for chunks that other pools wrote. 0: at start only."
    )


class PoolSettings(BaseModel):
    """All settings of a pool."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    name: str = Field(
        "default", pattern=r"^[A-Za-z0-9._\-]{1,32}$", description="Name of the pool, by which clients find it."
    )
    dir: Path = Field(
        Path(f"/dev/shm/pdtransport-{os.getuid()}"),
        description="Directory of the pool's socket and lock file, and of its memory; open to its owner alone.",
    )
    memory_dir: Path | None = Field(
        None, description="Directory of the memory file, such as a hugetlbfs mount for huge pages. Default: dir."
    )
    memory_bytes: int = Field(1 << 30, ge=1 << 20, description="Memory for chunks, allocated at start.")
    frame_bytes: int = Field(
        64 << 10,
        ge=4096,
        le=16 << 20,
        description="Memory is allocated in frames of this size, a multiple of 4096; a chunk wastes less than one "
        "frame.",
    )
    max_chunks: int = Field(
        1 << 20, ge=16, le=1 << 27, description="Chunks that the index can hold, those in tiers below memory included."
    )
    client_bytes: int = Field(
        512 << 20,
        ge=1 << 20,
        description="Bytes of chunks that one client may hold for reading and writing at a time; further requests "
        "wait.",
    )
    policy: PolicyName = Field("lru", description="Eviction policy.")
    admission: Literal["all", "twice"] = Field(
        "all", description="twice: a chunk is stored at the second attempt to store it."
    )
    quotas: dict[TenantName, Annotated[int, Field(ge=1)]] = Field(
        {}, max_length=MAX_TENANTS, description="Maximum bytes of memory of each tenant, by name."
    )
    disk: DiskSettings | None = Field(None, description="A tier on disk below the memory.")
    redis: RedisSettings | None = Field(None, description="A tier in Redis or Valkey, below the disk if there is one.")
    http: HttpSettings | None = Field(None, description="HTTP API that shows and manages the pool's contents.")
    remote: RemoteSettings | None = Field(None, description="Listener for clients on other hosts.")
    s3: S3Settings | None = Field(None, description="A tier in S3-compatible object storage, below disk and Redis.")
    tiers: dict[TierName, ForeignTierSettings] = Field(
        {}, max_length=MAX_FOREIGN_TIERS, description="Tiers of other packages by their names, below all others."
    )
    digest_key_file: Path | None = Field(
        None,
        description="File of mode 0600 with the key of the digests that chunks carry on tiers which others can write "
        "to; the same for all pools that share a tier. Of several keys, one a line, the first signs and all verify.",
    )
    digest: Literal["auto", "all", "off"] = Field(
        "auto",
        description="auto: chunks carry a keyed digest on tiers that others can write to (Redis, object storage, other "
        "packages' tiers, a disk's directory that is not this user's alone). all: on every tier. off: on none; whoever "
        "can write there is trusted.",
    )
    writeback_bytes: int = Field(
        256 << 20,
        ge=0,
        description="Bytes of chunks that may be queued for writing to lower tiers; further chunks "
        "stay in memory only.",
    )

    @model_validator(mode="after")
    def _fits(self) -> PoolSettings:
        if self.frame_bytes % 4096:
            raise ValueError(f"frame_bytes is {self.frame_bytes}, it must be a multiple of 4096")
        if self.memory_bytes < self.frame_bytes:
            raise ValueError("memory_bytes is smaller than one frame")
        for name in set(self.tiers) & set(OWN_TIERS):
            raise ValueError(f"tiers: {name} is the name of a built-in tier: choose another name")
        if len(os.fsencode(self.socket_path)) > MAX_SOCKET_PATH:
            raise ValueError(f"dir is too long: the socket's path may have {MAX_SOCKET_PATH} bytes")
        return self

    @property
    def socket_path(self) -> Path:
        return self.dir / f"{self.name}.sock"

    @property
    def lock_path(self) -> Path:
        return self.dir / f"{self.name}.lock"

    @classmethod
    def parse(cls, raw: dict[str, Any], *, where: str = "pool") -> PoolSettings:
        """Parse ``raw``.

        Raises:
            SettingsError: one line that names the key, what is wrong and what is allowed.
        """
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise SettingsError(f"{where}: {one_line(error)}" if where else one_line(error)) from None

"""CURVE key files, and which keys may connect. The encryption itself is ZeroMQ's."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from pdtransport.control.sockets import Socket
from pdtransport.errors import SettingsError
from pdtransport.settings import ControlSettings
from pdtransport.system.private_files import make_private_folder, open_private

logger = logging.getLogger("pdtransport.control")

PUBLIC_FILE = "control.public"
SECRET_FILE = "control.secret"
Z85_CHARS = 40  # a 32-byte key as text
MAX_KEY_FILE = 4096
ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"pdtransport"


@dataclass(frozen=True)
class CurveKeys:
    """Keys as 40 characters of Z85. ``server``: key that peers we connect to must hold; ``allowed``: keys that may
    connect to us."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes
    allowed: frozenset[bytes]


def make_keys(directory: str | Path) -> tuple[Path, Path]:
    """Create a key pair in ``directory`` (created if missing), one file per key with mode 0600.

    Returns the paths of the public and the secret key, for ``control.curve_public_key_file`` and
    ``control.curve_secret_key_file``.

    Raises:
        SettingsError: the files exist already, or the directory can't be written.
    """
    folder = Path(directory)
    public, secret = folder / PUBLIC_FILE, folder / SECRET_FILE
    for path in (public, secret):
        if path.exists():
            raise SettingsError(f"{path} exists: keys are never overwritten, remove it first")
    public_key, secret_key = zmq.curve_keypair()
    made: list[Path] = []
    try:
        make_private_folder(folder)
        for path, key in ((public, public_key), (secret, secret_key)):
            with os.fdopen(open_private(path, os.O_WRONLY | os.O_EXCL), "wb") as file:
                made.append(path)
                file.write(key + b"\n")
    except OSError as error:
        for path in made:  # half a pair is useless, and would block the next try
            path.unlink(missing_ok=True)
        raise SettingsError(f"CURVE keys can't be written to {folder}: {error.strerror}") from None
    return public, secret


def load_keys(settings: ControlSettings) -> CurveKeys | None:
    """The keys that ``settings`` name; None if CURVE is off.

    Raises:
        SettingsError: a file is missing or holds no key, the two keys are not a pair, or a key is malformed.
    """
    if settings.curve_public_key_file is None or settings.curve_secret_key_file is None:
        return None
    public = _read("control.curve_public_key_file", settings.curve_public_key_file, secret=False)
    secret = _read("control.curve_secret_key_file", settings.curve_secret_key_file, secret=True)
    if zmq.curve_public(secret) != public:
        raise SettingsError(
            "control.curve_public_key_file and control.curve_secret_key_file are not from one pair: make a new pair "
            "with `pdlaunch keys`"
        )
    server = settings.curve_server_key
    allowed = settings.curve_allowed_keys
    return CurveKeys(
        public=public,
        secret=secret,
        server=public if server is None else _checked("control.curve_server_key", server.encode()),
        allowed=frozenset(
            [public] if allowed is None else [_checked("control.curve_allowed_keys", k.encode()) for k in allowed]
        ),
    )


def apply_server(socket: Socket, keys: CurveKeys | None) -> None:
    """Make a listening socket accept only holders of allowed keys (see :class:`Gatekeeper`)."""
    if keys is not None:
        socket.curve_secretkey = keys.secret
        socket.curve_publickey = keys.public
        socket.curve_server = True
        socket.zap_domain = ZAP_DOMAIN


def apply_client(socket: Socket, keys: CurveKeys | None) -> None:
    """Make a connecting socket prove our key and require the server's."""
    if keys is not None:
        socket.curve_secretkey = keys.secret
        socket.curve_publickey = keys.public
        socket.curve_serverkey = keys.server


class Gatekeeper:
    """ZAP handler: answers libzmq's question whether a key may connect, in the thread that drives the channel.

    Must exist before the listening socket binds: without a ZAP handler, libzmq admits every key.
    """

    def __init__(self, context: zmq.Context[Socket], keys: CurveKeys) -> None:
        self._allowed = keys.allowed
        self.denied = 0
        self.socket = context.socket(zmq.ROUTER)
        self.socket.set(zmq.LINGER, 0)
        try:
            self.socket.bind(ZAP_ADDRESS)
        except zmq.ZMQError as error:
            self.socket.close(0)
            raise SettingsError(f"another ZAP handler runs in this ZeroMQ context: {error}") from None

    def step(self) -> bool:
        """Answer one ZAP request; False if there is none."""
        try:
            parts = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        if len(parts) < 8:  # only libzmq itself can reach this address
            return True
        sender, version, request, mechanism, credentials = parts[0], parts[2], parts[3], parts[7], parts[8:]
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else b""
        known = key in self._allowed
        self.denied += not known
        status = (b"200", b"OK") if known else (b"400", b"this key is not in curve_allowed_keys")
        with contextlib.suppress(zmq.ZMQError):  # the requester is gone
            self.socket.send_multipart(
                [sender, b"", version, request, *status, key if known else b"", b""], zmq.NOBLOCK
            )
        return True

    def close(self) -> None:
        self.socket.close(0)


def _read(setting: str, path: Path, *, secret: bool) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_KEY_FILE)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise SettingsError(
            f"{setting}: {path} can't be read ({error.strerror}); make keys with `pdlaunch keys`"
        ) from None
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        logger.warning("%s: %s is readable by others than its owner; chmod 600 it", setting, path)
    return _checked(f"{setting}: {path}", text.strip())


def _checked(where: str, key: bytes) -> bytes:
    """Return ``key`` if it is a valid key. The error never shows it: it may be a secret key."""
    if len(key) == Z85_CHARS:
        with contextlib.suppress(zmq.ZMQError):
            zmq.curve_public(key)  # libzmq's own check that this is Z85 of 32 bytes
            return key
    raise SettingsError(
        f"{where} does not contain a CURVE key of {Z85_CHARS} characters (Z85); make keys with `pdlaunch keys`"
    )

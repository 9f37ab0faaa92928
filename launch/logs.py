"""Interprets a server's log: how far its start has got, and why it failed."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

SIGNALLED = 128  # plus the signal's number: exit status of a process that a signal ended
LAST_LINES = 20  # log lines shown of a failed process
MAX_LINE = 300  # characters of a shown log line

# In the order in which a server passes them; the last one found in the log counts.
_STAGES: tuple[tuple[str, str], ...] = (
    (r"non-default args|version \d+\.\d+", "reading the model's configuration"),
    (r"Initializing a V1 LLM engine", "starting the engine"),
    (r"thread binding info|DP group leader", "starting workers"),
    (r"Starting to load model|Loading safetensors|Loading weights|Loading model", "loading weights"),
    (r"Loading weights took|Model loading took", "weights loaded"),
    (r"KV cache size|Available KV cache memory", "KV cache allocated"),
    (r"Capturing CUDA graph|Compiling a graph|Dynamo bytecode", "compiling"),
    (r"init engine .* took", "engine ready"),
    (r"Starting vLLM server|Application startup complete", "opening its port"),
)

_CAUSES: tuple[tuple[str, str], ...] = (
    (
        r"[Aa]ddress already in use|errno 98",
        "a port is in use: {line}. Stop the process that uses it, or set the role's port to 0",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError",
        "the GPU has too little memory: lower gpu-memory-utilization or raise tp",
    ),
    (
        r"Free memory on device .* is less than desired",
        "another process uses the GPU's memory: lower gpu-memory-utilization in roles.<role>.args",
    ),
    (
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "too little memory is left for the KV cache: lower model.max_model_len, or raise kv-cache-memory-bytes",
    ),
    (r"MemoryError|Cannot allocate memory|DefaultCPUAllocator", "the machine has too little memory for this topology"),
    (
        r"is not a (?:local folder|valid model identifier)|RepositoryNotFound|LocalEntryNotFound|"
        r"Repo id must|outgoing traffic has been disabled|couldn't connect to|Invalid repository ID",
        "the model was not found: set model.id to an existing folder (./name), or to a hub id that can be reached",
    ),
    (r"unrecognized arguments?: (?P<found>.*)", "vLLM does not know the flag {found}: see roles.<role>.args"),
    (r"error: argument (?P<found>.*)", "vLLM refused a flag: {found}"),
    (
        r"Unsupported connector type: (?P<found>\S+)",
        "vLLM did not load pdtransport's plugin: install pdtransport in this environment",
    ),
    (r"max_model_len.*greater than", "model.max_model_len is longer than the model allows"),
    (r"(?P<found>(?:PeerRefused|SettingsError|LinkUnavailable): .*)", "{found}"),
    (r"No module named (?P<found>\S+)", "the Python package {found} is missing in this environment"),
)
_EXCEPTION = re.compile(r"(?:^|\s)((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Exit|Interrupt|Refused|Unavailable)): (?=\S)")
_WRAPPERS = ("Engine core initialization failed", "WorkerProc initialization failed", "Executor failed")


def plain(line: str) -> str:
    """A log line without colours and without vLLM's prefix of process, level, time and source."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", line)
    text = re.sub(r"^\([^)]* pid=\d+\) ?", "", text)
    text = re.sub(r"^(?:INFO|WARNING|ERROR|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?", "", text)
    return text.strip()


def stage(lines: Sequence[str]) -> str:
    """How far the start has got, according to the log."""
    for line in reversed(lines):
        for pattern, name in reversed(_STAGES):
            if re.search(pattern, line):
                return name
    return "starting"


def last_lines(lines: Sequence[str], count: int = LAST_LINES) -> list[str]:
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines[-count:]]
    return [line if len(line) <= MAX_LINE else line[: MAX_LINE - 3] + "..." for line in shown]


def ending(status: int) -> str:
    """How a process ended: ``ended with status 3``, ``was ended by SIGSEGV``."""
    try:
        return f"was ended by {signal.Signals(status - SIGNALLED).name}"
    except ValueError:
        return f"ended with status {status}"


def likely_cause(lines: Sequence[str], status: int | None, out_of_memory: bool | None = None) -> str | None:
    """One line that says why a process failed, if its log, its exit status or the kernel shows it.

    Args:
        out_of_memory: True if the kernel killed any process for lack of memory meanwhile; None: unknown.
    """
    if status == SIGNALLED + signal.SIGKILL:
        if out_of_memory is None:
            return "it was killed by another process, or by the kernel for lack of memory: see the kernel's log (dmesg)"
        if out_of_memory:
            return "the kernel killed a process for lack of memory meanwhile, most likely this one (see dmesg)"
        return "it was killed by another process: the kernel killed no process for lack of memory meanwhile"
    for line in map(plain, lines):
        for pattern, text in _CAUSES:
            match = re.search(pattern, line)
            if match:
                return text.format(line=line[:MAX_LINE], found=match.groupdict().get("found") or "")
    if out_of_memory:  # if an engine core is killed, its server ends with its own status
        return "the kernel killed a process for lack of memory meanwhile, most likely one of this server's (see dmesg)"
    # vLLM wraps the first failure in others: the first exception line that is not a wrapper is the root cause.
    for line in map(plain, lines):
        if _EXCEPTION.search(line) and not any(wrapper in line for wrapper in _WRAPPERS):
            return line[:MAX_LINE]
    return None

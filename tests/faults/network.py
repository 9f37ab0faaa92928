"""Two network namespaces, a link between them, and what can be done to it: cut, lossy, narrow; and ports cut off.

Loss comes from nftables (random drops in the decode side's namespace), the rate limit from a token bucket. Both
workers share a process namespace, so links of one host would still work; the rig runs UCX over TCP here.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.faults.plan import Plan, Transfer
from tests.faults.worker import BLOCK_SIZE

TIMEOUT_S = 10
ADDRESSES = ("10.211.7.1", "10.211.7.2")  # in namespaces of our own: nobody else sees them
# column -> what is done to the network, and for how many seconds
CASES: dict[str, tuple[str, float]] = {
    "cut 1 s": ("cut", 1.0),
    "cut 10 s": ("cut", 10.0),
    "5% loss": ("lose 5", 4.0),
    "20% loss": ("lose 20", 4.0),
    "10 Mbit/s": ("narrow 10000000", 4.0),
}
BEFORE_S, AFTER_S, EVERY_S, BLOCKS = 0.5, 4.0, 0.2, 2  # traffic around the fault


class NoNamespaces(Exception):
    """This process may not make network namespaces, or a tool is missing."""


def run(command: str, text: str = "") -> None:
    done = subprocess.run(command.split(), input=text, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise NoNamespaces(f"{command}: {done.stderr.strip()}")


@dataclass
class Network:
    """``names``: of the namespaces of prefill and decode."""

    names: tuple[str, str]

    @classmethod
    def make(cls) -> Network:
        """
        Raises:
            NoNamespaces: it can't be made here.
        """
        for tool in ("ip", "tc", "nft"):
            if shutil.which(tool) is None:
                raise NoNamespaces(f"{tool} is not installed")
        tag = secrets.token_hex(2)
        network = cls((f"pdtp{tag}", f"pdtd{tag}"))
        try:
            for name in network.names:
                run(f"ip netns add {name}")
            run(f"ip link add {tag}p type veth peer name {tag}d")
            for name, device, address in zip(network.names, (f"{tag}p", f"{tag}d"), ADDRESSES, strict=True):
                run(f"ip link set {device} netns {name}")
                network.inside(name, f"ip link set {device} name eth0")
                network.inside(name, f"ip addr add {address}/24 dev eth0")
                network.inside(name, "ip link set lo up")
                network.inside(name, "ip link set eth0 up")
        except BaseException:
            network.close()
            raise
        return network

    def inside(self, name: str, command: str, text: str = "") -> None:
        run(f"ip netns exec {name} {command}", text)

    def cut(self) -> None:
        self.inside(self.names[1], "ip link set eth0 down")

    def lose(self, percent: int) -> None:
        """Drop that many of a hundred packets that reach decode's side."""
        rule = f"meta iifname eth0 numgen random mod 100 < {percent} drop"
        chain = "type filter hook input priority 0;"
        self.inside(self.names[1], "nft -f -", f"table inet faults {{\nchain in {{\n{chain}\n{rule}\n}}\n}}\n")

    def narrow(self, bits_s: int) -> None:
        for name in self.names:
            self.inside(name, f"tc qdisc replace dev eth0 root tbf rate {bits_s}bit burst 32kb latency 200ms")

    def heal(self) -> None:
        """Undo all of it."""
        self.inside(self.names[1], "ip link set eth0 up")
        self.inside(self.names[1], "nft flush ruleset")
        for name in self.names:
            subprocess.run(
                f"ip netns exec {name} tc qdisc del dev eth0 root".split(), capture_output=True, timeout=TIMEOUT_S
            )

    def close(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=TIMEOUT_S)


@contextmanager
def cut_off(port: int) -> Iterator[None]:
    """Nothing gets to or from this port of the loopback address, and nobody is told.

    Raises:
        NoNamespaces: this process may not do that.
    """
    name, chain = f"pdt_faults_{port}", "type filter hook input priority 0;"
    if shutil.which("nft") is None:
        raise NoNamespaces("nft is not installed")
    run(
        "nft -f -",
        f"table inet {name} {{\nchain in {{\n{chain}\ntcp dport {port} drop\ntcp sport {port} drop\n}}\n}}\n",
    )
    try:
        yield
    finally:
        run(f"nft delete table inet {name}")


def network_plan(case: str, number: int) -> Plan:
    """A transfer every ``EVERY_S`` before, during and after the fault."""
    what, seconds = CASES[case]
    replay = f"--runs 0 --network 1 --case '{case}'"
    plan = Plan(2_000_000 + number, "ucx", 1, "the network between two hosts (UCX over TCP)", case, replay)
    plan.drops_rest = True
    plan.signals = [(BEFORE_S, "network", what), (BEFORE_S + seconds, "network", "heal")]
    at = 0.0
    while at < BEFORE_S + seconds + AFTER_S:
        tokens, seed = BLOCKS * BLOCK_SIZE, plan.seed * 1000 + len(plan.transfers)
        plan.transfers.append(Transfer(seed, tokens, 0, at, at, [(at, tokens)], at))
        at += EVERY_S
    return plan

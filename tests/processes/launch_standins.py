"""``pdlaunch`` with stand-in servers: ``python -m tests.processes.launch_standins VERB ...``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pdtransport.launch import cli
from pdtransport.launch.plan import Instance
from pdtransport.launch.topology import Topology


def standin(topology: Topology, instance: Instance, weights: str) -> Sequence[str]:
    role = topology.by_role()[instance.role]
    argv = [sys.executable, str(Path(__file__).with_name("standin.py")), "--port", str(instance.port)]
    for name, value in topology.flags(role).items():
        if name != "kv-cache-memory-bytes":
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


if __name__ == "__main__":
    sys.exit(cli.main(command=standin))

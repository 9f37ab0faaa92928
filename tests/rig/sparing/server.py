"""vLLM's own server, for a machine with fewer cores than processes: what the rig runs in place of vLLM's module.

A server on the CPU is three processes, and each waits for the next one's word by spinning for up to a second: on two
cores that is time taken from those that compute. Here they wait on the socket that vLLM wakes them by. vLLM sometimes
loses that word, and looks again after 5 s; here after 100 ms. And the garbage collector rests while they import vLLM, a
fifth of what a start costs. It is for the plain server, whose answers others are compared with; those run vLLM as
installed.

vLLM's other processes run this file, too: it is their parent's main module. It has a folder of its own because Python
puts that on their path.
"""

from __future__ import annotations

import gc

gc.disable()

from vllm.distributed.device_communicators import shm_broadcast  # noqa: E402
from vllm.entrypoints.launchers.api_server.entry import main  # noqa: E402

gc.enable()

LOOK_AGAIN_MS = 100
SPIN_S = 0.0

shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LOOK_AGAIN_MS
assert shm_broadcast.SpinCondition.__init__.__defaults__ == (1,), "busy_loop_s is not vLLM's only default any more"
shm_broadcast.SpinCondition.__init__.__defaults__ = (SPIN_S,)

if __name__ == "__main__":
    main()

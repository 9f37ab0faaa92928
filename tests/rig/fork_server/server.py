"""vLLM's own server, for a machine with fewer cores than processes: ``forking``, and it waits without spinning.

A server on the CPU is three processes, and each waits for the next one's word by spinning for up to a second: on two
cores that is time taken from those that compute. Here they wait on the socket that vLLM wakes them by. vLLM sometimes
loses that word, and looks again after 5 s; here after 100 ms. It is for the plain server, whose answers others are
compared with; those wait as vLLM is installed.
"""

from __future__ import annotations

from forking import main
from vllm.distributed.device_communicators import shm_broadcast

LOOK_AGAIN_MS = 100
SPIN_S = 0.0

shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = LOOK_AGAIN_MS
assert shm_broadcast.SpinCondition.__init__.__defaults__ == (1,), "busy_loop_s is not vLLM's only default any more"
shm_broadcast.SpinCondition.__init__.__defaults__ = (SPIN_S,)

if __name__ == "__main__":
    main()

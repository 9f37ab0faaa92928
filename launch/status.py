"""``pdlaunch status``: the state of a running topology, as reported by its workers and its router."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pdtransport.errors import PoolUnavailable
from pdtransport.launch import web, workers
from pdtransport.launch.plan import resolved
from pdtransport.launch.rundir import is_up, read_record
from pdtransport.launch.topology import Topology
from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.settings import ControlSettings

POOL_S = 5.0  # timeout of the pool's answer
AT_ONCE = 64  # concurrent status requests; each may have to wait for its timeout


def collect(topology: Topology, folder: Path, file_folder: Path) -> dict[str, Any] | None:
    """The run's state; None if no such run is up."""
    record = read_record(folder) if is_up(folder) else None
    if record is None:
        return None
    control = resolved(topology, file_folder).transport.control
    with ThreadPoolExecutor(AT_ONCE) as executor:
        ranks = [
            [executor.submit(_rank, address, control) for address in instance["control"]]
            for instance in record["instances"]
        ]
        urls = [record["router"]["url"], *(instance["url"] for instance in record["instances"])]
        answers = dict(zip(urls, executor.map(web.is_healthy, urls), strict=True))
        pool = _pool(record["pool"]) if record.get("pool") else None
        instances = [
            _instance(instance, answers[instance["url"]], [rank.result() for rank in asked])
            for instance, asked in zip(record["instances"], ranks, strict=True)
        ]
    router = {**record["router"], "healthy": answers[record["router"]["url"]]}
    healthy = router["healthy"] and all(one["healthy"] for one in (*instances, *([pool] if pool else [])))
    return {
        "name": record["name"],
        "pid": record["pid"],
        "state": record["state"],
        "logs": str(folder),
        "healthy": healthy,
        "router": router,
        "instances": instances,
        "pool": pool,
    }


def _pool(planned: dict[str, Any]) -> dict[str, Any]:
    known = {"name": planned["name"], "dir": planned["dir"], "url": planned["url"]}
    try:
        with PoolClient(planned["name"], Path(planned["dir"]), who="pdlaunch status", deadline_s=POOL_S) as client:
            return {**known, "healthy": True, "status": client.status().result()}
    except PoolUnavailable as error:
        return {**known, "healthy": False, "error": str(error)}


def _instance(instance: dict[str, Any], answers: bool, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": instance["name"],
        "role": instance["role"],
        "url": instance["url"],
        "healthy": answers and all("status" in rank for rank in ranks),
        "server_answers": answers,
        "ranks": ranks,
    }


def _rank(address: str, control: ControlSettings) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    try:
        return {"control": address, "status": workers.ask((host, int(port)), control)}
    except workers.WorkerError as error:
        return {"control": address, "error": str(error)}


def as_text(found: dict[str, Any]) -> str:
    state = found["state"] if found["healthy"] else f"{found['state']}, but not healthy"
    lines = [f"{found['name']}: {state} (pid {found['pid']}, logs in {found['logs']})"]
    router = found["router"]
    lines.append(f"router      {router['url']}  {'healthy' if router['healthy'] else 'does not answer'}")
    if pool := found["pool"]:
        memory = pool["status"]["memory"] if pool["healthy"] else {}
        held = f"{workers.size(memory['used_bytes'])} of {workers.size(memory['bytes'])} in memory" if memory else ""
        lines.append(f"pool        {pool['name']} in {pool['dir']}  {held or pool['error']}")
    for instance in found["instances"]:
        answers = "healthy" if instance["server_answers"] else "does not answer"
        lines.append(f"{instance['name']:<11} {instance['url']}  {answers}")
        for number, rank in enumerate(instance["ranks"]):
            lines += [f"  rank {number}: {line}" for line in _rank_lines(rank)]
    return "\n".join(lines)


def _rank_lines(rank: dict[str, Any]) -> list[str]:
    if "error" in rank:
        return [rank["error"]]
    status = rank["status"]
    live = status.get("live", {})
    counters = ", ".join(f"{name} {value}" for name, value in sorted(status.get("counters", {}).items()) if value)
    lines = [f"up {status.get('uptime_s', 0):.0f} s, sending {live.get('producing', 0)}, receiving "
             f"{live.get('consuming', 0)}; {counters or 'nothing transferred yet'}"]  # fmt: skip
    for peer in status.get("peers", ()):
        lines.append(
            f"peer {peer.get('engine')}/{peer.get('rank')} over {peer.get('link') or 'no link'}, "
            f"{workers.rate(peer.get('bandwidth_bytes_s'))} ({peer.get('why')}): "
            f"sent {workers.size(int(peer.get('bytes_sent', 0)))}, "
            f"received {workers.size(int(peer.get('bytes_received', 0)))}"
        )
    for patch in status.get("patches", ()):
        if patch.get("state") not in ("active", "unneeded"):
            lines.append(f"hook {patch.get('name')} into vLLM is not active: {patch.get('state')}, {patch.get('why')}")
    return lines

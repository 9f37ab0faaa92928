"""From a seed to one round of the vLLM rig: a few requests, how they are sent, and what goes wrong meanwhile."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.plan import CANCEL, KILL, STOP, Plan, Transfer, cancel, frame_fault, link_fault

WAYS = ("router", "router", "router", "concurrent", "serial")  # the last two: straight to the servers
HALTS_S = (0.3, 1.0, 3.0, 6.0)  # below and above the default control.liveness_s
LINK = "the fastest"
ROUTER = "the router"
CUT = "cut"
CUTS_S = (2.0, 6.0)  # below and above what makes a router's health checks give a server up


@dataclass
class Request(Transfer):
    """One request: ``seed`` picks its prompt and its servers, ``offer_at`` is when it is sent, ``cancel_at`` when its
    client leaves. Prompt lengths follow from the prompts, and the engines say when pages are ready."""

    way: str = "router"
    stream: bool = False


def request(chance: random.Random, seed: int, within_s: float = 0.3) -> Request:
    at = chance.uniform(0, within_s)
    way, stream = chance.choice(WAYS), chance.random() < 0.5
    return Request(seed, 0, 0, at, at, [], at, way=way, stream=stream)


def round_of(seed: int, kill_every: int, router_every: int = 0, inject: bool = True) -> Plan:
    """Each ``kill_every``-th seed kills a server, prefill and decode in turn, and of the others each
    ``router_every``-th strikes the router or its ways to the servers (0: none does). Without ``inject`` there are only
    faults that come from outside: processes that stand still, clients that leave."""
    chance = random.Random(seed)
    flags = f"--kill-every {kill_every} " if kill_every else ""
    flags += f"--router-every {router_every} " if router_every else ""
    plan = Plan(seed, LINK, 1, "nothing", "nothing", f"--rig vllm {flags}--seed {seed}")
    plan.transfers += [request(chance, chance.getrandbits(32)) for _ in range(chance.randint(2, 4))]
    if kill_every and seed % kill_every == kill_every - 1:
        role = "decode" if seed // kill_every % 2 else "prefill"
        whole = chance.random() < 0.5
        plan.signals.append((chance.uniform(0, 0.5), role, f"{KILL} {'server' if whole else 'worker'}"))
        plan.row, plan.column = f"a {role} server, {'all of it' if whole else 'its worker process'}", KILL
        plan.transfers += [request(chance, chance.getrandbits(32), 1.0) for _ in range(3)]
        for each in plan.transfers:
            each.way = "router"  # type: ignore[attr-defined]  # what its clients see of a death is the question
        return plan
    if router_every and seed % router_every == router_every - 1:
        _router_fault(chance, plan)
        return plan
    what = chance.random() if inject else chance.uniform(0.67, 0.93)
    if what < 0.05:
        pass
    elif what < 0.45:
        plan.row, plan.column = frame_fault(chance, plan)
    elif what < 0.67:
        plan.row, plan.column = link_fault(chance, plan)
    elif what < 0.80:
        role = chance.choice(("prefill", "decode"))
        plan.stopped_s = chance.choice(HALTS_S)
        plan.signals.append((chance.uniform(0, 0.4), role, STOP))
        plan.row, plan.column = f"a {role} server, all of it", f"stop {plan.stopped_s:g} s"
    elif what < 0.93:
        plan.row, plan.column = "clients", CANCEL
        for each in plan.transfers:
            if chance.random() < 0.6:
                cancel(chance, each)
    else:
        plan.row, plan.column = "several at once", "mixed"
        for _ in range(chance.randint(2, 3)):
            chance.choice((frame_fault, link_fault))(chance, plan)
        if chance.random() < 0.3:
            cancel(chance, chance.choice(plan.transfers))
    return plan


def _router_fault(chance: random.Random, plan: Plan) -> None:
    """The router dies or stands still, or nothing gets through between it and one server."""
    plan.transfers += [request(chance, chance.getrandbits(32), 1.0) for _ in range(3)]
    for each in plan.transfers:
        each.way = "router"  # type: ignore[attr-defined]
    what, at = chance.choice((KILL, KILL, STOP, CUT)), chance.uniform(0, 0.8)
    if what == KILL:
        plan.row, plan.column = ROUTER, KILL
        plan.signals.append((at, ROUTER, KILL))
    elif what == STOP:
        plan.stopped_s = chance.choice(HALTS_S)
        plan.row, plan.column = ROUTER, f"stop {plan.stopped_s:g} s"
        plan.signals.append((at, ROUTER, STOP))
    else:
        plan.stopped_s = chance.choice(CUTS_S)
        role = chance.choice(("prefill", "decode"))
        plan.row, plan.column = f"the router's way to a {role} server", f"cut {plan.stopped_s:g} s"
        plan.signals.append((at, role, CUT))

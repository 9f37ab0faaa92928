"""A run: several rounds, each with servers of its own, until all requests are asked."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.identity import draw
from tests.identity.makers import ADAPTERS, Model
from tests.identity.outcomes import Report
from tests.identity.rounds import Round
from tests.identity.world import FOLDERS, Instance, instance_of, put_adapter, spec_of
from tests.rig.pooled import Service
from tests.rig.prompts import Prompts
from tests.rig.servers import fleet


@dataclass(frozen=True)
class Plan:
    """
    Args:
        servers: at a time, in each of ``rounds``.
        routers: pairs in a round that are asked through a router of their own, too.
        pooled: rounds, the last ones, in which nothing is handed over, and what one stores in a pool others may find.
    """

    requests: int
    seed: int
    servers: int = 4
    rounds: int = 4
    routers: int = 3
    pooled: int = 1


def run(plan: Plan, root: Path, logs: Path, told: Callable[[Report], None] = lambda report: None) -> Report:
    """Ask all requests of a plan; what they are depends on its numbers alone.

    Args:
        root: models and adapters are made here.
        told: is called after each round with what is known until then.

    Raises:
        ServerFailed: a server did not start, or did not end.
    """
    rng, prompts, report = random.Random(plan.seed), Prompts(plan.seed), Report(plan.seed)
    for number in range(plan.rounds):
        count = plan.requests * (number + 1) // plan.rounds - plan.requests * number // plan.rounds
        models = draw.models(rng, plan.servers)
        for folder in FOLDERS:
            put_adapter(root, folder, rng.choice(list(ADAPTERS)))
        with ExitStack() as running:
            pool = number >= plan.rounds - plan.pooled
            with _timed(report, "starting servers"):
                directory = _pool(running) if pool else None
                instances = _started(models, root, logs, directory, running)
            with (
                _timed(report, "requests"),
                Round(instances, root, logs, rng, prompts, report, plan.routers, pool) as asked,
            ):
                asyncio.run(asked.go(count))
            for instance in instances:
                instance.server.must_live()
        told(report)
    return report


def _pool(running: ExitStack) -> Path:
    """Directory of a pool that runs; its path is short, since sockets lie there."""
    service = Service(Path(running.enter_context(tempfile.TemporaryDirectory(prefix="pdt-"))))
    running.callback(service.close)
    service.start()
    return service.directory


def _started(models: Sequence[Model], root: Path, logs: Path, pool: Path | None, running: ExitStack) -> list[Instance]:
    """Servers with these models, in order; those that are late start when the others are up."""
    instances: dict[int, Instance] = {}
    for late in (False, True):
        chosen = {number: model for number, model in enumerate(models) if model.late == late}
        for model in chosen.values():
            model.make(root)
        specs = [spec_of(number, model, root, pool) for number, model in chosen.items()]
        servers = running.enter_context(fleet(*specs, logs=logs))
        for (number, model), server in zip(chosen.items(), servers, strict=True):
            instances[number] = instance_of(server, model, root)
    return [instances[number] for number in sorted(instances)]


@contextmanager
def _timed(report: Report, what: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        report.seconds[what] = round(report.seconds.get(what, 0.0) + time.monotonic() - started, 1)

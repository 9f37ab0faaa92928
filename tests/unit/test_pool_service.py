"""The pool service and what it tells its clients, with real clients in this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pdtransport.pool.client.pool_client import PoolClient
from pdtransport.pool.server.service import Pool
from pdtransport.pool.settings import PoolSettings
from tests.processes.pool_rig import ANSWER_S, until
from tests.unit.pool_rig import FRAME, Asker, key, keys


def test_a_client_that_leaves_takes_the_news_from_nobody_else(tmp_path: Path) -> None:
    """Who watches hears of every chunk that goes, also after another client, who watched or not, has left."""
    heard: list[list[bytes] | None] = []

    def hear(gone: Sequence[bytes] | None) -> None:
        heard.append(None if gone is None else list(gone))

    with Pool(PoolSettings(dir=tmp_path, memory_bytes=1 << 20, frame_bytes=FRAME)) as pool:
        service = pool._service

        def forget(number: int) -> None:
            Asker(service.store).put(number)
            service.store.drop(keys(number))
            service._flush()

        with PoolClient(directory=tmp_path, deadline_s=ANSWER_S) as watching:
            watching.watch(hear)
            for number in range(2):
                with PoolClient(directory=tmp_path, deadline_s=ANSWER_S) as leaver:
                    if number:
                        leaver.watch(lambda _gone: None)
                    leaver.lookup([]).result()
                until(lambda: len(pool.status(ANSWER_S)["clients"]) == 1, "it did not leave")
                pool._reactor.ask(partial(forget, number), ANSWER_S)
            watching.lookup([]).result()  # its answer comes after the news
            assert heard == [[], [key(0)], [key(1)]]

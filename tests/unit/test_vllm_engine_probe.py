"""What vLLM's HTTP process answers about its engine."""

from __future__ import annotations

import asyncio

from pdtransport.vllm.patches.engine_probe import EngineProbe


def test_one_question_is_with_the_engine_however_many_ask() -> None:
    """Who floods the path of a stopped engine must not fill the engine's queue: one question waits there, whose answer
    is everybody's."""

    async def test() -> None:
        asked, go = [0], asyncio.Event()

        async def question() -> bool:
            asked[0] += 1
            await go.wait()
            return False

        probe = EngineProbe(answer_s=0.02)
        assert await asyncio.gather(*(probe.answers(question) for _ in range(50))) == [False] * 50
        assert await probe.answers(question) is False
        assert asked == [1]
        go.set()
        assert await probe.answers(question) is True
        assert await probe.answers(question) is True
        assert asked == [2]

    asyncio.run(test())


def test_error_is_an_answer() -> None:
    """Data-parallel engines that disagree, or a vLLM that words the question otherwise, are no reason to use a server
    no more. Of a dead engine vLLM's own /health tells."""

    async def test() -> None:
        async def question() -> bool:
            raise RuntimeError("dead")

        assert await EngineProbe(answer_s=5).answers(question) is True

    asyncio.run(test())

"""A stream that begins with prefill's first token: when it may, what joins the two answers, and what happens if decode
does not go on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from pdtransport.router.first_token import FirstToken, Unusable, read, why_not
from pdtransport.router.splice import LOST, Lost, StreamSplice, VoidCheck, joined, opening
from tests.unit.router_rig import Engine, Reply, Rig, ask, event, rigged, run, soon, stream

TOKEN = 77
DONE = b"data: [DONE]\n\n"


# -- which requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({}, ""),
        ({"temperature": 0, "seed": 0, "top_p": 0.9, "ignore_eos": True, "stop_token_ids": [5]}, ""),
        (
            {"temperature": 1.0, "user": "u", "cache_salt": "s", "n": 1, "echo": False, "stop": None, "min_tokens": 0},
            "",
        ),
        ({"stream_options": {"include_usage": True}, "return_token_ids": True, "presence_penalty": 0.0}, ""),
        ({"seed": 1}, "seed"),
        ({"seed": 1, "temperature": 0.5}, "seed"),
        ({"presence_penalty": 0.1}, "penalties"),
        ({"frequency_penalty": -1}, "penalties"),
        ({"repetition_penalty": 1.1}, "penalties"),
        ({"logprobs": 0}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 3}, "logprobs"),
        ({"prompt_logprobs": 1}, "logprobs"),
        ({"return_tokens_as_token_ids": True}, "logprobs"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"stop": ["x"]}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"structured_outputs": {"json": {}}}, "structured_output"),
        ({"response_format": {"type": "json_object"}}, "structured_output"),
        ({"response_format": {"type": "text"}}, ""),
        ({"n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"use_beam_search": True}, "beam_search"),
        ({"vllm_xargs": {"a": 1}}, "extra_args"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 1}, "max_tokens"),
        ({"stream_options": {"continuous_usage_stats": True}}, "continuous_usage"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"reasoning_effort": "low"}, "reasoning"),
        ({"thinking_token_budget": 5}, "reasoning"),
        ({"something_new": 1}, "parameter"),
        ({"something_new": None}, ""),
    ],
)
def test_what_makes_the_first_token_decodes(more: dict[str, Any], code: str) -> None:
    """Each member that asks something of earlier tokens has its reason; one that nobody knows has one, too."""
    assert why_not("chat", ask(**more)) == code


def test_chats_word_for_no_log_probabilities() -> None:
    assert why_not("chat", {"messages": [], "logprobs": False}) == ""
    assert why_not("chat", {"messages": [], "tool_choice": {"type": "function"}}) == "tools"


# -- prefill's answer -------------------------------------------------------------------------------------------------


def told(text: Any = "he", finish: str = "length", **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, **more}
    return {"id": "cmpl-1", "created": 5, "model": "m", "choices": [choice]}


def test_a_first_token_is_read() -> None:
    first, why = read("completions", told(prompt_token_ids=[1, 2]), {"first_token": TOKEN})
    assert why == ""
    assert first == FirstToken(TOKEN, "he", {"id": "cmpl-1", "created": 5, "model": "m"}, prompt_ids=[1, 2])


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({}, "unsupported"),
        ({"first_token_declined": "no_promise"}, "no_promise"),
        ({"first_token_declined": "anything else"}, "declined"),
        ({"first_token_declined": ["x"]}, "declined"),
        ({"first_token": True}, "unsupported"),
        ({"first_token": "5"}, "unsupported"),
    ],
)
def test_what_is_no_first_token_is_decodes(params: dict[str, Any], code: str) -> None:
    """Labels of metrics come from a fixed set, whatever a server says."""
    assert read("completions", told(), params) == (None, code)


@pytest.mark.parametrize(
    "answer",
    [told(""), told(None), told("a\ufffd"), told(finish="stop"), {"choices": []}, {}, told() | {"choices": [3]}],
)
def test_a_token_without_a_usable_text_is_never_streamed(answer: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        read("completions", answer, {"first_token": TOKEN})


@pytest.mark.parametrize("more", [{"reasoning": "hm"}, {"tool_calls": [{}]}, {"content": None}])
def test_a_message_that_a_parser_took_apart_is_never_streamed(more: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "he", **more}
    choice = {"index": 0, "message": message, "finish_reason": "length"}
    with pytest.raises(Unusable):
        read("chat", {**told(), "choices": [choice]}, {"first_token": TOKEN})


# -- two answers as one -----------------------------------------------------------------------------------------------

FIRST = FirstToken(TOKEN, "hé", {"id": "x", "created": 5, "model": "m"}, prompt_ids=[1, 2])


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": None, "stop_reason": None, **more}]}


def test_a_streams_prompt_ids_come_once_and_its_usage_counts_all_tokens() -> None:
    """However the bytes are cut."""
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    raw = event(chunk("a", prompt_token_ids=[1, 2], token_ids=[8])) + event(chunk("b", finish_reason="stop"))
    raw += event({"id": "x", "choices": [], "usage": usage}) + DONE
    for size in (1, 7, len(raw)):
        splice = StreamSplice("completions")
        out = b"".join(splice.feed(raw[i : i + size]) for i in range(0, len(raw), size)) + splice.rest()
        events = [json.loads(part[6:]) for part in out.split(b"\n\n") if part and part != b"data: [DONE]"]
        assert events[0]["choices"][0] == {**chunk("a", token_ids=[8])["choices"][0], "prompt_token_ids": None}
        assert events[2]["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
        assert out.endswith(DONE)


def test_a_chats_role_comes_once() -> None:
    delta = {"id": "x", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    content = {"id": "x", "choices": [{"index": 0, "delta": {"content": "lo"}}]}
    splice = StreamSplice("chat")
    assert splice.feed(event(delta)) == b""
    assert splice.feed(event(content)) == event(content)
    begun = opening("chat", FIRST, token_ids=False)
    assert begun.count(b'"role":"assistant"') == 1
    assert "hé".encode() in begun


@pytest.mark.parametrize("shown", [chunk("z", finish_reason="length", stop_reason=LOST), {"error": {"code": 500}}])
def test_a_decode_that_lost_the_token_is_found_before_anything_of_it_passes(shown: dict[str, Any]) -> None:
    with pytest.raises(Lost):
        StreamSplice("completions").feed(event(shown))


def test_the_longest_first_event_is_looked_at_whole() -> None:
    """A long prompt's ids make an event that is passed on in pieces otherwise."""
    raw = event(chunk("z", prompt_token_ids=list(range(400_000)), stop_reason=LOST, finish_reason="length"))
    splice = StreamSplice("completions")
    cut = len(raw) - 10
    assert splice.feed(raw[:cut]) == b""
    with pytest.raises(Lost):
        splice.feed(raw[cut:])


def test_whole_answers_are_joined() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    answer = json.loads(
        joined("completions", FIRST, json.dumps({**chunk("a", token_ids=[8]), "usage": usage}).encode())
    )
    assert answer["choices"][0]["text"] == "héa"
    assert answer["choices"][0]["token_ids"] == [TOKEN, 8]
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    message = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
    assert json.loads(joined("chat", FIRST, json.dumps(message).encode()))["choices"][0]["message"]["content"] == "héa"
    with pytest.raises(Lost):
        joined("completions", FIRST, json.dumps(chunk("z", stop_reason=LOST)).encode())
    for bad in (b"", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"text":5}]}'):
        with pytest.raises(ValueError, match=r"."):
            joined("completions", FIRST, bad)


def test_a_chat_is_looked_at_up_to_its_first_token() -> None:
    """The role comes first and says nothing; an error or the end of the stream means that no token will come."""

    def said(delta: dict[str, Any], **more: Any) -> bytes:
        return event({"choices": [{"index": 0, "delta": delta, "stop_reason": None, **more}]})

    check = VoidCheck(streams=True)
    assert not check.feed(said({"role": "assistant", "content": ""}))
    assert not check.feed(said({"content": "a"})[:-1])
    assert check.feed(b"\n")
    assert check.data.count(b"\n\n") == 2
    check = VoidCheck(streams=True)
    with pytest.raises(Lost):
        check.feed(said({"role": "assistant", "content": ""}) + said({"content": "x"}, stop_reason=LOST))
    for over in (DONE, event({"error": {"message": "no"}})):
        assert VoidCheck(streams=True).feed(over)


# -- through the router -----------------------------------------------------------------------------------------------


def gives_out(engine: Engine, wait: asyncio.Event | None = None, **params: Any) -> None:
    """Prefill whose answer carries the first token."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert body["kv_transfer_params"]["first_token"] is True
        if wait is not None:
            await wait.wait()
        handed = engine.hand_over(body["kv_transfer_params"]["transfer_id"]) or {}
        return web.json_response({**told(), "kv_transfer_params": {**handed, "first_token": TOKEN, **params}})

    engine.script = script


def goes_on(engine: Engine, *pieces: str) -> None:
    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        usage = {"prompt_tokens": 64, "completion_tokens": len(pieces), "total_tokens": 64 + len(pieces)}
        if body.get("stream"):
            return await stream(request, [event(chunk(piece)) for piece in pieces] + [DONE])
        return web.json_response({**chunk("".join(pieces)), "usage": usage})

    engine.script = script


async def early(rig: Rig, first: asyncio.Event) -> Reply:
    """A streamed answer; ``first`` is set once its first token is here."""
    async with rig.post(ask(stream=True)) as response:
        line = await response.content.readline()
        first.set()
        return Reply(response.status, dict(response.headers), line + await response.read())


def text_of(reply: Reply) -> str:
    events = [json.loads(part[6:]) for part in reply.body.split(b"\n\n") if part and part != b"data: [DONE]"]
    return "".join(one["choices"][0]["text"] if "choices" in one else "<error>" for one in events)


async def first_tokens(rig: Rig, server: str, reason: str = "") -> float:
    return await rig.metric(f'pdrouter_first_tokens_total{{server="{server}",reason="{reason}"}}')


@pytest.mark.parametrize("streaming", [True, False])
def test_prefills_token_and_decodes_rest_are_one_answer(streaming: bool) -> None:
    """Headers, trace and metrics say which server's token it was; both servers know the answer under one name."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)
            goes_on(rig.d, "ll", "o")
            reply = await rig.ask(ask(stream=streaming, temperature=0))
            assert reply.status == 200
            assert (text_of(reply) if streaming else reply.json()["choices"][0]["text"]) == "hello"
            assert reply.headers["x-pd-first-token"] == "prefill"
            assert reply.headers["x-pd-path"] == "disaggregated"
            p, d = rig.p.seen[0], rig.d.seen[0]
            assert d.params is not None
            assert d.params["first_token"] is True
            assert p.headers["x-request-id"] == d.headers["x-request-id"]
            trace = await rig.trace(reply)
            assert (trace["first_token_from"], trace["why_first_token_from_decode"]) == ("prefill", None)
            assert await first_tokens(rig, "prefill") == 1
            if not streaming:
                assert reply.json()["usage"]["completion_tokens"] == 3

    run(test)


def test_the_first_token_does_not_wait_for_decode() -> None:
    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)
            hold = asyncio.Event()

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await hold.wait()
                return await stream(request, [event(chunk("llo")), DONE])

            rig.d.script = script
            async with rig.post(ask(stream=True)) as response:
                line = await response.content.readline()
                assert json.loads(line[6:])["choices"][0]["text"] == "he"
                hold.set()
                assert b"llo" in await response.content.read()

    run(test)


async def decode_answers_first(rig: Rig) -> tuple[asyncio.Task[Reply], asyncio.Event]:
    """A request that decode has answered; prefill answers once the event is set."""
    await rig.learn()
    hold = asyncio.Event()
    gives_out(rig.p, hold)
    goes_on(rig.d, "llo")
    asked = asyncio.create_task(rig.ask(ask(stream=True)))
    await rig.d.wait_for(1)
    await asyncio.wait_for(rig.d.seen[0].ended.wait(), 5)
    return asked, hold


def test_decodes_answer_waits_for_prefills_word() -> None:
    """Without it nobody knows whether decode's answer begins with the first token or with the second."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            asked, hold = await decode_answers_first(rig)
            assert not asked.done()
            hold.set()
            assert text_of(await asked) == "hello"

    run(test)


def test_an_answer_of_decode_that_waits_for_prefills_word_is_not_late() -> None:
    """first_byte_s is decode's, and decode has answered: only prefill_s and total_s bound what prefill still takes."""

    async def test() -> None:
        async with rigged(first_token="auto", timeouts={"first_byte_s": 2.0, "prefill_s": 60.0}) as rig:
            asked, hold = await decode_answers_first(rig)
            await asyncio.sleep(2.2)
            hold.set()
            assert text_of(await asked) == "hello"

    run(test)


@pytest.mark.parametrize("how", ["stream", "whole", "pieces"])
def test_an_answer_that_lost_a_token_which_nobody_gave_out_is_asked_for_anew(how: str) -> None:
    """Decode can't know whether the client has the token that it promised to go on from, so its answer is void. Prefill
    says that it gave none out: the router asks again, and the client gets a whole answer."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()

            async def void_unless_alone(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                params = body.get("kv_transfer_params") or {}
                void = chunk("x", finish_reason="length", stop_reason=LOST)
                answer = [void] if params.get("do_remote_prefill") else [chunk("he"), chunk("llo")]
                if how == "whole":
                    return web.json_response(answer[0] if len(answer) == 1 else chunk("hello"))
                events = b"".join(map(event, answer)) + DONE
                half = len(events) // 3 if how == "pieces" else len(events)
                return await stream(request, [events[:half], events[half:]])

            rig.d.script = void_unless_alone
            reply = await rig.ask(ask(stream=how != "whole"))
            assert (reply.json()["choices"][0]["text"] if how == "whole" else text_of(reply)) == "hello"
            assert reply.headers["x-pd-path"].startswith("decode-only; decode lost a first token")

    run(test)


def test_decodes_answer_of_a_prefill_that_failed_is_not_believed() -> None:
    """Prefill fails after decode began: whether decode promised, and so left the first token out, nobody knows. The
    request is computed again."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            answered = asyncio.Event()

            async def fails(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await answered.wait()
                return web.json_response({"error": {"message": "no"}}, status=500)

            async def whole_if_alone(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                pieces = ["llo"] if body.get("kv_transfer_params") else ["he", "llo"]
                return await stream(request, [event(chunk(piece)) for piece in pieces] + [DONE])

            rig.p.script, rig.d.script = fails, whole_if_alone
            asked = asyncio.create_task(rig.ask(ask(stream=True)))
            await rig.d.wait_for(1)
            await asyncio.wait_for(rig.d.seen[0].ended.wait(), 5)
            answered.set()
            reply = await asked
            assert text_of(reply) == "hello"
            assert reply.headers["x-pd-path"].startswith("decode-only; prefill server ")

    run(test)


@pytest.mark.parametrize(
    ("settings", "more", "declined", "reason"),
    [
        ({"first_token": "off"}, {}, None, "off"),
        ({"first_token": "auto"}, {"seed": 3}, None, "seed"),
        ({"first_token": "auto", "dispatch": "serial"}, {}, None, "serial"),
        ({"first_token": "auto"}, {}, "no_promise", "no_promise"),
        ({"first_token": "auto"}, {}, "partial_character", "partial_character"),
    ],
)
def test_what_falls_back_says_why(
    settings: dict[str, Any], more: dict[str, Any], declined: str | None, reason: str
) -> None:
    """Decode samples the first token, and header, trace and counter say the reason."""

    async def test() -> None:
        async with rigged(**settings) as rig:
            await rig.learn()

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                assert ("first_token" in body["kv_transfer_params"]) == (declined is not None)
                handed = rig.p.hand_over(body["kv_transfer_params"]["transfer_id"]) or {}
                return web.json_response({**told(), "kv_transfer_params": {**handed, "first_token_declined": declined}})

            rig.p.script = script
            goes_on(rig.d, "al", "one")
            before = await first_tokens(rig, "decode", reason)
            reply = await rig.ask(ask(stream=True, **more))
            assert text_of(reply) == "alone"
            assert reply.headers["x-pd-first-token"] == f"decode; {reason}"
            assert (await rig.trace(reply))["why_first_token_from_decode"] == reason
            assert await first_tokens(rig, "decode", reason) == before + 1

    run(test)


def fails_once(rig: Rig, how: str, first: asyncio.Event) -> None:
    """Decode fails in one way once the client has the ``first`` token, and then goes on from what it is told."""

    async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await first.wait()
        if len(rig.d.seen) > 1:
            assert body["kv_transfer_params"]["continue_from"] == TOKEN
            return await stream(request, [event(chunk("ll")), event(chunk("o")), DONE])
        if how == "status":
            return web.json_response({"error": {"message": "load failed", "code": 500}}, status=500)
        if how == "event":
            return await stream(request, [event({"error": {"message": "load failed", "code": 500}}), DONE])
        if how == "lost":
            return await stream(request, [event(chunk("XX", finish_reason="length", stop_reason=LOST)), DONE])
        if how == "empty":
            return await stream(request, [DONE])
        return await stream(request, [b"data: {"], die=True)

    rig.d.script = script


@pytest.mark.parametrize("how", ["status", "event", "lost", "broken"])
def test_a_decode_that_fails_after_the_first_token_goes_on_from_it(how: str) -> None:
    """The client has the token; nothing that another one would lead to reaches it."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)
            first = asyncio.Event()
            fails_once(rig, how, first)
            reply = await early(rig, first)
            if how == "broken":  # what was lost may be another process by now, of which nothing is known
                assert text_of(reply) == "he<error>"
                assert len(rig.d.seen) == 1
                return
            assert text_of(reply) == "hello"
            trace = await rig.trace(reply)
            assert [one["order"] for one in trace["dispatches"]] == ["concurrent", "continued"]
            assert trace["outcome"] == "ok"
            assert trace["first_token_from"] == "prefill"
            assert "first_token" in trace["events"]

    run(test)


def test_another_decode_goes_on_if_it_is_known_to() -> None:
    """A server that promised before takes over from one that died; one that never did is not trusted with it."""

    async def test(known: bool) -> None:
        async with rigged(decode=2, first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)
            died = []
            first = asyncio.Event()

            def script_of(engine: Engine) -> Any:
                async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                    await first.wait()
                    if "continue_from" not in body["kv_transfer_params"]:
                        died.append(engine)
                        return await stream(request, [b"data: {"], die=True)
                    return await stream(request, [event(chunk("llo")), DONE])

                return script

            for engine, endpoint in zip(rig.decode, rig.router.fleet.decode, strict=True):
                engine.script = script_of(engine)
                endpoint.goes_on = known
            reply = await early(rig, first)
            assert text_of(reply) == ("hello" if known else "he<error>")
            assert len(died) == 1
            trace = await rig.trace(reply)
            assert trace["outcome"] == ("ok" if known else "interrupted")

    run(lambda: test(True))
    run(lambda: test(False))


def test_another_decode_is_asked_once_even_without_retries() -> None:
    """Once the client has the first token, there is at least one more try, also with decode_retries = 0."""

    async def test() -> None:
        async with rigged(first_token="auto", decode_retries=0) as rig:
            await rig.learn()
            gives_out(rig.p)
            first = asyncio.Event()
            fails_once(rig, "status", first)
            reply = await early(rig, first)
            assert text_of(reply) == "hello"
            assert len(rig.d.seen) == 2

    run(test)


def test_a_decode_that_never_goes_on_ends_in_an_error() -> None:
    """The tries are bounded by decode_retries."""

    async def test() -> None:
        async with rigged(first_token="auto", decode_retries=2) as rig:
            await rig.learn()
            gives_out(rig.p)

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                return await stream(request, [event(chunk("XX", finish_reason="length", stop_reason=LOST)), DONE])

            rig.d.script = script
            reply = await rig.ask(ask(stream=True))
            assert text_of(reply) == "he<error>"
            assert b"XX" not in reply.body
            assert len(rig.d.seen) == 3
            assert (await rig.trace(reply))["outcome"] == "interrupted"

    run(test)


def test_a_whole_answer_that_lost_its_first_token_is_asked_for_anew() -> None:
    """Nothing reached the client: decode serves the request alone, with a first token of its own."""

    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                if body.get("kv_transfer_params") and "first_token" in body["kv_transfer_params"]:
                    return web.json_response(chunk("XX", finish_reason="length", stop_reason=LOST))
                return web.json_response(chunk("alone"))

            rig.d.script = script
            reply = await rig.ask()
            assert reply.json()["choices"][0]["text"] == "alone"
            assert b"XX" not in reply.body

    run(test)


def test_an_unusable_first_token_leaves_everything_to_decode() -> None:
    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                handed = rig.p.hand_over(body["kv_transfer_params"]["transfer_id"]) or {}
                return web.json_response({**told("\ufffd"), "kv_transfer_params": {**handed, "first_token": TOKEN}})

            rig.p.script = script
            goes_on(rig.d, "alone")
            reply = await rig.ask(ask(stream=True))
            assert text_of(reply) == "alone"
            assert rig.d.seen[-1].params is None
            assert "text is not usable" in reply.headers["x-pd-path"]

    run(test)


def test_a_client_that_leaves_after_the_first_token_ends_decodes_request() -> None:
    async def test() -> None:
        async with rigged(first_token="auto") as rig:
            await rig.learn()
            gives_out(rig.p)

            async def script(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
                await asyncio.Event().wait()
                raise AssertionError

            rig.d.script = script
            async with rig.post(ask(stream=True)) as response:
                assert b"he" in await response.content.readline()
                response.close()
            await asyncio.wait_for(rig.d.seen[0].ended.wait(), 5)
            assert rig.d.seen[0].cancelled
            await soon(lambda: all(one.inflight == 0 for one in rig.router.fleet.all))
            assert len(rig.d.seen) == 1
            traces = (await rig.get("/pd/traces?limit=1")).json()["traces"]
            assert traces[0]["outcome"] == "client_disconnected"

    run(test)

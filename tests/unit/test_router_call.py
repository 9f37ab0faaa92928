"""A client's body: parsed once, split exactly, and put together again without a second encoding."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pdtransport.router.call as call_module
from pdtransport.router.call import Call, parse
from pdtransport.router.first_token import Api
from pdtransport.serving.errors import ApiError

PARAMS = {"do_remote_prefill": True, "transfer_id": "ab"}
_DROPPED = call_module._NOT_FOR_PREFILL

texts = st.text(max_size=6)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
values = (
    leaves | st.lists(leaves, max_size=3) | st.dictionaries(texts, leaves | st.lists(leaves, max_size=2), max_size=3)
)
keys = st.sampled_from(["model", "n_", "max_tokens", "stream", "logprobs", "min_tokens", "", '"', "\u00fc\\"]) | texts
bodies = st.dictionaries(keys, values, max_size=6)
quick = settings(max_examples=100, deadline=None)
prompts = st.text(min_size=1, max_size=30) | st.lists(st.integers(0, 1 << 40), min_size=1, max_size=30)


def parsed(body: Any, api: Api = "completions", **more: Any) -> Call:
    raw = body if isinstance(body, bytes) else json.dumps(body, **more).encode()
    return parse(raw, api, chunk_chars=64, chunks=8)


@quick
@given(body=bodies, prompt=prompts, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_both_servers_get_exactly_the_members_they_should(
    body: dict[str, Any], prompt: Any, indent: int | None, ascii_only: bool
) -> None:
    body = {**body, "prompt": prompt}
    for key in ("n", "best_of", "echo", "use_beam_search", "prompt_logprobs", "prompt_embeds"):
        body.pop(key, None)
    text = json.dumps(body, indent=indent, ensure_ascii=ascii_only)
    try:
        raw = f" \r\n{text}\t\n".encode()
    except UnicodeEncodeError:  # a lone surrogate can't be sent unescaped
        raw = json.dumps(body).encode()
    call = parsed(raw)
    assert call.decode_only_reason is None
    assert json.loads(call.for_decode(None)) == body
    assert json.loads(call.for_decode(PARAMS)) == {**body, "kv_transfer_params": PARAMS}
    kept = {key: value for key, value in body.items() if key not in _DROPPED}
    assert json.loads(call.for_prefill(PARAMS)) == {
        **kept, "n": 1, "stream": False, "max_tokens": 1, "kv_transfer_params": PARAMS,
    }  # fmt: skip


@quick
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_anything_else_is_a_400_exactly_where_a_json_parser_says_no(raw: bytes) -> None:
    try:
        good = isinstance(json.loads(raw.decode()), dict)
    except ValueError:
        good = False
    if good:
        parsed(raw)
    else:
        with pytest.raises(ApiError) as refused:
            parsed(raw)
        assert refused.value.status == 400


@quick
@given(body=bodies, cut=st.integers(0, 200), junk=st.sampled_from(list('{}[]",:x0 \n\\')))
def test_damaged_objects_are_never_taken_where_a_json_parser_takes_none(
    body: dict[str, Any], cut: int, junk: str
) -> None:
    text = json.dumps(body)
    text = text[: cut % len(text)] + junk + text[cut % len(text) :]

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        with pytest.raises(ApiError):
            parsed(text.encode())


def test_a_long_prompt_is_decoded_and_encoded_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """16,000 token ids: none is made a number, and only the small kv_transfer_params are ever encoded."""
    decoded: list[int] = []
    encoded: list[int] = []
    real_value, real_dumps = call_module._value, json.dumps

    def value(text: str, at: int) -> tuple[Any, int]:
        result = real_value(text, at)
        decoded.append(result[1] - at)
        return result

    def dumps(what: Any, **more: Any) -> str:
        result = real_dumps(what, **more)
        encoded.append(len(result))
        return result

    raw = json.dumps({"model": "m", "prompt": list(range(16000)), "max_tokens": 5}).encode()
    monkeypatch.setattr(call_module, "_value", value)
    monkeypatch.setattr(call_module.json, "dumps", dumps)
    call = parsed(raw)
    for _ in range(2):  # a retry costs no more
        call.for_prefill(PARAMS)
        call.for_decode(PARAMS)
    assert sum(decoded) < 100
    assert max(encoded) < 200


def test_null_params_of_the_client_are_replaced_and_not_doubled() -> None:
    for body in (b'{"kv_transfer_params":null,"prompt":"a"}', b'{"prompt":"a", "kv_transfer_params" : null }'):
        sent = parsed(body).for_decode(PARAMS)
        assert sent.count(b"kv_transfer_params") == 1
        assert json.loads(sent) == {"prompt": "a", "kv_transfer_params": PARAMS}


def test_prompt_sizes_are_exact_for_ids_and_estimated_for_text() -> None:
    assert parsed({"prompt": [5] * 33}).prompt_tokens == 33
    assert parsed({"prompt": "x" * 398}).prompt_tokens == 100
    assert parsed({"messages": [{"role": "user", "content": "hi"}]}, "chat").prompt_tokens > 0
    assert parsed({"prompt": "ü"}, ensure_ascii=False).prompt_bytes == 4
    assert parsed({"prompt": "ü"}, ensure_ascii=False).raw == '{"prompt": "ü"}'.encode()


def test_long_prompts_of_ids_are_counted_and_reach_the_servers_as_they_came() -> None:
    """What makes no list of numbers is refused as ever; what numbers the servers take is theirs to say."""
    for body in (b'{"prompt":[%s]}' % b",".join([b"5"] * 2000), b'{"prompt" : [ %s ] }' % b" , ".join([b"5"] * 2000)):
        call = parsed(body)
        assert (call.prompt_tokens, call.decode_only_reason, call.raw) == (2000, None, body)
        assert json.loads(call.for_prefill({}))["prompt"] == [5] * 2000
        assert call.has_ids
        assert json.loads(call.prompt_json()) == [5] * 2000, "as the pool is told of it"
    good = ",".join(["5"] * 1000)
    for bad in (good + ",", "," + good, good + ",," + good, good + ", ," + good, good + ",x", "x" + good, good + ',"'):
        with pytest.raises(ApiError) as refused:
            parsed(f'{{"prompt":[{bad}]}}'.encode())
        assert refused.value.code == "invalid_json"
    assert parsed(f'{{"prompt":[{good},"5"]}}'.encode()).prompt_tokens == 1001
    assert parsed(f'{{"messages":[{good}]}}'.encode(), "chat").prompt_tokens > 0


@pytest.mark.parametrize("where", ["first", "last", "alone"])
@pytest.mark.parametrize("space", ["", " \n"])
@pytest.mark.parametrize("prompt", ['"a \\u00fc ]"', "[1, 2, 3]", "[7]", f"[{','.join(['5'] * 2000)}]"])
def test_a_list_of_one_prompt_is_that_prompt(prompt: str, space: str, where: str) -> None:
    """Client libraries send ``["x"]`` and ``[[ids]]``: decode gets the client's own bytes, and all else is as for the
    prompt by itself: what prefill gets, what the pool is told, prefixes, sizes."""
    wrapped = f"[{space}{prompt}{space}]"
    before, after = {"first": ("", ',"model":"m"'), "last": ('"model":"m",', ""), "alone": ("", "")}[where]
    one, plain = (parsed(f'{{{before}"prompt":{given}{after}}}'.encode()) for given in (wrapped, prompt))
    assert one.decode_only_reason is None
    assert one.raw == f'{{{before}"prompt":{wrapped}{after}}}'.encode()
    assert json.loads(one.for_decode(PARAMS))["prompt"] == [json.loads(prompt)]
    assert json.loads(one.for_prefill(PARAMS)) == json.loads(plain.for_prefill(PARAMS))
    for name in ("prompt_tokens", "prompt_bytes", "prefix_keys", "has_ids", "not_first"):
        assert getattr(one, name) == getattr(plain, name), name
    assert one.prompt_json() == prompt.encode()


def test_a_list_of_one_prompt_keeps_its_tenants_salt() -> None:
    body = b'{"prompt": ["abc"], "kv_transfer_params": null}'
    call = parse(body, "completions", chunk_chars=64, chunks=8, salter=lambda own: "s1")
    assert json.loads(call.for_decode(PARAMS)) == {
        "prompt": ["abc"], "cache_salt": "s1", "kv_transfer_params": PARAMS,
    }  # fmt: skip
    assert json.loads(call.for_prefill({}))["prompt"] == "abc"
    assert json.loads(call.for_prefill({}))["cache_salt"] == "s1"
    assert call.prompt_json() == b'"abc"'


GOOD = ",".join(["5"] * 2000)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ('["a","b"]', "batch"),
        ("[[1],[2]]", "batch"),
        (f"[[{GOOD}],[{GOOD}]]", "batch"),
        ('["a",[1]]', "batch"),
        ("[null,5]", "batch"),
        ("[]", "no_prompt"),
        ("[[]]", "no_prompt"),
        ('[["a"]]', "no_prompt"),
        ("[[[1]]]", "no_prompt"),
        ("[null]", "no_prompt"),
        ("{}", "no_prompt"),
        ("5", "no_prompt"),
        ("null", "no_prompt"),
    ],
)
def test_other_lists_go_to_decode_alone_for_the_right_reason(prompt: str, code: str) -> None:
    """Whether they are prompts at all is for decode to say."""
    call = parsed(f'{{"prompt":{prompt}}}'.encode())
    assert call.decode_only_reason is not None
    assert call.decode_only_reason.code == code
    assert call.for_decode(None) == f'{{"prompt":{prompt}}}'.encode()


def test_prefix_keys_are_shared_as_far_as_prompts_are_and_apart_by_model_salt_and_api() -> None:
    base = "a" * 300
    one, two = parsed({"prompt": base + "x" * 100}), parsed({"prompt": base + "y" * 100})
    shared = [a == b for a, b in zip(one.prefix_keys, two.prefix_keys, strict=True)]
    assert shared == [True] * 4 + [False] * 2
    keys = {
        parsed({"prompt": base, **more}).prefix_keys[0]
        for more in ({}, {"model": "a"}, {"model": "b"}, {"cache_salt": "s"})
    }
    assert len(keys) == 4
    assert len(parsed({"prompt": "z" * 10_000}).prefix_keys) == 8  # bounded
    assert parsed({"prompt": "short"}).prefix_keys == ()


@pytest.mark.parametrize("given_key", ["kv_transfer_params", "\\u006bv_transfer_params"])
def test_reserved_member_is_found_however_it_is_spelt(given_key: str) -> None:
    with pytest.raises(ApiError) as refused:
        parsed(f'{{"prompt": "a", "{given_key}": {{"x": 1}}}}'.encode())
    assert refused.value.param == "kv_transfer_params"


def test_a_body_of_more_members_than_any_request_has_is_refused() -> None:
    """Each is read in Python: 100,000 of them, in a megabyte, would hold up everybody for most of a second."""
    members = {f"k{i}": i for i in range(call_module.MAX_MEMBERS - 2)}
    assert parsed({"model": "m", "prompt": "p", **members}).model == "m"
    with pytest.raises(ApiError) as caught:
        parsed({"model": "m", "prompt": "p", "one_more": 1, **members})
    assert (caught.value.status, caught.value.code) == (400, "too_many_members")


@pytest.mark.parametrize("many", ["[]", '{"a":1}', "0"])
def test_a_body_of_more_values_than_any_context_holds_is_refused_unread(many: str) -> None:
    """16 MiB of empty lists would hold up everybody for seconds. A prompt of as many ids as a context has is taken."""
    bound = call_module.MAX_COMMAS if many == "0" else call_module.MAX_LISTS
    wide = b'{"model": "m", "prompt": "p", "x": [' + b",".join([many.encode()] * (bound + 2)) + b"]}"
    with pytest.raises(ApiError) as caught:
        parsed(wide)
    assert (caught.value.status, caught.value.code) == (400, "too_many_values")
    ids = b'{"model": "m", "prompt": [' + b",".join([b"7"] * (1 << 20)) + b"]}"
    assert parsed(ids).model == "m"

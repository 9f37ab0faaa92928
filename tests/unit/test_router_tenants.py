"""Tenants of the router: what one of them cached is nobody else's, and no client can say otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdtransport.errors import SettingsError
from pdtransport.router import Router, RouterSettings
from pdtransport.router.call import Call, parse
from pdtransport.router.keyfiles import ClientKey
from pdtransport.router.tenants import Salter, Tenants
from pdtransport.serving.errors import ApiError
from tests.unit.router_rig import ask, rigged, run
from tests.unit.test_router_call import PARAMS, bodies, prompts

SECRET = "0123456789abcdef0123456789abcdef"
GOLDEN = "04550c350bc8295358f85d861cae1ccc808e3307f9d6f31eaf49159834b31704"


def salter(tenant: str, secret: str = SECRET) -> Salter:
    made = Tenants([ClientKey("k", tenant)], secret).salter(0)
    assert made is not None
    return made


def own_salter(key: str) -> Salter:
    """Of a key that names no tenant, beside another one."""
    made = Tenants([ClientKey("other"), ClientKey(key)], None).salter(1)
    assert made is not None
    return made


def salted(raw: bytes, tenant: str = "a") -> Call:
    return parse(raw, "completions", chunk_chars=64, chunks=8, salter=salter(tenant))


@settings(max_examples=100, deadline=None)
@given(
    body=bodies,
    prompt=prompts,
    own=st.none() | st.text(min_size=1, max_size=9),
    name=st.sampled_from(['"cache_salt"', '"cache\\u005fsalt"', "none"]),
    null=st.booleans(),
)
def test_both_servers_get_the_tenants_salt_and_the_rest_as_it_was(
    body: dict[str, Any], prompt: Any, own: str | None, name: str, null: bool
) -> None:
    """However the client spells a cache_salt of its own, what servers get is the derived one and nothing else."""
    body = {key: value for key, value in body.items() if key not in {"n", "best_of", "echo"}}
    members = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**body, "prompt": prompt}.items()]
    if name != "none":
        members.insert(len(members) // 2, f"{name} : {json.dumps(own)}")
    if null:
        members.append('"kv_transfer_params": null')
    call = salted(f" {{ {' , '.join(members)} }}\n".encode())
    want = {**body, "prompt": prompt, "cache_salt": salter("a")((name != "none" and own) or "")}
    for params in (None, PARAMS):
        said = json.loads(call.for_decode(params), object_pairs_hook=list)
        assert len(said) == len(dict(said))  # no member twice
        sent = json.loads(call.for_decode(params))
        assert sent.pop("kv_transfer_params", None) == (params if params or not null else None)
        assert sent == json.loads(json.dumps(want))
    assert json.loads(call.for_prefill(PARAMS))["cache_salt"] == want["cache_salt"]


@pytest.mark.parametrize("own", ['""', "7", "[]", "{}", "true"])
def test_a_cache_salt_that_is_no_text_is_refused_by_name(own: str) -> None:
    with pytest.raises(ApiError) as caught:
        salted(f'{{"prompt": "a", "cache_salt": {own}}}'.encode())
    assert (caught.value.status, caught.value.param) == (400, "cache_salt")


def test_salts_differ_by_tenant_by_secret_and_by_the_clients_own_and_are_stable() -> None:
    """Golden: another version of the router must find what this one cached. The name can't be told from a salt."""
    assert salter("a")("") == "05127e37de600227c9aee05dfd7f7048e688c6666e3aca49397f4d92b7968985"
    made = [salter(t, s)(own) for t in ("a", "ab", "b") for s in (SECRET, SECRET[::-1]) for own in ("", "b", "ab")]
    assert len(set(made)) == len(made)
    assert all(len(each) == 64 for each in made)


def test_prefixes_of_two_tenants_are_placed_apart() -> None:
    raw = json.dumps({"prompt": "x" * 500}).encode()
    assert not set(salted(raw, "a").prefix_keys) & set(salted(raw, "b").prefix_keys)
    assert salted(raw, "a").prefix_keys == salted(raw, "a").prefix_keys


def test_each_key_brings_its_tenants_salt_to_both_servers(tmp_path: Path) -> None:
    """Two keys of one tenant share prefixes, others do not; a key without a tenant is one of its own."""
    keys, secret = tmp_path / "keys", tmp_path / "secret"
    keys.write_text("one acme\ntwo acme\nthree rival\nfour\n")
    secret.write_text(SECRET + "\n")

    async def test() -> None:
        async with rigged(api_key_file=str(keys), tenant_secret_file=str(secret)) as rig:
            got = {}
            for key in ("one", "two", "three", "four"):
                for own in (None, "mine"):
                    asked = ask() if own is None else ask(cache_salt=own)
                    reply = await rig.ask(asked, headers={"Authorization": f"Bearer {key}"})
                    assert (reply.status, reply.headers["x-pd-path"]) == (200, "disaggregated")
                    p, d = rig.p.seen[-1].body, rig.d.seen[-1].body
                    assert p.get("cache_salt") == d.get("cache_salt")
                    got[key, own] = d.get("cache_salt")
            assert got["one", None] == got["two", None] == salter("acme")("")
            assert got["one", "mine"] == got["two", "mine"] == salter("acme")("mine")
            assert got["three", None] == salter("rival")("")
            own = own_salter("four")
            assert (got["four", None], got["four", "mine"]) == (own(""), own("mine"))
            assert len(set(got.values())) == 6
            state = json.dumps(rig.router.describe())
            assert not any(word in state for word in ("acme", "rival", SECRET))

    run(test)


def test_keys_without_tenants_share_nothing_unless_told_so() -> None:
    """Who asks with another key is somebody else, without a setting and without a secret. A single client has nobody to
    be kept from, and its prompts can be looked up in the pool unsalted."""
    two = [ClientKey("one"), ClientKey("two")]
    made = [Tenants(two, None).salter(place) for place in (0, 1)]
    salts = {salter(own) for salter in made if salter is not None for own in ("", "mine")}
    assert len(salts) == 4
    assert not any("one" in salt or "two" in salt for salt in salts)
    assert [Tenants(two, SECRET, share=True).salter(place) for place in (0, 1)] == [None, None]
    assert Tenants(two[:1], None).salter(0) is None
    assert Tenants(two, None).salter(None) is None


def test_a_keys_own_salt_is_stable_and_no_tenants() -> None:
    """Golden, and the same for all routers that have the key, whatever else is in their files. A tenant who is called
    as a key is gets nothing of it."""
    assert own_salter("one")("") == GOLDEN
    found = Tenants([ClientKey("one"), ClientKey("k", "a")], SECRET).salter(0)
    assert found is not None
    assert found("") == GOLDEN
    assert salter("one")("") != GOLDEN


def test_clients_that_trust_each_other_share_on_request(tmp_path: Path) -> None:
    """share_prefixes: their own cache_salt reaches the servers as it is."""
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")

    async def test() -> None:
        for share, want in ((True, "mine"), (False, own_salter("one")("mine"))):
            async with rigged(api_key_file=str(keys), share_prefixes=share) as rig:
                reply = await rig.ask(ask(cache_salt="mine"), headers={"Authorization": "Bearer one"})
                assert reply.status == 200
                assert rig.d.seen[-1].body["cache_salt"] == rig.p.seen[-1].body["cache_salt"] == want

    run(test)


@pytest.mark.parametrize(
    ("keys", "secret", "says"),
    [
        ("hush acme", None, "set tenant_secret_file"),
        ("hush acme", "short", "at least 32 are needed"),
        ("hush acme ltd", SECRET, "key 1 is neither KEY nor KEY TENANT"),
        ("hush " + "a" * 65, SECRET, "key 1 is neither KEY nor KEY TENANT"),
        ("hush acme\nhush rival", SECRET, "key 2 is already assigned to another tenant"),
        ("", SECRET, "has no key"),
    ],
)
def test_key_files_that_can_not_be_used_are_one_line_without_a_key(
    keys: str, secret: str | None, says: str, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(keys)
    (tmp_path / "secret").write_text(secret or "")
    more = {} if secret is None else {"tenant_secret_file": tmp_path / "secret"}
    raw = {"prefill": ["http://h:1"], "decode": ["http://h:2"], "api_key_file": tmp_path / "keys", **more}
    with pytest.raises(SettingsError) as caught:
        Router(RouterSettings.build(raw))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "short" not in str(caught.value)

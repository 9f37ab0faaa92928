"""Topology files: what is wrong is said with file, line, key and what is allowed; what is right becomes a plan."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from pdtransport.launch import cli, preflight
from pdtransport.launch.cores import format_cores, parse_cores, share_out
from pdtransport.launch.plan import Plan, PlanError, Ports, make_plan
from pdtransport.launch.reading import load
from pdtransport.launch.topology import Topology
from pdtransport.launch.yamlfile import MAX_BYTES, TopologyError, YamlFile
from pdtransport.pool.cli import parser as pool_parser
from pdtransport.pool.cli import settings_from as pool_settings_from
from pdtransport.router.cli import parser, settings_from
from pdtransport.router.cli import parser as router_parser
from pdtransport.router.cli import settings_from as router_settings_from
from pdtransport.settings import Settings

REPO = Path(__file__).resolve().parents[2]
GOOD = """\
apiVersion: pdtransport/v1
name: chat
model: {id: ./model}
roles:
  prefill: {}
  decode: {}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "t.yaml"
    path.write_text(text)
    return path


def loaded(folder: Path, text: str) -> Topology:
    return load(written(folder, text))[0]


def refusal(folder: Path, text: str) -> list[str]:
    """The lines of the error, without the folder."""
    with pytest.raises(TopologyError) as caught:
        loaded(folder, text)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def planned(folder: Path, text: str) -> Plan:
    return make_plan(loaded(folder, text), folder, run_folder=folder / "run", ports=Ports(21350, 21399))


def test_every_example_is_valid() -> None:
    """Each topology in examples/ loads and becomes a plan."""
    examples = sorted((REPO / "examples").rglob("*.yaml"))
    assert REPO / "examples" / "quickstart.yaml" in examples
    for path in examples:
        topology, _ = load(path)
        assert make_plan(topology, path.parent).instances


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "t.yaml:1:1: a topology is a mapping that starts with apiVersion: pdtransport/v1; found nothing"),
        ("- a\n", "t.yaml:1:1: a topology is a mapping that starts with apiVersion: pdtransport/v1; found a list"),
        ("name: [\n", "t.yaml:2:1: malformed YAML: while parsing a flow node expected the node content, but found"),
        ("a: b: c\n", "t.yaml:1:5: malformed YAML: mapping values are not allowed here"),
        ("model:\n\tid: x\n", "t.yaml:2:1: malformed YAML: a tab: YAML indents with spaces"),
        ("name: a\nmodel: {}\nname: b\n", "t.yaml:3:1: name: this key is already on line 1"),
        ("roles:\n  decode: {count: 1, tp: 1, count: 2}\n", "t.yaml:2:29: count: this key is already on line 2"),
        ("true: 1\n", "t.yaml:1:1: true: keys must be text; write it in quotes"),
        ("[a]: 1\n", "t.yaml:1:1: a list or mapping: keys must be text"),
        ("a: &a [*a]\n", "t.yaml:1:4: an anchor that contains itself"),
        ("name: !!python/object/apply:os.system ['true']\n", "t.yaml:1:7: malformed YAML: could not determine a"),
        ("a: 1\n---\nb: 1\n", "t.yaml:2:1: malformed YAML: expected a single document"),
        ("a: " + "[" * 5000, "t.yaml:1:1: nested too deeply to be a topology"),
        ("a: *nobody\n", "t.yaml:1:4: malformed YAML: found undefined alias"),
        ("a: 2024-13-99\n", "t.yaml:1:4: a: 2024-13-99 is a date in YAML 1.1: quote it if it is text"),
        ("a: \x01\n", "t.yaml:1: not YAML text: special characters"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_line(tmp_path: Path, text: str, line: str) -> None:
    """Malformed YAML, duplicate keys, tabs, odd keys and tags end in one line that says where and what."""
    [said] = refusal(tmp_path, text)
    assert said.startswith(line)


def test_an_anchor_bomb_is_refused(tmp_path: Path) -> None:
    """A small file can't expand to gigabytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    [said] = refusal(tmp_path, "\n".join(lines))
    assert "expands to more than 100000 values" in said


def test_files_that_are_not_text_or_too_large_are_refused(tmp_path: Path) -> None:
    """A model's weights given as topology end in one line, and are not read whole."""
    path = tmp_path / "t.yaml"
    path.write_bytes(b"name: a\n\xff\xfe\n")
    with pytest.raises(TopologyError, match=r"t.yaml:2: not UTF-8 text"):
        load(path)
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(TopologyError, match="larger than"):
        load(path)
    with pytest.raises(TopologyError, match="No such file"):
        load(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("prefill: {}", "prefill: {port: 21:00}", "5:19: roles.prefill.port: 21:00 is 1260"),
        ("prefill: {}", "prefill: {args: {max-num-seqs: 1:30}}", "5:34: roles.prefill.args.max-num-seqs: 1:30 is 90"),
        ("prefill: {}", "prefill: {args: {scale: 1:30.5}}", "5:27: roles.prefill.args.scale: 1:30.5 is 90.5"),
        ("prefill: {}", "prefill: {cpu: [0, 010]}", "5:22: roles.prefill.cpu.1: 010 is 8"),
        ("prefill: {}", "prefill: {count: 1_0}", "5:20: roles.prefill.count: 1_0 is 10"),
        ("prefill: {}", "prefill: {count: 0b11}", "5:20: roles.prefill.count: 0b11 is 3"),
        ("prefill: {}", "prefill: {count: !!int '010'}", "5:20: roles.prefill.count: 010 is 8"),
        ("name: chat", "name: on", "2:7: name: on is true"),
        ("name: chat", "name: Off", "2:7: name: Off is false"),
        ("{id: ./model}", "{id: no}", "3:13: model.id: no is false"),
        ("{id: ./model}", "{id: ./model, served_name: YES}", "3:35: model.served_name: YES is true"),
        ("{id: ./model}", "{id: ./model, revision: 2024-01-01}", "3:32: model.revision: 2024-01-01 is a date"),
        (
            "{id: ./model}",
            "{id: ./model, revision: 2024-01-01 10:00:00}",
            "3:32: model.revision: 2024-01-01 10:00:00 is",
        ),
        ("{id: ./model}", "{id: =}", "3:13: model.id: = is of the type !!value"),
        ("{id: ./model}", "{id: !!binary bW9kZWw=}", "3:13: model.id: bW9kZWw= is of the type !!binary"),
        ("prefill: {}", "prefill: !!set {count}", "5:12: roles.prefill: !!set is not allowed here"),
    ],
)
def test_what_yaml_takes_for_something_else_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    """A colon is no number of base 60, ``on`` no truth, a leading 0 no octal, and a revision no date: what YAML 1.1 and
    a reader take for different things is refused with its place and what YAML makes of it, not used."""
    text = GOOD.replace(old, new)
    assert text != GOOD
    [line] = refusal(tmp_path, text)
    assert line.startswith(f"t.yaml:{said}")
    assert "YAML 1.1: " in line or "write a plain list" in line


def test_what_yaml_and_readers_take_for_the_same_is_taken(tmp_path: Path) -> None:
    """Quotes make text of anything; numbers, truths and nothing are what all versions of YAML say they are."""
    args = "a: 'no', b: '010', c: true, d: False, e: 12, f: -1.5, g: 1.0e+3, h: 0x1F, i: .inf, j: '2024-01-01', k: 1e3"
    data = YamlFile(written(tmp_path, f"{{{args}, l: ~, m: 08, n: 127.0.0.1:80, o: null, p: y}}")).data
    assert data == {
        "a": "no", "b": "010", "c": True, "d": False, "e": 12, "f": -1.5, "g": 1000.0, "h": 31, "i": float("inf"),
        "j": "2024-01-01", "k": "1e3", "l": None, "m": "08", "n": "127.0.0.1:80", "o": None, "p": "y",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("name: chat", "nmae: chat", "t.yaml:2:1: nmae: unknown key, did you mean 'name'? (allowed: apiVersion, name,"),
        ("name: chat", "name: My Chat", "t.yaml:2:1: name: letters a-z, digits and dashes; found 'My Chat'"),
        ("pdtransport/v1", "pdtransport/v2", "t.yaml:1:1: apiVersion: 'pdtransport/v2' is not supported by this"),
        ("{id: ./model}", "{}", "t.yaml:3:1: model.id: missing; Folder (relative to the topology file) or hub id."),
        ("{id: ./model}", "x", "t.yaml:3:1: model: expected a mapping (allowed: id, revision,"),
        ("{id: ./model}", "{id: m, dtype: int8}", "t.yaml:3:16: model.dtype: must be 'auto', 'bfloat16', 'float16' or"),
        ("{id: ./model}", "{id: m, block_size: 16.5}", "t.yaml:3:16: model.block_size: must be an integer; found 16.5"),
        ("prefill: {}", "prefil: {}", "t.yaml:5:3: roles.prefil: unknown key, did you mean 'prefill'? (allowed: pref"),
        ("prefill: {}", "prefill: {count: 0}", "t.yaml:5:13: roles.prefill.count: must be greater than or equal to 1"),
        ("prefill: {}", "prefill: {count: true}", "t.yaml:5:13: roles.prefill.count: must be an integer; found True"),
        ("prefill: {}", "prefill: {port: 70000}", "t.yaml:5:13: roles.prefill.port: must be less than or equal to"),
        ("prefill: {}", "prefill: {cpu: 0-x}", "t.yaml:5:13: roles.prefill.cpu: '0-x' is not a list of cores; write"),
        ("prefill: {}", "prefill: {cpu: [0, 0]}", "t.yaml:5:3: roles.prefill: cpu lists a core twice"),
        ("prefill: {}", "prefill: {cpu: 0-2, tp: 2}", "t.yaml:5:3: roles.prefill: cpu lists 3 cores for 2 workers"),
        ("prefill: {}", "prefill: {cpu: [0], gpus: [0]}", "t.yaml:5:3: roles.prefill: cpu and gpus exclude each other"),
        ("prefill: {}", "prefill: {gpus: [0], tp: 2}", "t.yaml:5:3: roles.prefill: gpus lists 1 for 2 workers"),
        ("prefill: {}", "prefill: {gpus: [1, 1], tp: 2}", "t.yaml:5:3: roles.prefill: instance 0 would get one GPU"),
        ("prefill: {}", "prefill: {port: 65535, count: 2}", "t.yaml:5:3: roles.prefill: port + 1 is above 65535"),
        ("prefill: {}", "prefill: {args: {port: 1}}", "t.yaml:5:20: roles.prefill.args.port: pdlaunch sets --port its"),
        ("prefill: {}", "prefill: {args: {tp: 2}}", "t.yaml:5:20: roles.prefill.args.tp: pdlaunch sets --tensor-par"),
        (
            "prefill: {}",
            "prefill: {args: {--seed: 2}}",
            "t.yaml:5:20: roles.prefill.args.--seed: not a vLLM flag; write",
        ),
        ("prefill: {}", "prefill: {args: {a_b: 1, a-b: 2}}", "t.yaml:5:28: roles.prefill.args.a-b: given twice, once"),
        ("prefill: {}", "prefill: {env: {A: true}}", "t.yaml:5:19: roles.prefill.env.A: must be text or a number; wr"),
        ("prefill: {}", "prefill: {env: {A-B: 1}}", "t.yaml:5:19: roles.prefill.env.A-B: not a name of an environment"),
        (
            "prefill: {}",
            "prefill: {env: {CUDA_VISIBLE_DEVICES: 1}}",
            "t.yaml:5:19: roles.prefill.env.CUDA_VISIBLE_DEVICES: pdlaunch sets it itself, from roles.<role>.gpus",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_place(tmp_path: Path, old: str, new: str, line: str) -> None:
    """Unknown keys, missing keys and wrong values: file, line, column, key path, and what is allowed."""
    [said] = refusal(tmp_path, GOOD.replace(old, new))
    assert said.startswith(line)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            "hosts: {a: {via: ssh}}",
            "t.yaml:7:13: hosts.a.via: 'ssh' is not supported: this version launches on one mach",
        ),
        ("hosts: {a: {}, b: {}}", "t.yaml:7:1: hosts: 2 hosts (a, b): this version launches on one machine; keep one"),
        ("transport: {link: {}}", "t.yaml:7:13: transport.link: unknown key, did you mean 'links'? (allowed: control,"),
        (
            "transport: {links: {order: [tcp]}}",
            "t.yaml:7:1: transport: links.order.0: there is no link 'tcp', only cma, cuda_ipc, shm, ucx",
        ),
        ("transport: {control: {port: 1}}", "t.yaml:7:1: transport: control.port differs between instances"),
        ("transport: {control: {host: 10.0.0.9}}", "t.yaml:7:13: transport.control: host '10.0.0.9' is not loopback"),
        ("transport: {deadlines: {ack_s: -1}}", "t.yaml:7:25: transport.deadlines.ack_s: must be greater than 0; fou"),
        ("router: {prefill: []}", "t.yaml:7:10: router.prefill: pdlaunch fills in the servers itself; remove it"),
        ("router: {prot: 1}", "t.yaml:7:10: router.prot: unknown key, did you mean 'port'? (allowed: host, port, adm"),
        ("router: {api_key: x}", "t.yaml:7:10: router.api_key: a topology holds no secrets: put the key into a file"),
        ("router: {dispatch: both}", "t.yaml:7:10: router.dispatch: must be 'concurrent' or 'serial'; found 'both'"),
        ("kv_load_failure_policy: maybe", "t.yaml:7:1: kv_load_failure_policy: must be 'recompute' or 'fail'; found"),
        ("preflight: {max_tokens: 0}", "t.yaml:7:13: preflight.max_tokens: must be greater than or equal to 1; found"),
        ("defaults: {start_timeout_s: soon}", "t.yaml:7:12: defaults.start_timeout_s: must be a number"),
    ],
)
def test_a_wrong_section_is_named_with_its_place(tmp_path: Path, more: str, line: str) -> None:
    """The transport and router sections are checked by their own models, and other hosts are refused clearly."""
    [said] = refusal(tmp_path, GOOD + more + "\n")
    assert said.startswith(line)


def test_all_problems_are_shown_in_the_files_order(tmp_path: Path) -> None:
    """One run of `check` shows every problem, not only the first."""
    said = refusal(tmp_path, GOOD.replace("decode: {}", "decode: {count: 0, tpp: 1}").replace("name: chat", "name: A"))
    assert [line.split(": ")[0] for line in said] == ["t.yaml:2:1", "t.yaml:6:12", "t.yaml:6:22"]


def test_roles_must_agree_on_what_shapes_pages(tmp_path: Path) -> None:
    """A KV dtype that differs between prefill and decode is refused before anything starts; dtype and block size have
    one place for both."""
    text = GOOD.replace("decode: {}", "decode: {args: {kv-cache-dtype: fp8}}")
    [said] = refusal(tmp_path, text)
    assert said.startswith("t.yaml:4:1: roles: args kv-cache-dtype is None in prefill and 'fp8' in decode")
    for flag, key in (("dtype", "model.dtype"), ("block-size", "model.block_size")):
        [said] = refusal(tmp_path, GOOD.replace("decode: {}", f"decode: {{args: {{{flag}: 1}}}}"))
        assert said.endswith(f"pdlaunch sets --{flag} itself, from {key}")


def test_fixed_ports_must_not_meet(tmp_path: Path) -> None:
    """Ranges of fixed ports that overlap are refused, the default router port included."""
    text = GOOD.replace("prefill: {}", "prefill: {port: 9000, count: 2}").replace("decode: {}", "decode: {port: 9001}")
    [said] = refusal(tmp_path, text)
    assert "port 9001 is set for roles.prefill.port and for roles.decode.port" in said
    [said] = refusal(tmp_path, GOOD.replace("prefill: {}", "prefill: {control_port: 7999, tp: 2}"))
    assert "port 8000 is set for roles.prefill.control_port and for router.port" in said


def test_merged_keys_are_found_at_their_place(tmp_path: Path) -> None:
    """Anchors and merge keys work, and a wrong value that came through one is named where it stands."""
    text = GOOD.replace("prefill: {}", "prefill: &r {count: 2, env: {A: 1}}").replace("{}", "{<<: *r, count: 3}")
    topology = loaded(tmp_path, text)
    assert (topology.roles.prefill.count, topology.roles.decode.count) == (2, 3)
    assert topology.roles.decode.env == {"A": "1"}
    said = refusal(tmp_path, text.replace("count: 2", "count: 0"))
    assert said[0].startswith("t.yaml:5:16: roles.prefill.count:")


def test_a_role_overrides_defaults_and_null_takes_out(tmp_path: Path) -> None:
    """Args and env of a role go before the defaults'; null removes a default flag."""
    text = GOOD.replace("decode: {}", "decode: {args: {max_num_seqs: 4, seed: null}, env: {A: 2}}")
    text += "defaults: {args: {max-num-seqs: 8, seed: 1}, env: {A: 1, B: x}}\n"
    plan = planned(tmp_path, text)
    prefill, decode = plan.instances
    assert list_after(prefill.argv, "--max-num-seqs") == "8"
    assert list_after(prefill.argv, "--seed") == "1"
    assert list_after(decode.argv, "--max-num-seqs") == "4"
    assert "--seed" not in decode.argv
    assert (prefill.env["A"], decode.env["A"], decode.env["B"]) == ("1", "2", "x")


def list_after(argv: Any, flag: str) -> str:
    assert argv.count(flag) == 1
    return str(argv[argv.index(flag) + 1])


def test_flags_become_command_lines(tmp_path: Path) -> None:
    """true is a bare flag, false its negation, lists are spread, mappings are JSON."""
    flags = "{enforce-eager: true, async-scheduling: false, allowed-origins: [a, b], hf-overrides: {x: 1}}"
    argv = planned(tmp_path, GOOD + f"defaults: {{args: {flags}}}\n").instances[0].argv
    assert "--enforce-eager" in argv
    assert "--no-async-scheduling" in argv
    at = argv.index("--allowed-origins")
    assert argv[at + 1 : at + 3] == ("a", "b")
    assert json.loads(list_after(argv, "--hf-overrides")) == {"x": 1}


def test_the_plan_starts_plain_vllm_with_the_connector(tmp_path: Path) -> None:
    """Each instance is `python -m vllm...` with the kv-transfer-config of its role, and the connector can read it."""
    text = GOOD.replace("decode: {}", "decode: {tp: 2, count: 2}") + (
        "transport: {links: {order: [ucx]}, deadlines: {ack_s: 9}}\nkv_load_failure_policy: fail\n"
    )
    plan = planned(tmp_path, text)
    assert [one.name for one in plan.instances] == ["prefill-0", "decode-0", "decode-1"]
    taken: list[int] = []
    for one in plan.instances:
        assert one.argv[1:3] == ("-m", "vllm.entrypoints.openai.api_server")
        config = json.loads(list_after(one.argv, "--kv-transfer-config"))
        assert config["kv_connector"] == "PDTransportConnector"
        assert config["kv_role"] == {"prefill": "kv_producer", "decode": "kv_consumer"}[one.role]
        assert config["kv_load_failure_policy"] == "fail"
        settings = Settings.parse(config["kv_connector_extra_config"])
        assert (settings.control.host, settings.control.port) == ("127.0.0.1", one.control_port)
        assert (settings.links.order, settings.deadlines.ack_s) == (("ucx",), 9.0)
        assert list_after(one.argv, "--host") == "127.0.0.1"
        taken += [one.port, *one.control_ports]
    assert len(set(taken)) == len(taken) == 3 + 1 + 2 + 2
    assert "--tensor-parallel-size" not in plan.instances[0].argv
    assert list_after(plan.instances[1].argv, "--tensor-parallel-size") == "2"


@pytest.mark.parametrize(
    ("control", "peers"),
    [("{}", ("127.0.0.1/32",)), ("{host: localhost}", ("localhost",)), ("{peers: [10.1.0.0/16]}", ("10.1.0.0/16",))],
)
def test_instances_call_the_hosts_of_their_topology_alone(tmp_path: Path, control: str, peers: tuple[str, ...]) -> None:
    """Pages are fetched from where its instances listen and from nowhere else, unless ``control.peers`` is set."""
    plan = planned(tmp_path, f"{GOOD}transport: {{control: {control}}}\n")
    for one in plan.instances:
        config = json.loads(list_after(one.argv, "--kv-transfer-config"))
        assert Settings.parse(config["kv_connector_extra_config"]).control.peers == peers


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("", ["chat"]),
        (", served_name: one", ["one"]),
        (", served_name: [one, two, org/three]", ["one", "two", "org/three"]),
    ],
)
def test_a_model_has_one_name_or_several(tmp_path: Path, given: str, names: list[str]) -> None:
    """All of them go to vLLM, which answers to each; the first one is in answers, and what pdlaunch itself asks for."""
    plan = planned(tmp_path, GOOD.replace("{id: ./model}", f"{{id: ./model{given}}}"))
    for one in plan.instances:
        at = one.argv.index("--served-model-name")
        assert [*one.argv[at + 1 : at + 1 + len(names)], one.argv[at + 1 + len(names)]] == [*names, "--host"]
    assert (plan.served_name, list(plan.served_names)) == (names[0], names)


@pytest.mark.parametrize("given", ["[]", '""', '[a, ""]', "[1]", "{a: b}"])
def test_a_name_of_a_model_is_text(tmp_path: Path, given: str) -> None:
    """Anything else is named with its place."""
    with pytest.raises(TopologyError, match=r"t\.yaml:3:\d+: model\.served_name"):
        planned(tmp_path, GOOD.replace("{id: ./model}", f"{{id: ./model, served_name: {given}}}"))


def test_lists_of_the_routers_settings_reach_its_command_line(tmp_path: Path) -> None:
    """Each value of one, behind one option; an empty list is none."""
    plan = planned(tmp_path, GOOD + "router: {allowed_hosts: [a.example, b.example], allowed_origins: []}\n")
    at = plan.router.argv.index("--allowed-hosts")
    assert plan.router.argv[at + 1 : at + 3] == ("a.example", "b.example")
    assert "--allowed-origins" not in plan.router.argv


def test_the_router_is_told_of_all_servers(tmp_path: Path) -> None:
    """The router's command line parses into settings with every server and its control address."""
    text = GOOD.replace("prefill: {}", "prefill: {count: 2}")
    text += "router: {dispatch: serial, timeouts: {connect_s: 3}, api_key_file: keys}\n"
    plan = planned(tmp_path, text)
    settings = settings_from(parser().parse_args(plan.router.argv[3:]))
    assert settings.dispatch == "serial"
    assert settings.timeouts.connect_s == 3
    assert settings.api_key_file == tmp_path / "keys"
    told = [(one.url, one.control_host, one.control_port, one.tp_size) for one in settings.prefill + settings.decode]
    assert told == [(one.url, one.control_host, one.control_port, one.tp) for one in plan.instances]
    assert (settings.host, settings.port) == (plan.router.host, plan.router.port) == ("127.0.0.1", 8000)


def test_the_router_asks_workers_with_their_own_keys(tmp_path: Path) -> None:
    """With CURVE on, traces hold the workers' part too."""
    text = GOOD + "transport: {control: {curve_public_key_file: pub, curve_secret_key_file: sec}}\n"
    settings = settings_from(parser().parse_args(planned(tmp_path, text).router.argv[3:]))
    assert settings.curve_public_key_file == tmp_path / "pub"
    assert settings.curve_secret_key_file == tmp_path / "sec"


def test_cores_are_shared_out(tmp_path: Path) -> None:
    """Cores named by hand go to workers in order; vLLM gets one part for each worker."""
    text = GOOD.replace("prefill: {}", "prefill: {cpu: 0-7, count: 2, tp: 2}").replace("{}", "{cpu: [9, 8]}")
    plan = planned(tmp_path, text)
    binds = [one.env["VLLM_CPU_OMP_THREADS_BIND"] for one in plan.instances]
    assert binds == ["0-1|2-3", "4-5|6-7", "9,8"]


def test_cores_by_default_are_an_even_share(tmp_path: Path) -> None:
    """Where no role names cores, every worker gets its own while there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    plan = planned(tmp_path, GOOD)
    shares = [set(part) for one in plan.instances for part in one.cores]
    assert set.union(*shares) == set(cores) if len(cores) >= 2 else True
    assert sum(map(len, shares)) == max(len(cores), 2)


@pytest.mark.parametrize(("text", "cores"), [("0-3,8", [0, 1, 2, 3, 8]), ("5", [5]), (" 1 - 2 ,4", [1, 2, 4])])
def test_core_lists_go_back_and_forth(text: str, cores: list[int]) -> None:
    """Core lists parse as taskset's do, and print as vLLM reads them."""
    assert parse_cores(text) == cores
    assert parse_cores(format_cores(cores)) == cores


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "0-99999", "1,,2", "-1"])
def test_bad_core_lists_are_refused(text: str) -> None:
    """What is no list of cores raises."""
    with pytest.raises(ValueError, match="not a list of cores"):
        parse_cores(text)


def test_shares_are_even() -> None:
    """No worker gets more than one core more than another."""
    assert share_out([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert share_out([7], 3) == [[7], [7], [7]]


def test_gpus_are_shared_out_and_shared_gpus_start_in_turn(tmp_path: Path) -> None:
    """Each instance sees its own GPUs only; instances on one GPU start one after the other."""
    from pdtransport.launch.up import waves

    text = GOOD.replace("prefill: {}", "prefill: {gpus: [0, 1, 2, 3], tp: 2, count: 2}").replace("{}", "{gpus: [3]}")
    plan = planned(tmp_path, text)
    assert [one.env["CUDA_VISIBLE_DEVICES"] for one in plan.instances] == ["0,1", "2,3", "3"]
    assert not [one for one in plan.instances if "VLLM_CPU_OMP_THREADS_BIND" in one.env]
    assert [[one.name for one in wave] for wave in waves(plan.instances)] == [["prefill-0", "prefill-1"], ["decode-0"]]


def test_picked_ports_are_free_and_apart() -> None:
    """A port that is in use, or was handed out, is not picked; control ports come in a row."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 21352))
        taken.listen(1)
        ports = Ports(21350, 21356)
        first = ports.pick(3)
        assert first == 21353
        assert {ports.pick(), ports.pick()} == {21350, 21351}
        with pytest.raises(PlanError, match="set the ports in the topology"):
            ports.pick()


def test_secrets_are_masked_in_what_is_shown(tmp_path: Path) -> None:
    """`check` prints environments, but not tokens and keys."""
    plan = planned(tmp_path, GOOD + "defaults: {env: {HF_TOKEN: abc123, MY_API_KEY: def456, LEVEL: 3}}\n")
    shown = json.dumps(plan.public())
    assert "abc123" not in shown
    assert "def456" not in shown
    assert '"LEVEL": "3"' in shown
    assert plan.instances[0].env["HF_TOKEN"] == "abc123"


def found(folder: Path, text: str) -> list[str]:
    """Preflight's errors, without those about the installed vLLM."""
    topology, file = load(written(folder, text))
    plan = make_plan(topology, folder, ports=Ports(21350, 21399))
    return [one.text.replace(f"{folder}/", "") for one in preflight.check(topology, plan, file, vllm=False)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_attention_heads": 8}')
    (model / "model.safetensors").write_bytes(b"0" * 1000)
    return tmp_path


SOUND = GOOD + "defaults: {args: {kv-cache-memory-bytes: 1048576}}\nrouter: {port: 21349}\n"


def test_preflight_of_a_sound_topology_finds_nothing(folder: Path) -> None:
    """A model that is there, free ports and enough memory: nothing to say (on two cores and more)."""
    text = SOUND if len(os.sched_getaffinity(0)) > 1 else SOUND.replace("{}", "{cpu: [0]}")
    assert [line for line in found(folder, text) if "slow each other down" not in line] == []


@pytest.mark.parametrize(
    ("break_it", "line"),
    [
        (
            lambda m: m.rename(m.with_name("gone")),
            "t.yaml:3:9: model.id: folder model does not exist: correct the path",
        ),
        (lambda m: (m / "config.json").unlink(), "t.yaml:3:9: model.id: model/config.json: No such file"),
        (lambda m: (m / "config.json").write_text("{"), "t.yaml:3:9: model.id: model/config.json is not JSON"),
        (lambda m: (m / "model.safetensors").unlink(), "t.yaml:3:9: model.id: model has no weights"),
    ],
)
def test_a_model_that_is_not_there_is_named(folder: Path, break_it: Any, line: str) -> None:
    """A model path that is wrong is found before minutes of loading, and named with its line."""
    break_it(folder / "model")
    assert found(folder, SOUND)[0].startswith(line)


def test_a_hub_id_that_can_be_none_is_refused(folder: Path) -> None:
    """An id that is neither a folder nor of a hub's form is refused; one of a hub's form is left to vLLM."""
    assert "neither a folder here nor a hub id" in found(folder, SOUND.replace("./model", "'a b'"))[0]
    assert not [line for line in found(folder, SOUND.replace("./model", "org/name")) if "model.id" in line]


def test_preflight_counts_cores_heads_and_memory(folder: Path) -> None:
    """Cores that are not there, too few of them, heads that don't divide, and too little memory are found."""
    many = len(os.sched_getaffinity(0)) + 1
    for broken, told in (
        (
            SOUND.replace("prefill: {}", "prefill: {cpu: [4000]}"),
            "roles.prefill.cpu: cores 4000 are not available",
        ),
        (SOUND.replace("{}", f"{{count: {many}}}", 1), f"{many + 1} CPU workers on"),
        (SOUND.replace("{}", "{tp: 3}", 1), "8 attention heads are not divisible by 3"),
        (SOUND.replace("1048576", str(1 << 50)), "GiB are available"),
        (GOOD + "router: {port: 0}", "a CPU role needs args kv-cache-memory-bytes"),
    ):
        assert any(told in line for line in found(folder, broken)), told


def test_preflight_knows_which_placement_policies_are_installed(folder: Path) -> None:
    """A policy that is not there is found before engines start, with its line; those that are there pass."""
    text = SOUND.replace("{port: 21349}", "{port: 21349, placement: {policy: POLICY}}")
    [said] = [line for line in found(folder, text) if "POLICY" in line]
    assert re.match(r"t\.yaml:\d+:\d+: router\.placement\.policy: there is no placement policy 'POLICY'", said)
    assert not [line for line in found(folder, text.replace("POLICY", "least_loaded")) if "policy" in line]


def test_check_prints_the_plan_and_says_if_it_could_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pdlaunch check` shows ports, command lines and environment, starts nothing, and its status is preflight's."""
    path = written(folder, SOUND.replace("{}", "{cpu: [0]}"))
    status = cli.main(["check", str(path), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert status == (cli.PREFLIGHT if any(one["error"] for one in told["findings"]) else cli.OK)
    assert [one["name"] for one in told["instances"]] == ["prefill-0", "decode-0"]
    cli.main(["check", str(path)])
    shown = capsys.readouterr().out
    assert "VLLM_CPU_OMP_THREADS_BIND=0" in shown
    assert "-m vllm.entrypoints.openai.api_server" in shown
    assert "-m pdtransport.router.cli" in shown
    path.write_text(path.read_text().replace("name: chat", "nmae: chat"))
    assert cli.main(["check", str(path)]) == cli.USAGE
    assert "did you mean 'name'?" in capsys.readouterr().err


def test_status_of_what_is_not_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pdlaunch status` of a topology that nobody started says so."""
    path = written(folder, SOUND)
    assert cli.main(["status", str(path), "--run-dir", str(folder / "run")]) == cli.NOT_UP
    assert "chat is not up: start it with `pdlaunch up" in capsys.readouterr().err


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`pdlaunch keys` makes a pair that a topology can name, and never overwrites one."""
    assert cli.main(["keys", str(tmp_path / "keys")]) == cli.OK
    text = GOOD + capsys.readouterr().out + "    host: 10.1.2.3\n"
    control = loaded(tmp_path, text).transport.control
    assert control.curve_secret_key_file is not None
    assert control.curve_secret_key_file.stat().st_mode & 0o077 == 0
    assert cli.main(["keys", str(tmp_path / "keys")]) == cli.USAGE
    assert "never overwritten" in capsys.readouterr().err


POOL = """\
pool:
  name: kv
  dir: ./place
  memory_bytes: 3GiB
  quotas: {alice: 1GiB}
  disk: {path: ./disk, bytes: 8 GiB, codec: zstd}
  http: {listen: "127.0.0.1:0", key_file: ./keys}
  remote: {listen: "127.0.0.1:7700", max_clients: 3}
"""


def test_a_pool_is_started_for_all_instances(tmp_path: Path) -> None:
    """Its command line says what the file says, paths relative to the file; every instance uses this pool, with what
    transport.pool says beside."""
    plan = planned(tmp_path, GOOD + POOL + "transport: {pool: {chunk_blocks: 4}}\n")
    assert plan.pool is not None
    settings = pool_settings_from(pool_parser().parse_args(list(plan.pool.argv[3:])))
    assert (settings.name, settings.dir) == ("kv", tmp_path / "place")
    assert (settings.memory_bytes, settings.quotas) == (3 << 30, {"alice": 1 << 30})
    assert settings.disk is not None
    assert (settings.disk.path, settings.disk.bytes, settings.disk.codec) == (tmp_path / "disk", 8 << 30, "zstd")
    assert settings.http is not None
    assert settings.http.key_file == tmp_path / "keys"
    assert settings.remote is not None
    assert (settings.remote.port, settings.remote.max_clients) == (7700, 3)
    assert plan.pool.url == f"http://127.0.0.1:{settings.http.address[1]}"
    assert 21350 <= settings.http.address[1] < 21399
    for instance in plan.instances:
        config = json.loads(instance.argv[instance.argv.index("--kv-transfer-config") + 1])
        use = Settings.parse(config["kv_connector_extra_config"]).pool
        assert use is not None
        assert (use.name, use.dir, use.chunk_blocks) == ("kv", tmp_path / "place", 4)
    assert planned(tmp_path, GOOD).pool is None


@pytest.mark.parametrize(
    ("more", "key", "salt"),
    [
        (POOL, "keys", None),
        (POOL + "transport: {pool: {salt_file: ./salt}}\n", "keys", "salt"),
        ("pool: {dir: ./place, redis: {url: 'redis://h', bytes: 1GiB}}\n", "run/pool.key", None),
        ("pool: {dir: ./place}\n", None, None),
        (POOL + "transport: {pool: {hint: false}}\n", None, None),
        (POOL + "transport: {pool: {load: false}}\n", None, None),
        (POOL + "router: {pool_hint: {}}\n", None, None),
    ],
)
def test_the_router_tells_a_pool_with_a_tier_below_memory(
    tmp_path: Path, more: str, key: str | None, salt: str | None
) -> None:
    """With the API and the salt that there are; without an API of the topology's own with one on loopback, under a key
    that is made at start. Not where nothing can lie below memory, or where the file says otherwise."""
    plan = planned(tmp_path, GOOD + more)
    assert plan.pool is not None
    pool = pool_settings_from(pool_parser().parse_args(list(plan.pool.argv[3:])))
    hint = router_settings_from(router_parser().parse_args(list(plan.router.argv[3:]))).pool_hint
    if key is None:
        assert (hint.url, plan.pool.new_key) == (None, None)
        return
    assert pool.http is not None
    assert hint.url == plan.pool.url == f"http://127.0.0.1:{pool.http.address[1]}"
    assert hint.key_file == pool.http.key_file == tmp_path / key
    assert hint.salt_file == (None if salt is None else tmp_path / salt)
    assert plan.pool.new_key == (None if key == "keys" else tmp_path / key)


@pytest.mark.parametrize(
    ("pool", "kept"),
    [
        ("{dir: ./place, redis: {url: 'redis://h', bytes: 1GiB}}", True),
        ("{dir: ./place, disk: {path: ./open, bytes: 1GiB}}", True),
        ("{dir: ./place, disk: {path: ./open, bytes: 1GiB}, digest: 'off'}", False),
        ("{dir: ./place, disk: {path: ./disk, bytes: 1GiB}}", False),
        ("{dir: ./place, redis: {url: 'redis://h', bytes: 1GiB}, digest_key_file: ./mine}", False),
        ("{dir: ./place}", False),
    ],
)
def test_a_pool_with_a_tier_that_others_can_write_to_has_a_key_that_outlives_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: str, kept: bool
) -> None:
    """In the topology's own folder, whatever --run-dir is: chunks that it signed are there after the run. The file's
    own key file is used as it is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    plan = planned(tmp_path, GOOD + f"pool: {pool}\n")
    assert plan.pool is not None
    settings = pool_settings_from(pool_parser().parse_args(list(plan.pool.argv[3:])))
    place = tmp_path / "state" / "pdlaunch" / plan.name / "pool.digest" if kept else None
    assert plan.pool.digest_key == place
    assert settings.digest_key_file == (tmp_path / "mine" if "mine" in pool else place)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pool: {memory_bytes: 3GB}", "t.yaml:7:8: pool.memory_bytes: must be an integer"),
        ("pool: {disk: {path: x, byte: 1}}", "t.yaml:7:24: pool.disk.byte: unknown key, did you mean 'bytes'?"),
        ("pool: {policy: best}", "t.yaml:7:8: pool.policy: "),
        ("pool: {redis: {url: 'redis://me:secret@h', bytes: 1GiB}}", "t.yaml:7:16: pool.redis.url: "),
        ("pool: {http: {listen: '127.0.0.1:1'}}", "pool.http.key_file: missing; "),
        ("pool: {frame_bytes: 5000}", "pool: frame_bytes is 5000, it must be a multiple of 4096"),
        ("pool: {}\ntransport: {pool: {name: other}}", "t.yaml:7:1: pool: transport.pool.name differs from that"),
        ("pool: {}\nkv_load_failure_policy: fail", "t.yaml:8:1: kv_load_failure_policy: "),
        ("pool: {http: {listen: '127.0.0.1:9', key_file: k}}\nrouter: {port: 9}", "port 9 is set for"),
    ],
)
def test_mistakes_in_a_pool_are_named_with_line_and_key(tmp_path: Path, text: str, says: str) -> None:
    """As for all other sections."""
    (line,) = refusal(tmp_path, GOOD + text + "\n")
    assert says in line

"""``pdlaunch TOPOLOGY``: starts a disaggregated service on this machine, proves that it works, and keeps it running.

`pdlaunch topology.yaml` is short for `pdlaunch up topology.yaml`. For a file with the name of a verb: `pdlaunch ./up`.

Exit status:
  0    done; for `up`: stopped on request after it was up
  1    `status`: no such run is up, or a worker does not answer; `pool`: no such pool exists
  2    the command line or the topology file is wrong
  3    preflight found a reason not to start
  4    a process did not start
  5    a process ended while serving
  6    the proof failed: the service runs, but not as it should
  74   its output, or another file, can't be written; one line says which
  130  interrupted while starting (143: terminated, 129: hung up)
  141  the reader of its output closed the pipe
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pdtransport.errors import PDTransportError, PoolRefusal, PoolUnavailable
from pdtransport.launch import guard, pool, preflight, prove, runs, size, status
from pdtransport.launch.plan import Command, Plan, PlanError, make_plan, vllm_command
from pdtransport.launch.processes import ProcessGroup
from pdtransport.launch.reading import load
from pdtransport.launch.rundir import RunError, RunFolder, default_folder
from pdtransport.launch.topology import Topology
from pdtransport.launch.up import Deployment, Interrupted, ProcessFailed, Say, Signals
from pdtransport.launch.yamlfile import TopologyError, YamlFile
from pdtransport.serving.commandline import CommandParser, complain, tell
from pdtransport.serving.commandline import command as command_of

VERBS = ("up", "check", "status", "keys", "size", "pool")
OK, NOT_UP, USAGE, PREFLIGHT, NOT_STARTED, DIED, UNPROVEN = 0, 1, 2, 3, 4, 5, 6


class UsageError(Exception):
    """The command line is wrong; the text is one line."""


def parser() -> argparse.ArgumentParser:
    made = CommandParser(prog="pdlaunch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in (
        ("up", "start a topology, prove that it works, and run it until Ctrl-C"),
        ("check", "validate a topology and show what would run; starts nothing"),
        ("status", "show the status of a running topology's workers"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("topology", type=Path, metavar="TOPOLOGY", help="a topology file, such as topology.yaml")
        verb.add_argument("--json", action="store_true", help="answer with one JSON object on standard output")
        verb.add_argument(
            "--run-dir", type=Path, metavar="DIR", help="folder of the run, with its logs (default: by name)"
        )
    verbs.choices["up"].add_argument("--no-proof", action="store_true", help="skip the golden prompt")
    keys = verbs.add_parser("keys", help="make a CURVE key pair for the control channel")
    keys.add_argument("folder", type=Path, metavar="DIR", help="folder to write the pair to; created if missing")
    sizes = verbs.add_parser(
        "size", help="show the size of a model's KV cache, and how long its pages take over a link"
    )
    sizes.add_argument("model", type=Path, metavar="MODEL", help="a model's folder, or its config.json")
    sizes.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks (1)")
    sizes.add_argument("--block-size", type=int, default=16, metavar="TOKENS", help="tokens per block (16)")
    sizes.add_argument(
        "--dtype", default="auto", help="data type of the KV cache, such as fp8 (auto: that of the weights)"
    )
    sizes.add_argument("--tokens", type=int, nargs="+", metavar="N", help="prompt lengths to report")
    sizes.add_argument(
        "--rate", action="append", default=[], metavar="NAME=GB/s", help="a link's rate; may be repeated"
    )
    sizes.add_argument("--json", action="store_true", help="answer with one JSON object")
    pool.add_parser(verbs)
    assert tuple(verbs.choices) == VERBS
    return made


def spelt_out(argv: Sequence[str]) -> list[str]:
    """``argv`` with the verb ``up`` added if it names only a topology.

    Raises:
        UsageError: the first argument is neither a verb nor a topology file.
    """
    words = list(argv)
    verbs = ", ".join(VERBS)
    if not words:
        raise UsageError(f"nothing to do: give a topology file, or one of {verbs} (options: pdlaunch --help)")
    first = words[0]
    if first in VERBS:
        return words
    if first.startswith("-"):
        short = any(map(_names_topology, words)) and not set(words) & set(VERBS)
        return ["up", *words] if short else words
    if _names_topology(first):
        return ["up", *words]
    raise UsageError(f"{first!r} is neither one of {verbs} nor a topology file (options: pdlaunch --help)")


def _names_topology(word: str) -> bool:
    if word.startswith("-"):
        return False
    return Path(word).suffix in (".yaml", ".yml") or os.sep in word or Path(word).is_file()


@command_of("pdlaunch")
def main(argv: Sequence[str] | None = None, *, command: Command = vllm_command) -> int:
    """Entry point; returns the exit status. ``command`` replaces the servers that `up` starts (for tests)."""
    try:
        arguments = parser().parse_args(spelt_out(sys.argv[1:] if argv is None else argv))
    except UsageError as error:
        return _fail(error, USAGE)
    verbs: dict[str, Callable[[], int]] = {
        "up": lambda: _up(arguments, command),
        "check": lambda: _check(arguments),
        "status": lambda: _status(arguments),
        "keys": lambda: _keys(arguments),
        "size": lambda: _size(arguments),
        "pool": lambda: _pool(arguments),
    }
    try:
        return verbs[arguments.verb]()
    except TopologyError as error:
        return _fail(error, USAGE)
    except size.SizeError as error:
        return _fail(error, USAGE)
    except (PlanError, RunError) as error:
        return _fail(error, PREFLIGHT)
    except PDTransportError as error:  # a setting that turns out wrong only in use
        return _fail(error, NOT_STARTED if arguments.verb == "up" else USAGE)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Interrupted as stop:  # before anything was started, or after all were asked to stop
        return 128 + stop.number


def _fail(error: object, exit_status: int) -> int:
    for line in str(error).splitlines():
        complain(line if line.startswith("  ") else f"pdlaunch: {line}")
    return exit_status


def _up(arguments: argparse.Namespace, command: Command) -> int:
    topology, file = load(arguments.topology)
    say = _sayer(arguments)
    with RunFolder(_folder(arguments, topology)) as folder, _listed(topology, folder, say):
        plan = make_plan(topology, file.path.parent, run_folder=folder.path, command=command)
        if not _preflight(topology, plan, file, say, vllm=command is vllm_command):
            return PREFLIGHT
        guard.become_subreaper()
        grace_s = topology.defaults.stop_timeout_s
        with ProcessGroup(folder.path, grace_s=grace_s, adopt=True) as fleet, Signals(fleet) as signals:
            try:
                return _run(arguments, topology, plan, fleet, folder, say)
            finally:
                signals.shield()
                fleet.stop()


@contextmanager
def _listed(topology: Topology, folder: RunFolder, say: Say) -> Iterator[None]:
    """Let `pdlaunch status` find the run by its name inside the ``with`` block."""
    try:
        runs.remember(topology.name, folder.path)
    except OSError as error:
        say(f"warning: `pdlaunch status` will need --run-dir {folder.path}: {error}")
    try:
        yield
    finally:
        runs.forget(topology.name, folder.path)


def _run(
    arguments: argparse.Namespace, topology: Topology, plan: Plan, fleet: ProcessGroup, folder: RunFolder, say: Say
) -> int:
    launch = Deployment(topology, plan, fleet, folder, say)
    serving = False
    try:
        what = f"{'a pool, ' if plan.pool else ''}{len(plan.instances)} servers and a router"
        say(f"{plan.name}: {what}; logs in {folder.path}")
        launch.start()
        folder.record({"pid": os.getpid(), "state": "proving", **plan.public()})
        proof = None
        if topology.preflight.golden_prompt and not arguments.no_proof:
            proof = prove.prove(topology, plan, say, launch.check)
        launch.check()
        serving = True
        folder.record({"pid": os.getpid(), "state": "serving", **plan.public()})
        if arguments.json:
            print(json.dumps({**plan.public(), "proof": proof.public() if proof else None}), flush=True)
        say(_invitation(plan, folder.path))
        launch.hold()
    except ProcessFailed as error:
        return _fail(error, DIED if serving else NOT_STARTED)
    except prove.ProofError as error:
        return _fail(error, UNPROVEN)
    except Interrupted as stop:
        say(f"{stop}: stopping {plan.name}")
        return OK if serving else 128 + stop.number
    return OK


def _preflight(topology: Topology, plan: Plan, file: YamlFile, say: Say, *, vllm: bool = True) -> bool:
    """Print the findings; True if none of them is an error."""
    findings = preflight.check(topology, plan, file, vllm=vllm)
    for finding in findings:
        if finding.error:
            _fail(finding.text, PREFLIGHT)
        else:
            say(f"warning: {finding.text}")
    return not any(finding.error for finding in findings)


def _check(arguments: argparse.Namespace) -> int:
    topology, file = load(arguments.topology)
    plan = make_plan(topology, file.path.parent, run_folder=_folder(arguments, topology))
    if arguments.json:
        findings = preflight.check(topology, plan, file)
        told = [{"text": finding.text, "error": finding.error} for finding in findings]
        print(json.dumps({**plan.public(), "findings": told}, indent=2))
        return PREFLIGHT if any(finding.error for finding in findings) else OK
    sound = _preflight(topology, plan, file, print)
    _show(plan, topology)
    return OK if sound else PREFLIGHT


def _show(plan: Plan, topology: Topology) -> None:
    public = plan.public()
    print(f"{plan.name}: {plan.model} as {', '.join(map(repr, plan.served_names))}")
    for instance, shown in zip(plan.instances, public["instances"], strict=True):
        picked = "" if topology.by_role()[instance.role].port else " (`up` picks a new one)"
        print(f"\n{instance.name}: {instance.url}{picked}, control {' '.join(shown['control'])}, {instance.place}")
        for key, value in shown["environment"].items():
            print(f"  {key}={shlex.quote(value)}")
        print(f"  {shlex.join(shown['command'])}")
    if plan.pool is not None:
        print(f"\npool: {plan.pool.name} in {plan.pool.dir}\n  {shlex.join(plan.pool.argv)}")
    print(f"\nrouter: {plan.router.url}\n  {shlex.join(plan.router.argv)}")


def _status(arguments: argparse.Namespace) -> int:
    topology, _ = load(arguments.topology)
    try:
        folder = runs.find(topology.name, arguments.run_dir)
        found = status.collect(topology, folder, file_folder=arguments.topology.parent)
    except runs.Ambiguous as error:
        return _fail(error, USAGE)
    except runs.Starting as error:
        return _fail(error, NOT_UP)
    except runs.NotUp as error:
        return _fail(f"{error}: start it with `pdlaunch up {arguments.topology}`", NOT_UP)
    if found is None:  # it has just ended
        return _fail(f"{topology.name} is no longer up", NOT_UP)
    print(json.dumps(found, indent=2) if arguments.json else status.as_text(found))
    return OK if found["healthy"] else NOT_UP


def _keys(arguments: argparse.Namespace) -> int:
    from pdtransport.control import curve

    try:
        public, secret = curve.make_keys(arguments.folder.absolute())
    except PDTransportError as error:
        return _fail(error, USAGE)
    print(
        "# a new key pair; set it in the topology of all instances that exchange pages:\n"
        f"transport:\n  control:\n    curve_public_key_file: {public}\n    curve_secret_key_file: {secret}"
    )
    return OK


def _size(arguments: argparse.Namespace) -> int:
    found = size.kv_size(
        size.read_config(arguments.model), tp=arguments.tp, block_size=arguments.block_size, dtype=arguments.dtype
    )
    tokens = arguments.tokens or size.DEFAULT_TOKENS
    if min(tokens) < 1:
        raise size.SizeError(f"--tokens {min(tokens)}: a prompt has at least 1 token")
    rates = dict(map(size.parse_rate, arguments.rate)) or size.NOMINAL_RATES
    told = size.report(found, tokens, rates)
    print(json.dumps(told, indent=2) if arguments.json else size.as_text(found, tokens, rates))
    return OK


def _pool(arguments: argparse.Namespace) -> int:
    try:
        print(pool.run(arguments))
    except PoolRefusal as error:
        return _fail(error, USAGE)
    except PoolUnavailable as error:
        return _fail(error, NOT_UP)
    except PDTransportError as error:
        return _fail(error, USAGE)
    return OK


def _folder(arguments: argparse.Namespace, topology: Topology) -> Path:
    return (arguments.run_dir or default_folder(topology.name)).absolute()


def _sayer(arguments: argparse.Namespace) -> Say:
    """Returns the function that prints progress: to standard output, or with ``--json`` to standard error."""
    return complain if arguments.json else tell


def _invitation(plan: Plan, logs: Path) -> str:
    body = json.dumps({"model": plan.served_name, "prompt": "def main(argv=None):", "max_tokens": 32, "temperature": 0})
    admin = plan.router.admin_url
    return (
        f"{plan.name} is up. Send requests to {plan.router.url}/v1, for example:\n"
        f"  curl {plan.router.url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}\n"
        f"{_pool_line(plan)}"
        f"Its state: {admin}/pd/status and {admin}/pd/traces; metrics: {admin}/metrics; logs: {logs}\n"
        "Ctrl-C stops it."
    )


def _pool_line(plan: Plan) -> str:
    if plan.pool is None:
        return ""
    where = f" and at {plan.pool.url}" if plan.pool.url else ""
    command = shlex.join(["pdlaunch", "pool", "status", "--pool", plan.pool.name, "--dir", str(plan.pool.dir)])
    return f"Show its pool with `{command}`{where}.\n"


if __name__ == "__main__":
    sys.exit(main())

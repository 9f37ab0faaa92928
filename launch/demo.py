"""``python -m pdtransport.launch.demo TOPOLOGY``: runs a topology with real prompts and checks every token.

Starts the topology, completes real prompts through its router, shows where the time of each went, and compares every
token with those of a plain server. Exit status 0 only if all are equal.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pdtransport.errors import PDTransportError
from pdtransport.launch import guard, preflight, prove, waterfall, web
from pdtransport.launch.plan import Instance, Plan, make_plan
from pdtransport.launch.processes import ProcessGroup
from pdtransport.launch.reading import load
from pdtransport.launch.rundir import RunFolder
from pdtransport.launch.topology import Topology
from pdtransport.launch.up import Deployment, Interrupted, Signals, await_health, check
from pdtransport.launch.yamlfile import TopologyError
from pdtransport.serving.commandline import command

ANSWER_S = 180.0
RUN_DIR = Path(".demo")

SHORT = "import os\n"
CODE = '''\
class Stack:
    """A stack of items, with a bound on their number."""

    def __init__(self, limit=1000):
        self.items = []
        self.limit = limit

    def push(self, item):
        """Put item on top; IndexError if the stack is full."""
        if len(self.items) >= self.limit:
            raise IndexError("the stack is full")
        self.items.append(item)

    def pop(self):
'''
PROSE = (
    "The logging module defines functions and classes which implement a flexible event logging system for "
    "applications and libraries. The key benefit of having the logging API provided by a standard library module is "
    "that all Python modules can participate in application logging, so your application log can include your own "
    "messages integrated with messages from third-party modules."
)


@dataclass(frozen=True)
class DemoPrompt:
    title: str
    path: str
    body: dict[str, Any]
    stream: bool = False


@dataclass(frozen=True)
class Written:
    """The answer to one prompt."""

    tokens: list[int]
    text: str
    transfer_id: str
    seconds: float


def prompts(model: str, chat: bool) -> list[DemoPrompt]:
    """Real prompts: beginnings of Python source and prose, from less than a page to thousands of tokens."""
    source = Path(argparse.__file__).read_text(encoding="utf-8")
    common = {"model": model, "temperature": 0, "max_tokens": 32, "return_token_ids": True}

    def completion(title: str, prompt: str, stream: bool = False, **more: Any) -> DemoPrompt:
        return DemoPrompt(title, "/v1/completions", {**common, "prompt": prompt, **more}, stream)

    made = [
        completion("a few tokens, far less than a page", SHORT),
        completion("a class to continue, streamed", CODE, stream=True),
        completion("prose", PROSE),
        completion("4,000 characters of argparse.py", source[:4000]),
        completion("9,000 characters of argparse.py, whose beginning is cached", source[:9000], stream=True),
        completion("20,000 characters from its middle, streamed", source[20000:40000], stream=True),
        completion("the same again: all cached except its end", source[20000:40000]),
    ]
    if chat:
        asked = [{"role": "user", "content": PROSE}, {"role": "user", "content": CODE}]
        body = {**common, "messages": asked}
        made.append(DemoPrompt("chat", "/v1/chat/completions", body))
        made.append(DemoPrompt("chat, streamed", "/v1/chat/completions", {**body, "messages": asked[::-1]}, True))
    return made


def send(base: str, prompt: DemoPrompt) -> Written:
    """Complete ``prompt`` on the server or router at ``base``.

    Raises:
        web.WebError: an error, or an answer without tokens.
    """
    started = time.monotonic()
    if prompt.stream:
        headers, events = web.stream(base + prompt.path, {**prompt.body, "stream": True}, ANSWER_S)
        pieces = [_piece(choice) for event in events for choice in event.get("choices", ())]
    else:
        answer = web.post(base + prompt.path, prompt.body, ANSWER_S)
        if answer.status != 200:
            raise web.WebError(f"{base}{prompt.path} answered {answer.status}: {str(answer.body)[:500]}")
        headers, pieces = answer.headers, [_piece(choice) for choice in answer.body["choices"]]
    tokens = [token for ids, _ in pieces for token in ids]
    if not tokens:
        raise web.WebError(f"{base}{prompt.path}: the answer to {prompt.title!r} holds no token ids")
    text = "".join(text for _, text in pieces)
    return Written(tokens, text, headers.get("x-pd-transfer-id", ""), time.monotonic() - started)


def _piece(choice: dict[str, Any]) -> tuple[list[int], str]:
    said = choice.get("message") or choice.get("delta") or choice
    return choice.get("token_ids") or [], said.get("text") or said.get("content") or ""


def show(number: int, prompt: DemoPrompt, written: Written, plan: Plan) -> None:
    print(f"\n[{number}] {prompt.title}: {len(written.tokens)} tokens in {written.seconds * 1e3:.0f} ms")
    print(textwrap.indent(written.text.rstrip(), "    > ", lambda line: True))
    answer = web.get(f"{plan.router.admin_url}/pd/trace/{written.transfer_id}", ANSWER_S)
    if answer.status != 200:
        print(f"    (no trace: {answer.body})")
        return
    print(f"    {waterfall.moved(answer.body)}")
    for line in waterfall.bars(waterfall.milestones(answer.body, written.seconds)):
        print(f"    {line}")
    sys.stdout.flush()


def plain_server(instance: Instance) -> Instance:
    """The same server without disaggregation."""
    at = instance.argv.index("--kv-transfer-config")
    return replace(instance, name="plain", role="plain", argv=instance.argv[:at] + instance.argv[at + 2 :])


def has_chat(plan: Plan) -> bool:
    """True if the model's folder has a chat template."""
    folder = Path(plan.model)
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "chat_template" in config or (folder / "chat_template.jinja").exists()


def differences(asked: Sequence[DemoPrompt], ours: Sequence[Written], plain: Sequence[Written]) -> Iterator[str]:
    for number, (prompt, one, other) in enumerate(zip(asked, ours, plain, strict=True), 1):
        if one.tokens != other.tokens:
            yield f"[{number}] {prompt.title}:\n  disaggregated {one.tokens}\n  plain         {other.tokens}"


def run(topology: Topology, plan: Plan, fleet: ProcessGroup, folder: RunFolder) -> int:
    """The demo itself; returns the exit status."""
    started = time.monotonic()
    asked = prompts(plan.served_name, has_chat(plan))
    launch = Deployment(topology, plan, fleet, folder, _say)
    launch.start()
    prove.prove(topology, plan, _say, launch.check)
    ours = []
    for number, prompt in enumerate(asked, 1):
        launch.check()
        ours.append(send(plan.router.url, prompt))
        show(number, prompt, ours[-1], plan)
    _say("\nstopping the pair, starting a plain server to compare with")
    fleet.stop()
    server = plain_server(plan.of("decode")[0])
    plain = fleet.start(server.name, server.argv, env={**launch.environment, **server.env})
    await_health(lambda: check(fleet), [(plain, server.url)], topology.defaults.start_timeout_s, _say)
    wrong = list(differences(asked, ours, [send(server.url, prompt) for prompt in asked]))
    print("\n".join(wrong), end="\n" if wrong else "")
    total = sum(len(one.tokens) for one in ours)
    equal = len(asked) - len(wrong)
    _say(
        f"{equal} of {len(asked)} answers ({total} tokens) equal the plain server's; {time.monotonic() - started:.0f} s"
    )
    return 1 if wrong else 0


def what_next(topology: Path) -> str:
    """Hints for users after a successful demo."""
    pdlaunch = Path(sys.executable).with_name("pdlaunch")
    return (
        f"\nTo keep it running and send requests yourself: {pdlaunch} {topology}\nFor a model and machines of your "
        "own: README.md, docs/pdlaunch.md"
    )


def _say(text: str) -> None:
    print(text, flush=True)


@command("demo")
def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description="Run a topology with real prompts; see the module's docstring.")
    options.add_argument("topology", type=Path)
    options.add_argument("--run-dir", type=Path, default=RUN_DIR, help="folder of the logs (default: .demo)")
    chosen = options.parse_args(argv)
    try:
        topology, file = load(chosen.topology)
        with RunFolder(chosen.run_dir.absolute()) as folder:
            plan = make_plan(topology, file.path.parent, run_folder=folder.path)
            findings = preflight.check(topology, plan, file)
            for finding in findings:
                print(f"demo: {finding.text}", file=sys.stderr)
            if any(finding.error for finding in findings):
                return 1
            guard.become_subreaper()
            grace_s = topology.defaults.stop_timeout_s
            with ProcessGroup(folder.path, grace_s=grace_s, adopt=True) as fleet, Signals(fleet) as signals:
                try:
                    status = run(topology, plan, fleet, folder)
                    if status == 0:
                        _say(what_next(chosen.topology))
                    return status
                finally:
                    signals.shield()
                    fleet.stop()
    except (TopologyError, PDTransportError) as error:
        print(f"demo: {error}", file=sys.stderr)
    except Interrupted as stop:
        print(f"demo: {stop}", file=sys.stderr)
        return 128 + stop.number
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""KV computed with a LoRA adapter goes by the adapter's content as loaded: never by name, id or path, and never by what
lies on disk at another moment."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from pdtransport.engine.adapted import Adapted, BlockOrigins
from pdtransport.engine.commands import (
    CancelLoad,
    Command,
    LoadChunks,
    Open,
    Pages,
    StartReceive,
    StoreChunks,
    WorkerReport,
    Wrote,
)
from pdtransport.kv.keys import prompt_digest, with_adapter
from pdtransport.settings import Settings
from pdtransport.vllm.adapter_requests import AdapterRequests
from pdtransport.vllm.adapters import Adapters, AdapterUnknown
from pdtransport.vllm.patches.adapter_digest import content_digest, with_digest
from pdtransport.vllm.patches.base import Unexpected
from tests.rig.adapters import OUT, write_adapter

BLOCK = 16


class Manager:
    """What of vLLM's LoRA manager is used, with its own way of reading files."""

    def __init__(self) -> None:
        self._lora_model_cls: Any = LoRAModel
        self.capacity = 2
        self.models: dict[int, Any] = {}
        self._adapter_manager = self

    def list_adapters(self) -> dict[int, Any]:
        return dict(self.models)

    def add_adapter(self, request: LoRARequest) -> bool:
        path = request.lora_path
        model = self._lora_model_cls.from_local_checkpoint(
            path,
            set(OUT),
            peft_helper=PEFTHelper.from_local_dir(path, None),
            lora_model_id=request.lora_int_id,
            device="cpu",
            dtype=torch.float32,
        )
        self.models[request.lora_int_id] = model
        return True


def lora(folder: Path, number: int = 1, name: str = "x") -> LoRARequest:
    return LoRARequest(name, number, str(folder))


@pytest.fixture
def adapters() -> Adapters:
    return Adapters(Manager())


# -- content ---------------------------------------------------------------------------------------------------------


def test_the_same_content_is_the_same_under_any_name_id_and_path(adapters: Adapters, tmp_path: Path) -> None:
    one, other = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", 1)
    assert adapters.load(lora(one)) == adapters.load(lora(other, 2, "y"))


@pytest.mark.parametrize(
    ("seed", "config"),
    [(2, {}), (1, {"lora_alpha": 32}), (1, {"use_rslora": True}), (1, {"alpha_pattern": {"q_proj": 4}})],
)
def test_another_content_is_another(adapters: Adapters, tmp_path: Path, seed: int, config: dict[str, Any]) -> None:
    one, other = write_adapter(tmp_path / "a", 1), write_adapter(tmp_path / "b", seed, **config)
    assert adapters.load(lora(one)) != adapters.load(lora(other, 2))


def test_of_patterns_that_match_the_first_one_counts(adapters: Adapters, tmp_path: Path) -> None:
    """So two adapters with the same patterns in another order compute differently."""
    one = write_adapter(tmp_path / "a", 1, alpha_pattern={".*q_proj": 4, ".*proj": 8})
    other = write_adapter(tmp_path / "b", 1, alpha_pattern={".*proj": 8, ".*q_proj": 4})
    assert adapters.load(lora(one)) != adapters.load(lora(other, 2))


@pytest.mark.parametrize(
    "flags", [{"target_modules": ["q_proj"]}, {"target_modules": []}, {"enable_tower_connector_lora": True}]
)
def test_flags_that_say_where_an_adapter_is_applied_count(tmp_path: Path, flags: dict[str, Any]) -> None:
    """The same files under ``--lora-target-modules`` compute something else."""
    folder, seen = write_adapter(tmp_path / "a", 1), set()
    for said in ({}, flags, {name: list(value) if isinstance(value, list) else value for name, value in flags.items()}):
        manager = Manager()
        manager.lora_config = LoRAConfig(**said)  # type: ignore[attr-defined]
        seen.add(Adapters(manager).load(lora(folder)))
    assert len(seen) == 2


def test_what_the_tensors_do_not_depend_on_is_no_difference(adapters: Adapters, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "a", 1)
    other = write_adapter(tmp_path / "b", 1, base_model_name_or_path="/else", lora_dropout=0.1, lora_alpha=16.0)
    assert adapters.load(lora(one)) == adapters.load(lora(other, 2))


def test_every_byte_of_every_tensor_counts() -> None:
    tensors = {"a": torch.zeros(4, 4), "b": torch.zeros(4, 4)}
    seen = {content_digest(tensors, {})}
    for name in tensors:
        for place in range(16):
            changed = {key: value.clone() for key, value in tensors.items()}
            changed[name].view(-1)[place] = 1e-30
            seen.add(content_digest(changed, {}))
    seen.add(content_digest({"a": tensors["a"], "c": tensors["b"]}, {}))
    seen.add(content_digest({**tensors, "b": tensors["b"].reshape(2, 8)}, {}))
    seen.add(content_digest({**tensors, "b": tensors["b"].to(torch.int32)}, {}))
    seen.add(content_digest(tensors, {}, torch.float16))
    assert len(seen) == 1 + 32 + 4


def test_the_digest_is_of_what_is_held_not_of_what_lies_there(adapters: Adapters, tmp_path: Path) -> None:
    """The file is rewritten in place after the load: digest and tensors in memory stay the old ones. vLLM's own tensors
    would change with the file, whose pages they are."""
    folder = write_adapter(tmp_path / "a", 1)
    before = adapters.load(lora(folder))
    model = adapters._manager.models[1]  # type: ignore[union-attr]
    kept = {name: part.lora_a.clone() for name, part in model.loras.items()}
    write_adapter(folder, 2)
    assert adapters.held(1) == before
    assert all(torch.equal(kept[name], part.lora_a) for name, part in model.loras.items())
    assert adapters.load(lora(folder, 2)) != before


def test_what_was_loaded_elsewhere_is_unknown(tmp_path: Path) -> None:
    manager = Manager()
    manager.add_adapter(lora(write_adapter(tmp_path / "a", 1)))
    with pytest.raises(AdapterUnknown):
        Adapters(manager).held(1)
    with pytest.raises(AdapterUnknown):
        Adapters(None).held(1)


def test_an_adapter_that_cant_be_loaded_says_why(adapters: Adapters, tmp_path: Path) -> None:
    with pytest.raises(AdapterUnknown, match="can't be loaded"):
        adapters.load(lora(tmp_path / "nothing"))


def test_a_class_of_another_vllm_is_not_taken_hold_of() -> None:
    class Other:
        @classmethod
        def from_lora_tensors(cls, tensors: Any) -> None: ...

    with pytest.raises(Unexpected):
        with_digest(Other)


def test_what_was_loaded_is_told_once(adapters: Adapters, tmp_path: Path) -> None:
    digest = adapters.load(lora(write_adapter(tmp_path / "a", 1)))
    assert adapters.take_news() == {1: digest}
    assert adapters.take_news() == {}
    one, other = WorkerReport(adapters={1: "a", 2: "b"}), WorkerReport(adapters={1: "a", 2: "c"})
    assert one.aggregate(other).adapters == {1: "a", 2: ""}


def test_a_key_says_which_half_differs() -> None:
    prompt = prompt_digest([1, 2, 3])
    one, other = with_adapter(prompt, "a"), with_adapter(prompt, "b")
    assert len(one) == 32
    assert one != other
    assert one[:16] == other[:16] == prompt[:16]
    assert with_adapter(prompt_digest([1, 2]), "a")[16:] == one[16:]


# -- a worker's requests ---------------------------------------------------------------------------------------------


class Worker:
    """Commands through :class:`Adapted`, as the worker sends them."""

    def __init__(self, adapters: Adapters) -> None:
        self.refused: list[tuple[Command, str]] = []
        self.now = 0.0
        self.adapted = Adapted(
            adapters,
            lambda command, why: self.refused.append((command, why)),
            BLOCK,
            wait_s=5.0,
            clock=lambda: self.now,
        )

    def __call__(self, command: Command) -> Any:
        return self.adapted.ready(command)

    def computes(self, number: int, blocks: list[int], req_id: str = "r", anew: bool = True) -> None:
        assert self(Wrote(req_id, number, blocks, anew)) is None


@pytest.fixture
def worker(adapters: Adapters) -> Worker:
    return Worker(adapters)


def opened(adapter: LoRARequest, req_id: str = "r") -> Open:
    return Open(req_id, "t", prompt_digest([1]), 40, adapter)


def taken(adapter: LoRARequest, pages: list[int], req_id: str = "r") -> StartReceive:
    return StartReceive(req_id, "t", prompt_digest([1]), 40, (0,), (pages,), "h", 1, 1, adapter=adapter)


def pages(*blocks: int, tokens: int = 40, req_id: str = "r") -> Pages:
    return Pages(req_id, (list(blocks),), tokens)


def test_keys_wait_for_the_adapter_and_are_of_its_content(worker: Worker, adapters: Adapters, tmp_path: Path) -> None:
    """Prefill and decode with the same content under other names and paths have the same key."""
    here = lora(write_adapter(tmp_path / "a", 1))
    there = lora(write_adapter(tmp_path / "b", 1), 7, "y")
    assert worker(opened(here)) is None
    assert worker(taken(there, [5, 6, 7], "d")) is None
    one, other = worker.adapted.load()
    assert isinstance(one, Open)
    assert isinstance(other, StartReceive)
    assert one.prompt_digest == other.prompt_digest == with_adapter(prompt_digest([1]), str(adapters.held(1)))
    assert worker(opened(here, "next")).prompt_digest == one.prompt_digest  # at once
    assert not worker.refused


def test_pages_go_out_if_the_content_of_the_key_wrote_them(worker: Worker, adapters: Adapters, tmp_path: Path) -> None:
    adapter = lora(write_adapter(tmp_path / "a", 1))
    adapters.load(adapter)
    worker(opened(adapter))
    worker.computes(1, [3, 4])
    assert worker.adapted.why_not(pages(3, 4, 5, tokens=32)) == ""
    worker.computes(1, [5])
    assert worker.adapted.why_not(pages(3, 4, 5)) == ""


def test_an_adapter_replaced_between_two_steps_takes_the_pages_back(
    worker: Worker, adapters: Adapters, tmp_path: Path
) -> None:
    folder = write_adapter(tmp_path / "a", 1)
    adapters.load(lora(folder))
    worker(opened(lora(folder)))
    worker.computes(1, [3, 4])
    assert worker.adapted.why_not(pages(3, 4, 5, tokens=32)) == ""
    write_adapter(folder, 2)
    adapters._manager.add_adapter(lora(folder))  # type: ignore[union-attr] # in place
    worker.computes(1, [5])
    assert "LoRA adapter 'x'" in worker.adapted.why_not(pages(3, 4, 5))


def test_blocks_of_an_older_content_in_the_prefix_cache_do_not_go_out(
    worker: Worker, adapters: Adapters, tmp_path: Path
) -> None:
    """vLLM's prefix cache goes by name and path: a request may be given blocks that the old content wrote."""
    folder = write_adapter(tmp_path / "a", 1)
    adapters.load(lora(folder))
    worker.computes(1, [3, 4, 5], "earlier")
    write_adapter(folder, 2)
    adapters._manager.add_adapter(lora(folder))  # type: ignore[union-attr]
    worker(opened(lora(folder)))
    worker.computes(1, [6])
    assert "LoRA adapter 'x'" in worker.adapted.why_not(pages(3, 4, 6))
    worker(opened(lora(folder), "anew"))
    worker.computes(1, [7, 8, 9], "anew")
    assert worker.adapted.why_not(pages(7, 8, 9, req_id="anew")) == ""


def test_a_block_begun_with_one_content_and_filled_with_another_is_of_neither() -> None:
    origins = BlockOrigins()
    origins.wrote([1, 2], "a", anew=True)
    origins.wrote([2, 3], "b", anew=False)
    assert origins.all_of([1], "a")
    assert not origins.all_of([2], "a")
    assert not origins.all_of([2], "b")
    assert origins.all_of([3], "b")
    assert not origins.all_of([4], "b")  # nobody knows who wrote it
    origins.wrote([2], "b", anew=True)
    assert origins.all_of([2, 3], "b")


def test_an_unknown_adapter_ends_both_sides_with_its_name(worker: Worker, tmp_path: Path) -> None:
    worker(opened(lora(tmp_path / "gone")))
    assert worker.adapted.load() == []
    ((_, why),) = worker.refused
    assert "LoRA adapter 'x'" in why


def test_an_adapter_is_not_loaded_in_the_place_of_one_that_computes(worker: Worker, tmp_path: Path) -> None:
    """What is evicted is read again, and may be another by then. Pages are asked for once there is room, for as long as
    a transfer may be awaited; then decode computes, when vLLM has room."""
    folders = [write_adapter(tmp_path / str(number), number) for number in (1, 2, 3)]
    running = [Wrote("a", 1, [1], True), Wrote("b", 2, [2], True)]
    for number in (1, 2):
        worker.adapted._adapters.load(lora(folders[number - 1], number))
    for name in ("late", "lost"):
        worker(taken(lora(folders[2], 3), [5], name))
    assert worker.adapted.load(running) == []
    worker(CancelLoad("late"))
    worker(taken(lora(folders[2], 3), [5], "again"))
    worker.now = 5.0
    worker.refused.clear()
    assert worker.adapted.load(running) == []
    assert [command.req_id for command, _ in worker.refused] == ["lost", "again"]  # type: ignore[union-attr]
    assert "--max-cpu-loras" in worker.refused[0][1]
    worker(taken(lora(folders[2], 3), [5], "next"))
    (command,) = worker.adapted.load(running[:1])
    assert command.req_id == "next"


def test_who_is_aborted_while_it_waits_is_ended(worker: Worker, tmp_path: Path) -> None:
    command = taken(lora(write_adapter(tmp_path / "a", 1)), [1])
    worker(command)
    assert worker(CancelLoad("r")) == CancelLoad("r")
    assert [refused for refused, _ in worker.refused] == [command]
    assert worker.adapted.load() == []


def test_a_replaced_adapter_makes_what_decode_took_invalid(worker: Worker, adapters: Adapters, tmp_path: Path) -> None:
    """Between the transfer and the first step that uses it; vLLM then computes the prompt, or fails the request."""
    folder = write_adapter(tmp_path / "a", 1)
    adapters.load(lora(folder))
    worker(taken(lora(folder), [3, 4]))
    worker.computes(1, [4], anew=False)
    assert worker.adapted.take_invalid() == set()
    worker(taken(lora(folder), [5, 6], "late"))
    write_adapter(folder, 2)
    adapters._manager.add_adapter(lora(folder))  # type: ignore[union-attr]
    worker.computes(1, [6], "late", anew=False)
    assert worker.adapted.take_invalid() == {5, 6}
    assert worker.adapted.take_invalid() == set()


def test_a_transfer_that_failed_is_not_looked_at_again(worker: Worker, adapters: Adapters, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", 1)
    adapters.load(lora(folder))
    worker(taken(lora(folder), [3, 4]))
    worker.adapted.failed("r")
    write_adapter(folder, 2)
    adapters._manager.add_adapter(lora(folder))  # type: ignore[union-attr]
    worker.computes(1, [3, 4])
    assert worker.adapted.take_invalid() == set()


def test_the_pool_is_given_and_asked_for_this_content_alone(worker: Worker, adapters: Adapters, tmp_path: Path) -> None:
    """The scheduler's keys go by what workers loaded last, as far as it knows; workers look."""
    adapter = lora(write_adapter(tmp_path / "a", 1))
    digest = adapters.load(adapter)
    worker.computes(1, [3, 4])
    assert worker(StoreChunks("r", [[b"k"]], [3, 4], digest)).keys == [[b"k"]]
    assert worker(StoreChunks("r", [[b"k"]], [3, 4], "older")).keys == []
    assert worker(StoreChunks("r", [[b"k"]], [3, 9], digest)).keys == []
    good = LoadChunks("f", [[b"k"]], 0, [5], adapter, digest)
    assert worker(good) is good
    assert worker(LoadChunks("g", [[b"k"]], 0, [6], adapter, "older")) is None
    assert [command.req_id for command, _ in worker.refused] == ["g"]  # type: ignore[union-attr]
    assert worker(StoreChunks("s", [[b"k"]], [9])).keys == [[b"k"]]  # without an adapter


def test_requests_without_an_adapter_go_their_way(worker: Worker) -> None:
    for command in (Open("r", "t", b"k" * 32, 40), pages(1, 2), CancelLoad("r")):
        assert worker(command) is command
    assert worker.adapted.why_not(pages(1, 2)) == ""


# -- the scheduler's half --------------------------------------------------------------------------------------------


def request(name: str, number: int, folder: str = "/a") -> Request:
    return Request(
        name,
        list(range(40)),
        SamplingParams(max_tokens=1),
        None,
        lora_request=LoRARequest("n-" + folder, number, folder),
    )


def hashes(wanted: Request) -> list[Any]:
    from vllm.v1.core import kv_cache_utils

    return list(kv_cache_utils._gen_lora_extra_hash_keys(wanted))


def test_each_content_has_a_part_of_the_prefix_cache_for_itself() -> None:
    side = AdapterRequests(BLOCK, Settings())
    first = request("a", 1, "/separate")
    side.arrive(first)
    plain = hashes(first)
    assert plain == [("lora", "n-/separate", "/separate")]  # as vLLM's
    side.hear({1: "one"})
    assert hashes(request("b", 1, "/separate")) == plain
    side.hear({1: "two"})  # loaded anew, in place
    again = hashes(request("c", 1, "/separate"))
    assert again != plain
    late = request("d", 2, "/separate")
    side.arrive(late)  # unloaded and loaded: another id
    assert hashes(late) not in (plain, again)
    assert hashes(request("e", 3, "/other")) == [("lora", "n-/other", "/other")]


def test_replacing_an_adapter_in_place_begins_a_part_before_anybody_computes() -> None:
    from vllm.v1.engine.core import EngineCore

    plain = inspect.signature(EngineCore.add_lora)
    AdapterRequests(BLOCK, Settings())
    assert inspect.signature(EngineCore.add_lora) == plain  # by which vLLM reads what comes over its socket
    before = hashes(request("a", 1, "/inplace"))
    core: Any = SimpleNamespace(model_executor=SimpleNamespace(add_lora=lambda _: True))
    assert EngineCore.add_lora(core, LoRARequest("n-/inplace", 1, "/inplace"))
    assert hashes(request("a", 1, "/inplace")) == before
    assert EngineCore.add_lora(core, LoRARequest("n-/inplace", 1, "/inplace", load_inplace=True))
    assert hashes(request("a", 1, "/inplace")) != before


def test_the_scheduler_knows_a_content_when_workers_told_and_agree() -> None:
    side = AdapterRequests(BLOCK, Settings())
    side.hear({1: "one", 2: ""})
    assert side.content(request("a", 1)) == "one"
    assert side.content(request("b", 2)) is None
    assert side.content(request("c", 3)) is None
    assert side.content(Request("d", [1], SamplingParams(max_tokens=1), None)) == ""


def test_workers_hear_of_every_block_that_a_step_writes() -> None:
    side = AdapterRequests(BLOCK, Settings())
    side.arrive(request("a", 1))
    output: Any = SimpleNamespace(
        kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: ([5, 6, 7, 8],)),
        num_scheduled_tokens={"a": 20, "plain": 20},
    )
    assert side.wrote(output, {"a": 0, "plain": 0}) == [Wrote("a", 1, [5, 6], True)]
    assert side.wrote(output, {"a": 20}) == [Wrote("a", 1, [6, 7], False)]
    output.num_scheduled_tokens["a"] = 1
    assert side.wrote(output, {"a": 48}) == [Wrote("a", 1, [8], True)]
    assert not side.finished("a")
    assert side.wrote(output, {"a": 48}) == []
    side.arrive(request("b", 1))
    assert side.finished("b")  # no step used what workers may have taken for it

"""What is asked next: pairs of servers, names and salts, so that every way to differ, and none, comes up alike."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tests.identity.makers import CONFIGS, OTHER_CONFIGS, SAME_CONFIGS, WEIGHTS, Model
from tests.identity.world import Instance

SEVERAL = ("several",)
SHARED = "0/tiny"  # a folder that several servers are started with
T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """Who is asked, and under which adapter's name each ("": the base model); with one tenant's salt, or with two.

    Args:
        differs: parts of what KV depends on that differ; none in an equal pair.
        labels: kinds of labels that differ, whatever lies behind them.
    """

    prefill: Instance
    decode: Instance
    adapters: tuple[str, str]
    one_salt: bool
    differs: tuple[str, ...]
    labels: tuple[str, ...]


def pairs(instances: Sequence[Instance]) -> list[Pair]:
    """All that could be asked now."""
    found = []
    for prefill in instances:
        for decode in instances:
            if prefill is decode:
                continue
            for adapters in [(p, d) for p in ["", *prefill.adapters] for d in ["", *decode.adapters]]:
                differs = prefill.content(adapters[0]).differs(decode.content(adapters[1]))
                labels = _labels(prefill, decode, adapters)
                found.append(Pair(prefill, decode, adapters, True, differs, labels))
                found.append(Pair(prefill, decode, adapters, False, (*differs, "salt"), labels))
    return found


def _labels(prefill: Instance, decode: Instance, adapters: tuple[str, str]) -> tuple[str, ...]:
    one, other = prefill.model, decode.model
    folders = [
        instance.adapters[name].folder if name else ""
        for instance, name in zip((prefill, decode), adapters, strict=True)
    ]
    facts = {
        "path": one.folder != other.folder,
        "folder's name": one.folder.rpartition("/")[2] != other.folder.rpartition("/")[2],
        "files": one.sharded != other.sharded,
        "config's text": (one.config, one.overrides_of) != (other.config, other.overrides_of),
        "adapter's name": adapters[0] != adapters[1],
        "adapter's path": folders[0] != folders[1],
    }
    return tuple(name for name, differ in facts.items() if differ)


def draw(rng: random.Random, instances: Sequence[Instance]) -> Pair:
    """An equal pair as often as a different one. Which labels differ, and in what a different pair differs, is drawn
    first, so that rare ways are not rare."""
    possible = pairs(instances)
    equal = [pair for pair in possible if not pair.differs]
    different = [pair for pair in possible if pair.differs]
    if equal and rng.random() < 0.5:
        return _of_a_group(rng, {pair.labels: [p for p in equal if p.labels == pair.labels] for pair in equal})
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for pair in different:
        groups.setdefault(pair.differs if len(pair.differs) == 1 else SEVERAL, []).append(pair)
    if "adapter" in {kind[0] for kind in groups}:  # the same name of the same path is what deceives
        alike = [pair for pair in groups["adapter",] if pair.adapters[0] == pair.adapters[1]]
        alike = [pair for pair in alike if "adapter's path" not in pair.labels]
        if alike:
            groups["adapter", "of one path"] = alike
    return _of_a_group(rng, groups)


def _of_a_group(rng: random.Random, groups: dict[tuple[str, ...], list[T]]) -> T:
    return rng.choice(groups[rng.choice(sorted(groups))])


def models(rng: random.Random, count: int) -> list[Model]:
    """What the servers of a round are started with. The first two are equal under other labels; the third has the
    first one's path and other contents there, so it starts later; each further one equals the first or the third,
    under the same labels or under others. Folders are the same in every round, and what is in them is not."""
    first = Model(rng.choice(list(WEIGHTS)), rng.choice(list(CONFIGS)), rng.random() < 0.5, SHARED)
    made = [first, _relabelled(rng, first, 1), replace(_changed(rng, first), late=True)]
    for number in range(3, count):
        like = rng.choice((made[0], made[2]))
        made.append(_relabelled(rng, like, number) if rng.random() < 0.5 else like)
    return made[:count]


def _changed(rng: random.Random, model: Model) -> Model:
    if rng.random() < 0.5:
        return replace(model, weights=rng.choice([name for name in WEIGHTS if name != model.weights]))
    kinds = [name for name in OTHER_CONFIGS if name not in (model.config, model.overrides_of)]
    return replace(model, config=rng.choice(kinds), overrides_of="")


def _relabelled(rng: random.Random, model: Model, number: int) -> Model:
    """The same contents: in other files, under another name, in another spelling, or all of these."""
    config, overrides = model.config, model.overrides_of
    if overrides:
        config, overrides = overrides, ""  # in the file, this time
    elif config in SAME_CONFIGS:
        config = rng.choice(SAME_CONFIGS)
    elif rng.random() < 0.5:
        config, overrides = "base", config
    folder = f"{number}/{rng.choice(('tiny', 'renamed'))}"
    return Model(model.weights, config, rng.random() < 0.5, folder, overrides, model.late)


assert set(SAME_CONFIGS) | set(OTHER_CONFIGS) == set(CONFIGS)

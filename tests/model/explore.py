"""All states that a case can reach, breadth first, so that a short way to a broken promise is found.

A state is one snapshot of each process, the letters that were ever sent, and the faults that are left. Any letter may
be delivered now, again later, or never: that is loss, duplication and reordering without bound. So a state with more
letters, or more faults left, can do all that the same processes with fewer can, and only the larger one is explored.

What a process does with an event is worked out once for each of its snapshots, by the code that runs in production, and
remembered: processes meet in far more ways than they differ.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.model.case import Broken, Case, Letter, name_of
from tests.model.consumer import Consumer
from tests.model.frozen import freeze, thaw
from tests.model.producer import JUNK, Producer

Process = Any  # Consumer | Producer
Label = tuple[Any, ...]
Step = tuple[int, int]  # the next snapshot, the letters sent as bits
MAX_DRAIN = 200


class Faults(NamedTuple):
    """How many are left."""

    producer_restarts: int
    consumer_restarts: int
    losses: int
    damages: int

    def less(self, name: str) -> Faults:
        return self._replace(**{name: getattr(self, name) - 1})


class State(NamedTuple):
    processes: tuple[int, ...]  # numbers of snapshots, the consumer's first
    letters: int  # as bits
    faults: Faults


@dataclass
class View:
    """What others need to know of a snapshot."""

    me: str
    up: frozenset[str]
    events: list[Label]
    placing: list[Any] = field(default_factory=list)
    blocks: dict[str, list[list[Any]]] = field(default_factory=dict)


@dataclass
class Found:
    """What an exploration came to. ``states`` were explored; ``covered`` ones can do nothing that another can't."""

    case: Case
    states: int = 0
    covered: int = 0
    transitions: int = 0
    depth: int = 0
    snapshots: int = 0
    seconds: float = 0.0
    complete: bool = False
    broken: str = ""
    trace: list[str] = field(default_factory=list)


class Explorer:
    def __init__(self, case: Case) -> None:
        self.case = case
        self.names = (Consumer.name, *case.producers)
        self._frozen: list[Any] = []
        self._numbers: dict[Any, int] = {}
        self._views: list[View] = []
        self._letters: list[Letter] = []
        self._letter_numbers: dict[Letter, int] = {}
        self._mail = [0] * len(self.names)  # letters to each process
        self._steps: dict[tuple[int, Label], Step] = {}
        self._moves: dict[tuple[int, int], list[tuple[Label, Step]]] = {}
        self._label: Label = ()

    # -- processes -------------------------------------------------------------------------------------------------

    def _number(self, process: Process) -> int:
        frozen = freeze(process)
        number = self._numbers.get(frozen)
        if number is None:
            number = self._numbers[frozen] = len(self._frozen)
            self._frozen.append(frozen)
            view = View(process.me, frozenset(process.up), list(process.events()))
            if isinstance(process, Consumer):
                view.placing = list(process.placing)
            else:
                view.blocks = process.blocks
            self._views.append(view)
            self._check_rest(thaw(frozen))
        return number

    def _check_rest(self, process: Process) -> None:
        """If nothing is heard from now on, deadlines end everything and free all of it: nothing is held for ever."""
        for _ in range(MAX_DRAIN):
            if not process.drain():
                break
        held = process.held()
        if held:
            raise Broken(f"{process.me} holds for ever, if nothing is heard any more: {held}")

    def step(self, number: int, event: Label) -> Step:
        key = (number, event)
        step = self._steps.get(key)
        if step is None:
            process = thaw(self._frozen[number])
            process.do(event if event[0] != "deliver" else ("deliver", self._letters[event[1]]))
            sent = 0
            for letter in process.out:
                sent |= 1 << self._letter(letter)
            process.out = []
            step = self._steps[key] = (self._number(process), sent)
        return step

    def _letter(self, letter: Letter) -> int:
        number = self._letter_numbers.get(letter)
        if number is None:
            number = self._letter_numbers[letter] = len(self._letters)
            self._letters.append(letter)
            self._mail[self.names.index(letter.at)] |= 1 << number
        return number

    def moves(self, at: int, number: int, mail: int) -> list[tuple[Label, Step]]:
        """What a process may do by itself, or with a letter that it has; not what would change nothing."""
        key = (number, mail)
        moves = self._moves.get(key)
        if moves is None:
            view = self._views[number]
            events = list(view.events)
            events += [("deliver", each) for each in _bits(mail) if self.heard(self._letters[each], view)]
            moves = []
            for event in events:
                self._label = (self.names[at], *event)
                step = self.step(number, event)
                if step != (number, 0):
                    moves.append((event, step))
            self._moves[key] = moves
        return moves

    def heard(self, letter: Letter, view: View) -> bool:
        """The channel passes on words of those that are up. None queue for a process until it is another one."""
        return letter.sender in view.up and letter.to == view.me

    # -- the whole -------------------------------------------------------------------------------------------------

    def first(self) -> State:
        case = self.case
        processes: list[Process] = [Consumer(case), *(Producer(case, name) for name in case.producers)]
        for producer in processes[1:]:
            producer.up.add(processes[0].me)
            processes[0].up.add(producer.me)
        faults = Faults(case.producer_restarts, case.consumer_restarts, case.losses, case.damages)
        return State(tuple(self._number(process) for process in processes), 0, faults)

    def nexts(self, state: State) -> Iterator[tuple[Label, State]]:
        """What may happen next, and what comes of it."""
        processes, letters, faults = state
        for at, number in enumerate(processes):
            before, after = processes[:at], processes[at + 1 :]
            for event, (then, sent) in self.moves(at, number, letters & self._mail[at]):
                yield (self.names[at], *event), State((*before, then, *after), letters | sent, faults)
        for label, take in (*self._bytes(state), *self._channel(state)):
            self._label = label
            yield label, take()

    def after(self, state: State, at: int, event: Label) -> State:
        """``state`` once the process ``at`` met ``event``."""
        then, sent = self.step(state.processes[at], event)
        processes = (*state.processes[:at], then, *state.processes[at + 1 :])
        return State(processes, state.letters | sent, state.faults)

    def _bytes(self, state: State) -> Iterator[tuple[Label, Callable[[], State]]]:
        """Copies that the consumer makes."""
        consumer = self._views[state.processes[0]]
        for index, ((transfer, peer, _, seq, attempt), batch) in enumerate(consumer.placing):
            source = self._views[state.processes[self.names.index(name_of(peer))]]
            what = (transfer, peer, f"seq={seq} attempt={attempt}")
            if source.me != peer:
                yield ("c", "copy fails", *what), lambda index=index: self.after(state, 0, ("copy_failed", index))  # type: ignore[misc]
                continue
            junk = (JUNK,) * batch.blocks
            held = source.blocks[transfer][batch.group] if transfer in source.blocks else ()
            there = tuple(held[batch.first_block : batch.first_block + batch.blocks])
            tags = there if len(there) == batch.blocks else junk
            yield ("c", "copies", *what), lambda event=("copy", index, tags): self.after(state, 0, event)  # type: ignore[misc]
            if state.faults.damages:
                hurt = state._replace(faults=state.faults.less("damages"))
                yield ("c", "copies damaged", *what), lambda event=("copy", index, junk): self.after(hurt, 0, event)  # type: ignore[misc]  # noqa: B023

    # -- who hears whom --------------------------------------------------------------------------------------------

    def _channel(self, state: State) -> Iterator[tuple[Label, Callable[[], State]]]:
        consumer = self._views[state.processes[0]]
        for at in range(1, len(self.names)):
            producer = self._views[state.processes[at]]
            for who, here, there in ((0, consumer, producer), (at, producer, consumer)):
                for peer in sorted(each for each in here.up if name_of(each) == name_of(there.me)):
                    lose = (state, who, peer, peer != there.me)
                    if peer != there.me:
                        yield (here.me, "notices the end of", peer), lambda lose=lose: self._lose(*lose)  # type: ignore[misc]
                    elif state.faults.losses:
                        yield (here.me, "gives up", peer), lambda lose=lose: self._lose(*lose)  # type: ignore[misc]
            if producer.me not in consumer.up or consumer.me not in producer.up:
                yield (consumer.me, "meets", producer.me), lambda at=at: self._meet(state, at)  # type: ignore[misc]
            if state.faults.producer_restarts:
                yield (producer.me, "dies and restarts"), lambda at=at: self._restart(state, at)  # type: ignore[misc]
        if state.faults.consumer_restarts:
            yield (consumer.me, "dies and restarts"), lambda: self._restart(state, 0)

    def _lose(self, state: State, who: int, peer: str, dead: bool) -> State:
        then = self.after(state, who, ("lose", peer))
        if dead:  # it never comes back
            return self._without_letters(then, {peer}, who)
        return then._replace(faults=then.faults.less("losses"))

    def _meet(self, state: State, at: int) -> State:
        """Both shake hands, whether or not the end of an older process of that name was noticed. A loss that only one
        of them noticed stays so: the other one goes on with what it has."""
        consumer, producer = (self._views[state.processes[each]] for each in (0, at))
        return self.after(self.after(state, 0, ("meet", producer.me)), at, ("meet", consumer.me))

    def _without_letters(self, state: State, senders: set[str], at: int) -> State:
        """What these sent to this process is lost."""
        gone = sum(1 << each for each in _bits(state.letters & self._mail[at]) if self._letters[each].sender in senders)
        return state._replace(letters=state.letters & ~gone)

    def _restart(self, state: State, at: int) -> State:
        old = thaw(self._frozen[state.processes[at]])
        if at:
            new: Process = Producer(self.case, old.name, old.incarnation + 1)
        else:
            new = Consumer(self.case, old.incarnation + 1, old)
        processes = (*state.processes[:at], self._number(new), *state.processes[at + 1 :])
        kind = "producer_restarts" if at else "consumer_restarts"
        kept = self._kept_over_restart(state, at)
        return State(processes, kept, state.faults.less(kind))

    def _kept_over_restart(self, state: State, at: int) -> int:
        return state.letters & ~self._mail[at]

    # -- exploring -------------------------------------------------------------------------------------------------

    def explore(self, seconds: float = float("inf")) -> Found:
        found, began = Found(self.case), time.monotonic()
        parents: dict[State, State | None] = {}
        largest: dict[tuple[int, ...], list[State]] = {}
        state: State | None = None
        try:
            first = self.first()
            parents[first] = None
            row, following = deque([first]), deque[State]()
            largest[first.processes] = [first]
            while row:
                while row:
                    state = row.popleft()
                    if state not in largest[state.processes]:
                        found.covered += 1
                        continue
                    found.states += 1
                    for _, then in self.nexts(state):
                        found.transitions += 1
                        if then not in parents and _is_new(then, largest.setdefault(then.processes, [])):
                            parents[then] = state
                            following.append(then)
                    if time.monotonic() - began > seconds:
                        raise TimeoutError
                row, following = following, row
                found.depth += bool(row)
            found.complete = True
        except TimeoutError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever the protocol raises is a finding
            last = self._label
            found.broken = f"{type(error).__name__}: {error}"
            found.trace = [*self._way(parents, state), self.said(last)]
        found.snapshots, found.seconds = len(self._frozen), time.monotonic() - began
        return found

    def _way(self, parents: dict[State, State | None], state: State | None) -> list[str]:
        way: list[str] = []
        while state is not None and (before := parents[state]) is not None:
            way.append(next(self.said(label) for label, then in self.nexts(before) if then == state))
            state = before
        return way[::-1]

    def said(self, label: Label) -> str:
        if len(label) == 3 and label[1] == "deliver":
            return f"{label[0]} gets {self._letters[label[2]]}"
        return " ".join(str(each) for each in label)


def _is_new(state: State, known: list[State]) -> bool:
    """No state of the same processes covers this one; those that it covers are dropped."""
    letters, faults = state.letters, state.faults
    for other in known:
        if letters | other.letters == other.letters and all(a <= b for a, b in zip(faults, other.faults, strict=True)):
            return False
    known[:] = [
        other
        for other in known
        if letters | other.letters != letters or any(b > a for a, b in zip(faults, other.faults, strict=True))
    ]
    known.append(state)
    return True


def _bits(number: int) -> Iterator[int]:
    at = 0
    while number:
        if number & 1:
            yield at
        number >>= 1
        at += 1

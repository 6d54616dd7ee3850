"""One call of the denoiser between two steps: runs its own units, replays the others, posts and waits.

A pipeline that calls twice per step (conditional, unconditional) has two passes, each with slots and values of its own.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .buffers import DEPTH, Buffer
from .cutset import NEXT_PREDICTION, PREDICTION
from .prediction import Trend, extrapolate
from .schedule import Mode
from .self_check import Report, SelfCheck
from .slots import Recv, Send

_TENSOR = object()


def _structure(tree):
    """(leaves, spec) of a tree, with a mark in place of each tensor."""
    leaves, spec = tree_flatten(tree)
    return [_TENSOR if isinstance(x, torch.Tensor) else x for x in leaves], spec


class Pass:
    """State of one pass on one rank, for one plan."""

    def __init__(self, plan, config, rank, device, placeholders):
        self.plan, self.config, self.rank = plan, config, rank
        self.program = plan.program(rank)
        self.last_step = -1
        self.previous_timestep = self.timesteps = None
        # A received value is predicted where the one before the last lies, so that takes a place of its own.
        self._predicts = config.predict != "none"
        self._received_depth = DEPTH + self._predicts
        self.trend, self.report = Trend(plan.division.hops[1], config.stride), Report()
        self._was_exact = False
        self.intact = True
        self._device, self._placeholders = device, placeholders
        self._index = {unit.key: i for i, unit in enumerate(plan.graph.units)}
        self._names = {unit.name for unit in plan.graph.units}
        # What a later unit changes in place may be known by other names too, so its result is put where it lies.
        self._rewritten = {plan.graph.values[v].ref.storage for unit in plan.graph.units for v in unit.writes}
        self._structures, self._ordinals, self._seen = {}, {}, 0
        self._result_structure = self._next = None
        self._mode, self._keep = Mode.EXACT, False

    def bind(self, exchange, phase):
        """Allocate this rank's buffers and register its slots under a phase of the exchange. Collective."""
        self.exchange, self.phase, self.epoch = exchange, phase, 0
        self._buffers, self._slots, self._order = {}, {}, []
        self._numbers = {t.name: n for n, t in enumerate(self.plan.transfers) if t.unit < 0}
        for number, transfer in enumerate(self.plan.transfers):
            sends = recvs = ()
            if transfer.source == self.rank:
                sends = [Send(t, self._buffer(number, v).flat) for t, values in transfer.targets for v in values]
            else:
                recvs = [
                    Recv(transfer.source, self._buffer(number, v).flat)
                    for target, values in transfer.targets
                    for v in values
                    if target == self.rank
                ]
            if sends or recvs:
                depth = len((*sends, *recvs)[0].buffers)
                self._slots[number] = exchange.slot(transfer.name, sends, recvs, depth)
                self._order.append(number)
        exchange.freeze(phase, self._order)
        checked = [key for number in self.program.receives.values() for key in self._predicted(number)]
        self._rows = {key: row for row, key in enumerate(checked)}
        self.check = SelfCheck([self._label(*key) for key in checked], self._device) if self._predicts else None

    def _predicted(self, number):
        """[(number, value)] of a transfer's values that are predicted here."""
        if not self._predicts:
            return []
        return [key for key, buffer in self._buffers.items() if key[0] == number and buffer.predictable]

    def _label(self, number, value):
        transfer = self.plan.transfers[number]
        place = transfer.values.index(value)
        return transfer.name if place == 0 else f"{transfer.name}.{place}"

    def _buffer(self, number, value):
        """The buffer of one value in one transfer; made when first asked for."""
        if (number, value) not in self._buffers:
            transfer = self.plan.transfers[number]
            stale = transfer.unit >= 0 and transfer.source != self.rank
            ref = self.plan.graph.values[value].ref if transfer.unit >= 0 else self.plan.outputs[value]
            self._buffers[number, value] = Buffer(ref, self._device, self._received_depth if stale else DEPTH)
        return self._buffers[number, value]

    def begin_generation(self, instants):
        """Nothing that an earlier generation left is predicted from or compared with."""
        self.trend.begin(instants)
        if self.check is not None:
            self.check.restart()

    # One forward, in order: begin, run_unit for each unit, end.

    def begin(self, mode, keep):
        """Start a forward; with `keep`, an exact one leaves behind what a stale step will read."""
        self._mode, self._keep, self._ready = mode, keep, set()
        if mode is Mode.EXACT and not self._was_exact and self.check is not None:
            self.check.restart()
        # An asynchronous call sees what the call before made: of an exact one, that was seen already.
        self._notes = keep and self.check is not None and not (mode is Mode.COMPUTE and self._was_exact)
        self._was_exact = mode is Mode.EXACT
        self._ordinals, self._seen, self._cursor = {}, 0, 0
        if mode is Mode.COMPUTE:
            self._post_receives()
        elif keep:
            self.exchange.drain({self.phase})

    def run_unit(self, name, forward, args, kwargs):
        """What a unit's hook returns: its result, or a replay of it."""
        if name not in self._names:
            # A unit of another plan: here it is part of a larger one, or holds smaller ones.
            return forward(*args, **kwargs)
        ordinal = self._ordinals.get(name, 0)
        self._ordinals[name] = ordinal + 1
        index = self._index.get((name, ordinal))
        if index is None:
            self._lost(f"{name} was called once more than in the traced forward")
            return forward(*args, **kwargs)
        if index != self._seen:
            self._lost(f"{name} was called in another order than in the traced forward")
        self._seen += 1
        if self._mode is Mode.EXACT:
            result = forward(*args, **kwargs)
            self._learn(index, result, args, kwargs)
            return result
        if index in self.program.computes:
            result = forward(*args, **kwargs)
            if index in self.program.sends:
                self._send(self.program.sends[index], self._tensors(index, result, args, kwargs))
        else:
            result = self._replay(index, args, kwargs)
        for number in self.program.waits.get(index + 1, ()):
            self._wait_stale(number)
        return result

    def end(self, result):
        """The denoiser's result on every rank: this rank's own, or the one received."""
        if self._seen != len(self._index):
            self._lost(f"{len(self._index) - self._seen} units of the traced forward were not called")
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if self._notes:
            self.check.judge(self.trend.weight if self._mode is Mode.EXACT else self.trend.weight_before)
        if self._mode is Mode.EXACT:
            self._result_structure = _structure(result)
            if self._keep and self.config.stride == 2:
                self._next = [x.clone() for x in tensors]
            return result
        self._next, results = None, tensors
        if self.config.checks:
            tensors = [*results, self.check.worst]
        if self.config.stride == 2 and self.rank == self.config.num_stages - 1:
            self._send(self._numbers[NEXT_PREDICTION], tensors)
            self._next = results
        if self.rank == self.config.stage_ranks - 1:
            self._send(self._numbers[PREDICTION], tensors)
        self._post_receives()
        self.epoch += 1
        if self.rank != self.config.stage_ranks - 1:
            result = self._received(PREDICTION)
        elif self.config.checks:
            self.report.give(self.check.worst)
        return result

    def repeat(self):
        """The prediction that was computed for this step at the step before."""
        if self._next is None:
            return self._received(NEXT_PREDICTION)
        return self._result([x.clone() for x in self._next])

    def _lost(self, what):
        self.intact = False
        if self._mode is not Mode.EXACT:
            raise RuntimeError(
                f"the denoiser took another way than in warm-up: {what}; asynchronous steps need the same modules at "
                "every step. Raise warmup_steps past the step where it changes, or unpatch() first"
            )

    def _tensors(self, index, result, args, kwargs):
        """{value: tensor} of everything a unit made."""
        unit, values = self.plan.graph.units[index], self.plan.graph.values
        found = {}
        for leaf, x in zip(unit.leaves, tree_leaves(result), strict=True):
            if leaf is not None and leaf[0] == "value":
                found[leaf[1]] = x
        if unit.writes:
            arguments = tree_leaves((args, kwargs))
            found.update((v, arguments[values[v].argument]) for v in unit.writes)
        return found

    def _learn(self, index, result, args, kwargs):
        """After an exact unit: its structure, and the values that a stale step here will read."""
        found = _structure(result)
        if self._structures.setdefault(index, found) != found:
            self._lost(f"{self.plan.graph.units[index].name} returned another structure or other numbers than before")
        number = self.program.receives.get(index)
        if self._keep and number is not None:
            for v, x in self._tensors(index, result, args, kwargs).items():
                if (number, v) in self._buffers:
                    buffer = self._buffers[number, v]
                    if self._predicts:
                        buffer.view(self.epoch - 2).copy_(buffer.view(self.epoch - 1))
                    buffer.view(self.epoch - 1).copy_(x)
                    self._note((number, v), buffer)

    def _note(self, key, buffer):
        """Let the check see the latest value of a buffer."""
        if self._notes and key in self._rows:
            self.check.note(self._rows[key], buffer.flat[(self.epoch - 1) % len(buffer.flat)])

    def _replay(self, index, args, kwargs):
        """A unit's result from the step before where this rank reads it, placeholders elsewhere."""
        unit, values = self.plan.graph.units[index], self.plan.graph.values
        number = self.program.receives.get(index)
        stale = {v: b.view(self._stale_epoch(b)) for (n, v), b in self._buffers.items() if n == number}
        arguments = (
            tree_leaves((args, kwargs)) if unit.writes or any(x and x[0] == "argument" for x in unit.leaves) else ()
        )
        if unit.writes and stale:
            self._wait_stale(number)
        for v in unit.writes:
            target = arguments[values[v].argument]
            if v not in stale:
                stale[v] = target
            elif not self._placeholders.holds(target):
                stale[v] = target.copy_(stale[v])
        statics, spec = self._structures[index]
        leaves = []
        for leaf, static in zip(unit.leaves, statics, strict=True):
            kind, place = leaf or ("static", 0)
            if kind == "value":
                leaves.append(stale[place] if place in stale else self._placeholder(values[place].ref))
            else:
                leaves.append(arguments[place] if kind == "argument" else static)
        return tree_unflatten(leaves, spec)

    def _placeholder(self, ref):
        return self._placeholders.get(ref, alone=ref.storage in self._rewritten)

    # Exchange: slots are posted in the plan's order; receives as early as that order allows.

    def _post_receives(self):
        while self._cursor < len(self._order):
            slot = self._slots[self._order[self._cursor]]
            if slot.sends:
                return
            self.exchange.post(slot)
            self._cursor += 1

    def _send(self, number, tensors):
        slot, transfer = self._slots[number], self.plan.transfers[number]
        self.exchange.acquire(slot)
        for v in transfer.values:
            self._buffers[number, v].view(self.epoch).copy_(tensors[v])
        self.exchange.post(slot)
        self._cursor += 1
        self._post_receives()

    def _wait_stale(self, number):
        """Wait for the epoch before this call's; it is the latest, or one back if this call's was posted already.

        Predictions are then made where the values of the epoch before that lie, which nothing reads any more.
        """
        slot = self._slots[number]
        self.exchange.wait(slot, slot.epoch - self.epoch)
        if not self._predicts or number in self._ready:
            return
        self._ready.add(number)
        for key in self._predicted(number):
            buffer = self._buffers[key]
            self._note(key, buffer)
            last, before = (buffer.flat[(self.epoch - back) % len(buffer.flat)] for back in (1, 2))
            extrapolate(before, last, self.trend.weight)

    def _stale_epoch(self, buffer):
        """Where a replayed value is read: the last received, or its prediction."""
        return self.epoch - 1 - (self._predicts and buffer.predictable)

    def _received(self, name):
        number = self._numbers[name]
        self.exchange.wait(self._slots[number])
        views = [self._buffers[number, i].view(self.epoch - 1) for i in range(len(self.plan.outputs))]
        if self.config.checks:
            worst = views.pop()
            if name == PREDICTION:
                self.report.give(worst)
        # Copies: a scheduler may keep a prediction for longer than the buffer keeps it.
        return self._result([view.clone() for view in views])

    def _result(self, tensors):
        leaves, spec = self._result_structure
        tensors = iter(tensors)
        return tree_unflatten([next(tensors) if x is _TENSOR else x for x in leaves], spec)

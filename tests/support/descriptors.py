"""Finds products of tiles whose operands in shared memory are described by something else than a descriptor (sm_90).

A descriptor is 64 bits in two uniform registers, the upper of which names swizzle and stride. ptxas (seen in 12.8) can
forget to copy what a descriptor is made of, and then the product reads from anywhere: whatever the program was, its
SASS shows an upper half that no descriptor has. Upper halves are followed forwards through all branches, as constants,
as that of a descriptor (HIGH), or as some other number.
"""

import re

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
REGISTER = re.compile(r"-?UR(\d+)$")
DESCRIPTOR = re.compile(r"gdesc\[UR(\d+)\]")
# Of rows of 128, 64 and 32 bytes, swizzled: mode and stride of eight rows.
HIGH, HIGHS = "descriptor", {0x40000040, 0x80000020, 0xC0000010}
OTHER, UNKNOWN = "other", "unknown"
MASK = 0xFFFFFFFF


def _constant(text):
    """The 32 bits of an immediate operand, or None."""
    try:
        return int(text, 16) & MASK
    except ValueError:
        return 0 if text == "URZ" else None


class _Halves:
    """What each uniform register holds while a block of instructions is followed."""

    def __init__(self, known):
        self.known = dict(known)

    def __getitem__(self, operand):
        register = REGISTER.match(operand)
        if register:
            return self.known.get(int(register[1]), UNKNOWN)
        constant = _constant(operand)
        return OTHER if constant is None else constant

    def upper(self, operand):
        """The upper half of a 64-bit operand; that of an immediate is its sign."""
        register = REGISTER.match(operand)
        if register:
            value = self.known.get(int(register[1]) + 1, UNKNOWN)
            # Two's complement, less the carry from below.
            return ~value & MASK if operand.startswith("-") and isinstance(value, int) else value
        return MASK if operand.startswith("-") else 0

    def follow(self, address, opcode, operands):
        """Account for what one instruction writes."""
        register = REGISTER.match(operands[0]) if operands else None
        if not register:
            return
        number, sources = int(register[1]), [x for x in operands[1:] if not re.match(r"!?UP", x)]
        other = (OTHER, address)
        if opcode == "UMOV":
            self.known[number] = _named(self[sources[0]])
        elif opcode == "UIADD3.64":
            self.known |= {number: other, number + 1: _sum([self.upper(x) for x in sources], other)}
        elif opcode.startswith("UIADD3.X"):
            self.known[number] = _sum([self[x] for x in sources], other)
        elif opcode.startswith("ULOP3") and "0x3c" in sources:
            self.known[number] = _xor(self[sources[0]], self[sources[1]], other)
        elif opcode.startswith("R2UR"):
            self.known[number] = UNKNOWN
        else:
            self.known[number] = other
            if ".64" in opcode or "WIDE" in opcode:
                self.known[number + 1] = (OTHER, address, "upper")


def _named(value):
    return HIGH if value in HIGHS else value


def _sum(values, other):
    if UNKNOWN in values:
        return UNKNOWN
    if all(isinstance(value, int) for value in values):
        total = sum(values) & MASK
        return HIGH if {total, total + 1 & MASK} & HIGHS else total
    values = [_named(value) for value in values]
    return HIGH if values.count(HIGH) == 1 and all(value in (0, HIGH) for value in values) else other


def _xor(left, right, other):
    """Three of these in a row exchange two registers."""
    if UNKNOWN in (left, right):
        return UNKNOWN
    terms = _terms(left) ^ _terms(right)
    return next(iter(terms)) if len(terms) == 1 else ("xor", terms) if terms else other


def _terms(value):
    return value[1] if isinstance(value, tuple) and value[0] == "xor" else frozenset([value])


def _met(one, two):
    """What holds where two paths meet."""
    if one == two:
        return one
    return UNKNOWN if UNKNOWN in (one, two) else OTHER


def _blocks(code):
    """{index of a block's first instruction: (index after its last, indices of blocks that may follow)}."""
    place = {address: i for i, (address, *_) in enumerate(code)}
    targets = {i: place.get(_constant(operands[-1])) for i, (*_, op, operands) in enumerate(code) if op == "BRA"}
    ends = {i for i, (*_, op, _) in enumerate(code) if op in ("BRA", "EXIT", "RET")}
    starts = sorted({0, *(i + 1 for i in ends), *(t for t in targets.values() if t is not None)} - {len(code)})
    found = {}
    for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
        last = end - 1
        follows = [targets[last]] if targets.get(last) is not None else []
        if (last not in ends or code[last][1]) and end < len(code):
            follows.append(end)
        found[start] = end, follows
    return found


def misread(sass):
    """[address] of products in a disassembly (`cuobjdump -sass`) that read by no descriptor."""
    code = [
        (int(address, 16), guard, opcode, [x.strip().removesuffix(".reuse") for x in operands.split(",")])
        for address, guard, opcode, operands in INSTRUCTION.findall(sass)
    ]
    blocks, entered, waiting = _blocks(code), {0: dict.fromkeys(range(64), OTHER)}, [0]
    while waiting:
        start = waiting.pop()
        end, follows = blocks[start]
        halves = _Halves(entered[start])
        for address, _, opcode, operands in code[start:end]:
            halves.follow(address, opcode, operands)
        for block in follows:
            before = entered.get(block)
            after = halves.known if before is None else {n: _met(x, halves.known[n]) for n, x in before.items()}
            if after != before:
                entered[block] = dict(after)
                waiting.append(block)
    wrong = []
    for start, known in entered.items():
        halves = _Halves(known)
        for address, _, opcode, operands in code[start : blocks[start][0]]:
            if opcode.startswith("HGMMA") and _reads_elsewhere(halves, operands):
                wrong.append(address)
            halves.follow(address, opcode, operands)
    return sorted(wrong)


def _reads_elsewhere(halves, operands):
    """Whether a product's operands in shared memory, the second alone or both, are surely no descriptors."""
    place, number = next((i, int(found[1])) for i, x in enumerate(operands) if (found := DESCRIPTOR.match(x)))
    uppers = [number + 3] if place == 2 else [number + 1, number + 3]
    return any(_named(halves.known.get(n, UNKNOWN)) not in (HIGH, UNKNOWN) for n in uppers)

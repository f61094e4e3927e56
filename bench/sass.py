"""Executed instructions of NVIDIA machine code, counted without a GPU.

``Code`` holds what nvdisasm prints. ``Code.walk`` follows one warp from the first instruction to EXIT with the launch's
arguments: it computes integers and predicates, on which branches and loops depend, and leaves all else unknown (data in
memory, floating point). So a loop counts as often as it runs, whatever the compiler unrolled; what depends on data
counts once.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_LINE = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*(.*?)\s*;"
    r"(?:\s*/\*\s*0x([0-9a-f]+)\s*\*/)?"
)
_CONTROL = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_LABEL = re.compile(r"^([.$\w]+):")
_SCHEDULING = re.compile(r"\s[&?]\w+(?:=[^\s,]*)?")  # printed for sm_100, beside the encoding
_TARGET = re.compile(r"`\(([^)]+)\)")
_RELATIVE = re.compile(r"32@(lo|hi)\(\((\S+) \+ (\S+)@srel\)\)")
_CONSTANT = re.compile(r"c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(?:0x([0-9a-f]+))?\]")
_ADDRESS = re.compile(r"\[(U?R\w+?)(?:\.64|\.U32)*(?:\+(UR\w+))?(?:\+(-?0x[0-9a-f]+))?\]")
_DESCRIPTOR = re.compile(r"desc\[\w+\]")
_MASK = 0xFFFFFFFF
_MOST_STEPS = 4_000_000
# Tensors of a walk are this many bits of address apart.
REGION = 40
LOADS = ("LDG", "LD", "LDGSTS")
STORES = ("STG", "ST", "RED", "REDG", "ATOMG", "ATOM")


class Instruction(NamedTuple):
    """One line of nvdisasm's output.

    Attributes:
        address: in the kernel's code, in bytes.
        guard: predicate of the instruction, such as "!P0"; empty without.
        name: with its modifiers, such as "LDG.E.128".
        operands: as printed.
        control: the upper half of its encoding, 0 where nvdisasm was not asked for it.
    """

    address: int
    guard: str
    name: str
    operands: tuple[str, ...]
    control: int = 0

    @property
    def base(self) -> str:
        """Its name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def bits(self) -> int:
        """That a lane loads or stores."""
        for word in reversed(self.name.split(".")):
            if re.fullmatch(r"[USB]?(8|16|32|64|128|256)", word):
                return int(word.lstrip("USB"))
        return 32


@dataclass
class Walk:
    """What one warp executed.

    Attributes:
        executed: how often each instruction of ``Code.instructions`` was issued.
        cycles: until the warp ended, if it had the multiprocessor for itself: stall counts of the machine code, and
            the latency of loads, shuffles and special functions where the code waits for them.
        unknown: loops, and branches in loops, that depend on data; each counts once.
        touched: (instruction, address >> REGION) of loads and stores of global memory that were not switched off, and
            how often; None where the address depends on data.
    """

    executed: list[int]
    cycles: int = 0
    unknown: set[int] = field(default_factory=set)
    touched: Counter[tuple[int, int | None]] = field(default_factory=Counter)


class Code:
    """The instructions of one kernel and its labels.

    Args:
        text: of ``nvdisasm`` or ``nvdisasm -hex``, one kernel's section.
    """

    def __init__(self, text: str):
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        lines = text.splitlines()
        for number, line in enumerate(lines):
            label = _LABEL.match(line)
            if label:
                self.labels[label[1]] = len(self.instructions)
                continue
            match = _LINE.search(line)
            if not match:
                continue
            control = _CONTROL.match(lines[number + 1]) if number + 1 < len(lines) else None
            operands = _split(_SCHEDULING.sub("", match[4]))
            guard = match[2] or ""
            encoding = int(control[1], 16) if control else 0
            self.instructions.append(Instruction(int(match[1], 16), guard, match[3], operands, encoding))
        if not self.instructions:
            raise ValueError("no instructions in this disassembly: is it the output of nvdisasm?")
        self._at = {one.address: index for index, one in enumerate(self.instructions)}
        self._loops = self._find_loops()
        self._decoded = [_decode(one, self) for one in self.instructions]

    def target(self, instruction: Instruction) -> int | None:
        """Index of the instruction that a jump goes to; None if it is not printed."""
        for operand in instruction.operands:
            named = _TARGET.search(operand)
            if named:
                return self.labels.get(named[1])
            if re.fullmatch(r"0x[0-9a-f]+", operand):
                return self._at.get(int(operand, 16))
        return None

    def address_of(self, label: str) -> int:
        """Of a label, in bytes; 0 for the kernel itself."""
        index = self.labels.get(label, 0)
        return self.instructions[index].address if index < len(self.instructions) else 0

    def loops(self) -> list[tuple[int, int]]:
        """(first, last) index of each loop: the target and the place of a backward jump."""
        return self._loops

    def _find_loops(self) -> list[tuple[int, int]]:
        edges = []
        for index, one in enumerate(self.instructions):
            if one.base == "BRA":
                target = self.target(one)
                if target is not None and target < index:
                    edges.append((target, index))
        return edges

    def _leaves_loop(self, index: int, target: int) -> bool:
        """Whether a forward jump leaves the innermost loop around it."""
        around = [(last - first, first, last) for first, last in self._loops if first <= index <= last]
        return bool(around) and target > min(around)[2]

    def walk(
        self,
        constants: Mapping[int, int],
        special: Mapping[str, int],
        memory: Callable[[int, int], int | None] = lambda address, size: None,
        latencies: Mapping[str, int] | None = None,
    ) -> Walk:
        """Follow a warp's first lane.

        Args:
            constants: 32-bit words of constant bank 0 by their offset: the sizes of the launch and its arguments.
            special: special registers, such as "SR_TID.X": 0.
            memory: (address, bytes) -> a loaded integer; None if it is not known.
            latencies: cycles after which results of "global", "shared" and "other" instructions are there.

        Raises:
            RuntimeError: the kernel does not end.
        """
        state = _State(constants, special, memory)
        executed = [0] * len(self.instructions)
        result = Walk(executed)
        latencies = latencies or {}
        seen: Counter[int] = Counter()
        ready = [0] * 8  # when each of the six scoreboard barriers is released; 7 means none
        index = clock = steps = 0
        while index < len(self.instructions):
            step = self._decoded[index]
            executed[index] += 1
            steps += 1
            if steps > _MOST_STEPS:
                raise RuntimeError(f"the walk of a kernel took over {_MOST_STEPS} instructions")
            if step.waits:
                for barrier in step.waits:
                    clock = max(clock, ready[barrier])
            if step.barrier != 7:
                ready[step.barrier] = clock + latencies.get(step.latency, 0)
            clock += step.stall
            guard = step.guard(state)
            if step.jump is None:
                if step.touch is not None and guard is not False:
                    address = step.touch(state)
                    result.touched[index, None if address is None else address >> REGION] += 1
                if guard is not False and step.run is not None:
                    step.run(state, guard)
                index += 1
                continue
            if step.jump == "exit":
                if guard is True:
                    break
                index += 1
            elif step.jump == "call":
                index = step.target if guard is not False and step.target is not None else index + 1
            elif step.jump == "return":
                place = step.run(state)
                if guard is False:
                    index += 1
                elif place is None:
                    break
                else:  # relative to the function of its label, by default the kernel itself
                    start = 0 if step.target is None else self.instructions[step.target].address
                    index = self._at[start + place]
            else:
                index = self._branch(index, step, guard, seen, result)
        result.cycles = clock
        return result

    def _branch(self, index: int, step: _Step, guard: bool | None, seen: Counter, result: Walk) -> int:
        following, target = index + 1, step.target
        if guard is False or target is None:
            return following
        if guard is True:
            # `.L: BRA .L` after a kernel's end.
            return len(self.instructions) if target == index else target
        if target <= index:
            result.unknown.add(target)
            return following
        # What is skipped with a call is a rare case: a division's or a root's of denormal numbers.
        skipped = self.instructions[following:target]
        if any(one.base == "CALL" for one in skipped):
            return target
        around = [first for first, last in self._loops if first <= index <= last]
        if not around:
            return following
        # In a loop, and whether out of it: once.
        result.unknown.add(max(around) if self._leaves_loop(index, target) else index)
        seen[index] += 1
        return following if seen[index] == 1 or (self._leaves_loop(index, target) and seen[index] % 2) else target


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text else ()


class _State:
    """Registers with known values: "R3", "UR4" are 32-bit words, "P0", "UP0" truth values."""

    def __init__(self, constants: Mapping[int, int], special: Mapping[str, int], memory: Callable):
        self.registers: dict[str, int | bool] = {}
        self.constants, self.special, self.memory = constants, special, memory


class _Step(NamedTuple):
    run: Callable | None
    guard: Callable[[_State], bool | None]
    jump: str | None
    target: int | None
    stall: int
    barrier: int
    waits: tuple[int, ...]
    latency: str
    touch: Callable[[_State], int | None] | None


def _decode(one: Instruction, code: Code) -> _Step:
    control = one.control >> 41
    stall, barrier, wait = (control & 15, control >> 5 & 7, control >> 11 & 63) if one.control else (1, 7, 0)
    waits = tuple(i for i in range(6) if wait >> i & 1)
    guard = _predicate(one.guard) if one.guard else _always
    jump = target = run = None
    base = one.base
    if base == "BRA":
        jump, target = "branch", code.target(one)
        conditions = [o for o in one.operands if re.fullmatch(r"!?U?P[0-9T]+", o)]
        if ".DIV" in one.name:
            guard = _never
        elif conditions:
            guard = _both(guard, *map(_predicate, conditions))
    elif base in ("EXIT", "KILL"):
        jump = "exit"
    elif base == "CALL":
        jump, target = "call", code.target(one)
    elif base in ("RET", "BRX", "JMX"):
        jump, target = "return", code.target(one)
        run = _value(one.operands[0].partition(" ")[0], code) if one.operands else None
        run = run or (lambda state: None)
    else:
        run = _semantics(one, code)
    if barrier != 7 or waits:
        latency = (
            "global" if base in ("LDG", "LD", "LDL", "ATOMG", "TEX", "RED")
            else "shared" if base in ("LDS", "LDSM", "ATOMS", "SHFL")
            else "other"
        )  # fmt: skip
    else:
        latency = "other"
    touch = _address(one, code) if base in (*LOADS, *STORES) else None
    if base == "LDGSTS" and _is_predicate(one.operands[-1]):
        guard = _both(guard, _predicate(one.operands[-1]))
    return _Step(run, guard, jump, target, max(stall, 1), barrier, waits, latency, touch)


def _address(one: Instruction, code: Code) -> Callable[[_State], int | None]:
    """Of a load or a store in global memory."""
    matches = [_ADDRESS.search(_DESCRIPTOR.sub("", operand)) for operand in one.operands]
    places = [place for place in matches if place]
    if not places:
        return _unknown
    place = places[-1]  # LDGSTS names shared memory first
    register = _pair(place[1], code)
    added = _pair(place[2], code) if place[2] else _zero
    offset = int(place[3] or "0", 16)

    def evaluate(state):
        base, more = register(state), added(state)
        return None if base is None or more is None else base + more + offset

    return evaluate


def _always(state: _State) -> bool:
    return True


def _never(state: _State) -> bool:
    return False


def _both(*all_of: Callable) -> Callable[[_State], bool | None]:
    def evaluate(state):
        values = [one(state) for one in all_of]
        return False if False in values else None if None in values else True

    return evaluate


def _predicate(text: str) -> Callable[[_State], bool | None]:
    negative, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        return _never if negative else _always

    def evaluate(state):
        value = state.registers.get(name)
        return value if value is None else value != negative

    return evaluate


def _value(text: str, code: Code, word: int = 0) -> Callable[[_State], int | None]:
    """A 32-bit operand, with sign and complement applied modulo 2**32; ``word`` 1 is the upper half of a 64-bit one."""
    text = text.replace(".reuse", "")
    negative = text.startswith("-") and not re.match(r"-(0x|\d)", text)
    inverted, absolute = text.startswith("~"), text.strip("-").startswith("|")
    name = text
    if negative or inverted or absolute:
        inner = _value(text.lstrip("-~").strip("|"), code, word)

        def signed(state):
            value = inner(state)
            if value is None:
                return None
            if absolute:
                value = (1 << 32) - value if value >> 31 else value
            return (~value if inverted else -value if negative else value) & _MASK

        return signed
    register = re.fullmatch(r"(U?R)(\d+|Z)(?:\.64|\.U32)?", name)
    if register:
        if register[2] == "Z":
            return _zero
        key = f"{register[1]}{int(register[2]) + word}"
        return lambda state: state.registers.get(key)
    if re.fullmatch(r"-?0x[0-9a-f]+", name):
        number = int(name, 16)
        number = (number >> 32 * word) & _MASK
        return lambda state: number
    relative = _RELATIVE.search(name)
    if relative:
        place = code.address_of(relative[3]) if relative[1] == "lo" else 0
        return lambda state: place
    constant = _CONSTANT.fullmatch(name.removesuffix(".64"))
    if constant and int(constant[1], 16) == 0:
        offset = int(constant[3] or "0", 16) + 4 * word
        if constant[2] is None:
            return lambda state: state.constants.get(offset)
        index = _value(constant[2], code)
        return lambda state: None if index(state) is None else state.constants.get(index(state) + offset)
    if re.fullmatch(r"-?\d+", name):  # zero is printed so
        number = int(name) & _MASK
        return lambda state: number
    try:
        number = 0 if word else struct.unpack("<I", struct.pack("<f", float(name)))[0]
    except (ValueError, OverflowError):
        return _unknown
    return lambda state: number


def _zero(state: _State) -> int:
    return 0


def _unknown(state: _State) -> None:
    return None


def _pair(text: str, code: Code) -> Callable[[_State], int | None]:
    low, high = _value(text, code), _value(text, code, 1)

    def evaluate(state):
        a, b = low(state), high(state)
        return None if a is None or b is None else b << 32 | a

    return evaluate


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[0-9T]+", text) is not None


def _write(state: _State, name: str, value: int | bool | None) -> None:
    if name in ("RZ", "URZ", "PT", "UPT"):
        return
    if value is None:
        state.registers.pop(name, None)
    else:
        state.registers[name] = value


def _shifted(name: str, by: int) -> str:
    match = re.fullmatch(r"(U?R)(\d+)(?:\.\w+)?", name)
    return f"{match[1]}{int(match[2]) + by}" if match else "RZ"


_COMPARE = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}
_COMBINE = {"AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b}


def _logic(operation: str, a: bool | None, b: bool | None) -> bool | None:
    """Of truth values that may be unknown."""
    for absorbing, name in ((False, "AND"), (True, "OR")):
        if operation == name and absorbing in (a, b):
            return absorbing
    return None if a is None or b is None else _COMBINE[operation](a, b)


def _semantics(one: Instruction, code: Code) -> Callable | None:
    """What an instruction does to the registers that are known; None if it writes none."""
    names = one.name.split(".")
    uniform = names[0].startswith("U") and names[0] not in ("UNPACK",)
    base = names[0].removeprefix("U") if uniform else names[0]
    build = _BUILDERS.get(base)
    destinations = _destinations(one)
    calculate = build(one, names[1:], one.operands, code) if build is not None else None

    def run(state, guard):
        if guard is None or calculate is None:
            for name in destinations:
                _write(state, name, None)
            return
        for name, value in calculate(state).items():
            _write(state, name, value)

    return run if destinations or calculate else None


_NO_RESULT = ("ST", "STG", "STS", "STL", "BAR", "RED", "NOP", "BSSY", "BSYNC", "BREAK", "DEPBAR", "LDGDEPBAR", "LDGSTS",
              "WARPSYNC", "MEMBAR", "ERRBAR", "FENCE", "UBLKCP", "WARPGROUP", "YIELD", "NANOSLEEP", "PREFETCH", "CCTL",
              "BMOV", "ACQBULK", "UTMALDG", "UTMASTG")  # fmt: skip


def _destinations(one: Instruction) -> list[str]:
    """Registers that an instruction may write."""
    if one.base in _NO_RESULT or not one.operands:
        return []
    width = 4 if ".128" in one.name or "MMA" in one.base else 2 if re.search(r"64|WIDE", one.name) else 1
    if one.base == "CS2R" and ".32" not in one.name:
        width = 2
    operands = []
    for operand in one.operands:
        if re.fullmatch(r"U?P\d", operand):
            operands.append(operand)
        elif re.fullmatch(r"U?P?T", operand):
            continue
        elif re.fullmatch(r"U?R\d+(\.64)?", operand):
            return operands + [_shifted(operand, i) for i in range(width)]
        else:
            break
    return operands


def _three(operands: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates and register that an instruction writes, values that it reads, predicates that it reads."""
    place = next((i for i, o in enumerate(operands) if not _is_predicate(o)), len(operands))
    written = list(operands[: place + 1])
    rest = list(operands[place + 1 :])
    while rest and _is_predicate(rest[0]):
        written.append(rest.pop(0))
    values = [o for o in rest if not _is_predicate(o)]
    return written, values, [o for o in rest if _is_predicate(o)]


def _build_mov(one, modifiers, operands, code):
    source = _value(operands[-1] if not re.fullmatch(r"0x[0-9a-f]", operands[-1]) or len(operands) == 2
                    else operands[1], code)  # fmt: skip
    if "64" in modifiers:
        low, high = _value(operands[1], code), _value(operands[1], code, 1)
        return lambda state: {operands[0]: low(state), _shifted(operands[0], 1): high(state)}
    return lambda state: {operands[0]: source(state)}


def _build_imad(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    a, b = (_value(v, code) for v in values[:2])
    wide, unsigned = "WIDE" in modifiers, "U32" in modifiers
    c = (_pair if wide or "HI" in modifiers else _value)(values[2], code)
    extra = _predicate(taken[-1]) if "X" in modifiers and taken else _never

    def calculate(state):
        x, y, z, carry = a(state), b(state), c(state), extra(state)
        if 0 in (x, y):
            product = 0
        elif x is None or y is None:
            product = None
        elif wide or "HI" in modifiers:
            product = x * y if unsigned else _signed(x) * _signed(y)
        else:
            product = x * y
        total = None if product is None or z is None or carry is None else product + z + carry
        if "HI" in modifiers:
            return {name: None if total is None else total >> 32 & _MASK}
        if not wide:
            return {name: None if total is None else total & _MASK}
        if total is None:
            return {name: None, _shifted(name, 1): None, **dict.fromkeys(carries)}
        written = {name: total & _MASK, _shifted(name, 1): total >> 32 & _MASK}
        return written | {p: bool(total >> 64) for p in carries}

    return calculate


def _build_iadd3(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    pairs = "64" in modifiers
    bits = 64 if pairs else 32
    terms = []
    for text in values:
        negative = text.startswith("-") and not text.startswith("-0x")
        terms.append((negative, (_pair if pairs else _value)(text[1:] if negative else text, code)))
    extra = [_predicate(p) for p in taken] if "X" in modifiers else []

    def calculate(state):
        total = 0
        for negative, term in terms:
            value = term(state)
            if value is None:
                total = None
                break
            # A negated term is its complement plus one, whose carry the upper words of a long subtraction need.
            total += (1 << bits) - value if negative else value
        for predicate in extra:
            carry = predicate(state)
            total = None if total is None or carry is None else total + carry
        written = {p: None if total is None else bool(total >> bits) for p in carries}
        if pairs:
            low, high = (None, None) if total is None else (total & _MASK, total >> 32 & _MASK)
            return written | {name: low, _shifted(name, 1): high}
        return written | {name: None if total is None else total & _MASK}

    return calculate


def _build_lea(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    high = "HI" in modifiers
    a, b = _value(values[0], code), _value(values[1], code)
    c = _value(values[2], code) if high and len(values) > 3 else _zero
    shift = int(values[-1], 16) if values[-1].startswith("0x") else 0
    extra = _predicate(taken[-1]) if "X" in modifiers and taken else _never
    negative = values[0].startswith("-")

    def calculate(state):
        x, y, z, carry = a(state), b(state), c(state), extra(state)
        if None in (x, y, z, carry):
            return {name: None, **dict.fromkeys(carries)}
        if high:
            wide = _signed(x) if "SX32" in modifiers else z << 32 | x
            total = ((wide << shift) >> 32 & _MASK) + y + carry
        else:
            total = (x << shift & _MASK) + y + carry
        return {name: total & _MASK, **{p: bool(total >> 32) and not negative for p in carries}}

    return calculate


def _build_shf(one, modifiers, operands, code):
    name, *rest = operands
    a, shift, c = (_value(v, code) for v in rest[:3])
    left, wide, signed, high = "L" in modifiers, False, False, "HI" in modifiers
    wide = any(m in ("U64", "S64") for m in modifiers)
    signed = any(m in ("S32", "S64") for m in modifiers)
    only_high = not left and not wide and high
    only_low = left and not wide and not high

    def calculate(state):
        low, by, up = a(state), shift(state), c(state)
        if by is None:
            return {name: None}
        by = by & (63 if wide else 31) if "W" in modifiers else min(by, 64 if wide else 32)
        if only_low:
            return {name: None if low is None else low << by & _MASK}
        if up is None or (low is None and not only_high):
            return {name: None}
        if only_high:
            return {name: (_signed(up) if signed else up) >> by & _MASK}
        both = up << 32 | low
        both = both << by if left else (_signed(both, 64) if signed else both) >> by
        return {name: (both >> 32 if high else both) & _MASK}

    return calculate


def _build_lop3(one, modifiers, operands, code):
    written, values, taken = _three(operands)
    name = next((w for w in written if not _is_predicate(w)), "RZ")
    flags = [w for w in written if _is_predicate(w)]
    a, b, c = (_value(v, code) for v in values[:3])
    table = int(values[3], 16)
    combined = _predicate(taken[-1]) if taken else _never

    def calculate(state):
        words = (a(state), b(state), c(state))
        # Known whatever an unknown word is, as is x & 0.
        totals = {
            _logic3(table, *[fill if word is None else word for word, fill in zip(words, fills, strict=True)])
            for fills in ((0, 0, 0), (_MASK, _MASK, _MASK), (0, _MASK, 0), (_MASK, 0, _MASK))
        }
        total = totals.pop() if len(totals) == 1 and words.count(None) < 2 else None
        extra = combined(state)
        nonzero = None if total is None else total != 0
        return {name: total, **{flag: _logic("OR", nonzero, extra) for flag in flags}}

    return calculate


def _logic3(table: int, a: int, b: int, c: int) -> int:
    """LOP3's function of three words: bit i of ``table`` is its value where the bits of a, b and c are those of i."""
    total = 0
    for case in range(8):
        if table >> case & 1:
            term = (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
            total |= term & _MASK
    return total


def _build_plop3(one, modifiers, operands, code):
    first, second, *rest = operands
    inputs = [_predicate(p) for p in rest[:3]]
    tables = [int(t, 16) for t in rest[3:5]]

    def calculate(state):
        values = [p(state) for p in inputs]
        results = []
        for table in tables:
            possible = {
                bool(table >> case & 1)
                for case in range(8)
                if all(v is None or v == bool(case & bit) for v, bit in zip(values, (4, 2, 1), strict=True))
            }
            results.append(possible.pop() if len(possible) == 1 else None)
        return dict(zip((first, second), results, strict=False))

    return calculate


def _build_isetp(one, modifiers, operands, code):
    first, second, left, right, combined, *more = operands
    compare = _COMPARE.get(modifiers[0], lambda a, b: None)
    operation = next((m for m in modifiers if m in _COMBINE), "AND")
    wide = any(m in ("U64", "S64") for m in modifiers)
    unsigned, extended = any(m in ("U32", "U64") for m in modifiers), "EX" in modifiers
    a, b = ((_pair if wide else _value)(text, code) for text in (left, right))
    with_, lower = _predicate(combined), _predicate(more[0]) if extended and more else _always

    def calculate(state):
        x, y, rest, below = a(state), b(state), with_(state), lower(state)
        if x is None or y is None:
            result = None
        else:
            if not unsigned:
                x, y = (_signed(v, 64 if wide else 32) for v in (x, y))
            result = compare(x, y)
            if extended and x == y:
                result = below
        opposite = None if result is None else not result
        return {first: _logic(operation, result, rest), second: _logic(operation, opposite, rest)}

    return calculate


def _build_sel(one, modifiers, operands, code):
    name, left, right, condition = operands
    which = _predicate(condition)
    wide = "64" in modifiers

    def words(text):
        return [_value(text, code, word) for word in range(2 if wide else 1)]

    yes, no = words(left), words(right)

    def calculate(state):
        chosen = which(state)
        values = [(None if chosen is None else (y if chosen else n)(state)) for y, n in zip(yes, no, strict=True)]
        return {_shifted(name, i) if i else name: value for i, value in enumerate(values)}

    return calculate


def _build_minmax(one, modifiers, operands, code):
    written, values, taken = _three(operands)
    if len(values) != 2 or not taken:
        return lambda state: dict.fromkeys(w for w in written if not w.endswith("T"))
    a, b = (_value(v, code) for v in values)
    smaller = _predicate(taken[-1])
    unsigned = "U32" in modifiers

    def calculate(state):
        x, y, least = a(state), b(state), smaller(state)
        if None in (x, y, least):
            return {written[0]: None}
        key = (lambda v: v) if unsigned else _signed
        return {written[0]: (min if least else max)(x, y, key=key)}

    return calculate


def _build_special(one, modifiers, operands, code):
    name = operands[0]
    source = operands[1] if len(operands) > 1 else ""
    pair = one.base == "CS2R" and ".32" not in one.name

    def calculate(state):
        value = 0 if source == "SRZ" else state.special.get(source)
        return {name: value, **({_shifted(name, 1): value and 0 if value is None else 0} if pair else {})}

    return calculate


def _build_load_constant(one, modifiers, operands, code):
    name = operands[0]
    words = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    parts = [_value(operands[1], code, word) for word in range(words)]
    return lambda state: {_shifted(name, i) if i else name: part(state) for i, part in enumerate(parts)}


def _build_load(one, modifiers, operands, code):
    written, _, _ = _three(operands)
    name = next((w for w in written if not _is_predicate(w)), "RZ")
    words = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    size = min(one.bits // 8, 4)
    names = [_shifted(name, i) if i else name for i in range(words)]
    if one.base in ("LDS", "LDL", "LDSM"):
        return lambda state: dict.fromkeys(names)
    address = _address(one, code)

    def calculate(state):
        place = address(state)
        if place is None:
            return dict.fromkeys(names)
        return {name: state.memory(place + 4 * i, size) for i, name in enumerate(names)}

    return calculate


def _build_copy(one, modifiers, operands, code):
    """A value of the first lane, taken over by all."""
    written, values, _ = _three(operands)
    if one.base == "SHFL" and ("IDX" not in modifiers or values[1] not in ("RZ", "0x0")):
        return lambda state: dict.fromkeys(w for w in written if not w.endswith("T"))
    name = next(w for w in written if not _is_predicate(w))
    source = _value(values[0], code)
    flags = [w for w in written if _is_predicate(w)]
    return lambda state: {name: source(state), **dict.fromkeys(flags, True)}


def _build_vote(one, modifiers, operands, code):
    """Lanes of a warp are taken to agree."""
    flags = [o for o in operands if re.fullmatch(r"U?P\d", o)]
    name = next((o for o in operands if re.fullmatch(r"U?R\d+", o)), None)
    source = _predicate(operands[-1]) if _is_predicate(operands[-1]) else _unknown
    writes = [f for f in flags if f != operands[-1].lstrip("!")][:1]

    def calculate(state):
        value = source(state)
        result = dict.fromkeys(writes, value)
        if name:
            result[name] = None if value is None else _MASK if value else 0
        return result

    return calculate


def _build_prmt(one, modifiers, operands, code):
    name, left, choice, right = operands
    a, selector, b = _value(left, code), _value(choice, code), _value(right, code)

    def calculate(state):
        x, s, y = a(state), selector(state), b(state)
        if None in (x, s, y) or modifiers:
            return {name: None}
        source = y << 32 | x
        result = 0
        for byte in range(4):
            nibble = s >> 4 * byte & 15
            value = source >> 8 * (nibble & 7) & 255
            if nibble & 8:
                value = 255 if value >> 7 else 0
            result |= value << 8 * byte
        return {name: result}

    return calculate


def _build_sgxt(one, modifiers, operands, code):
    source, bits = _value(operands[1], code), _value(operands[2], code)

    def calculate(state):
        value, width = source(state), bits(state)
        if value is None or not width:
            return {operands[0]: None}
        value &= (1 << width) - 1
        return {operands[0]: value if "U32" in modifiers else _signed(value, width) & _MASK}

    return calculate


def _build_iabs(one, modifiers, operands, code):
    source = _value(operands[1], code)

    def calculate(state):
        value = source(state)
        return {operands[0]: None if value is None else abs(_signed(value)) & _MASK}

    return calculate


def _build_bits(one, modifiers, operands, code):
    source = _value(operands[-1], code)
    count = one.base.removeprefix("U") == "POPC"

    def calculate(state):
        value = source(state)
        if value is None:
            return {operands[0]: None}
        if count:
            return {operands[0]: value.bit_count()}
        last = value.bit_length() - 1
        return {operands[0]: (31 - last if "SH" in modifiers and value else last) & _MASK}

    return calculate


def _from_bits(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def _to_bits(value: float, up: bool = False) -> int:
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    return word + 1 if up and _from_bits(word) < value else word


def _build_to_float(one, modifiers, operands, code):
    wide = any(m in ("U64", "S64") for m in modifiers)
    source = (_pair if wide else _value)(operands[1], code)
    signed = not any(m.startswith("U") for m in modifiers)
    if any(m in ("F64", "F16", "BF16", "U8", "U16", "S8", "S16") for m in modifiers):
        return None

    def calculate(state):
        value = source(state)
        if value is None:
            return {operands[0]: None}
        return {operands[0]: _to_bits(_signed(value, 64 if wide else 32) if signed else value, "RP" in modifiers)}

    return calculate


def _build_to_integer(one, modifiers, operands, code):
    wide = any(m in ("U64", "S64") for m in modifiers)
    source = _value(operands[1], code)
    if any(m in ("F64", "F16", "BF16") for m in modifiers) or "TRUNC" not in modifiers:
        return None

    def calculate(state):
        word = source(state)
        names = [operands[0], _shifted(operands[0], 1)][: 1 + wide]
        if word is None or not math.isfinite(_from_bits(word)):
            return dict.fromkeys(names)
        value = int(_from_bits(word))
        return {name: value >> 32 * i & _MASK for i, name in enumerate(names)}

    return calculate


def _build_mufu(one, modifiers, operands, code):
    source = _value(operands[1], code)

    def calculate(state):
        word = source(state) if modifiers == ["RCP"] else None
        known = word is not None and 0.0 < abs(_from_bits(word)) < math.inf
        return {operands[0]: _to_bits(1.0 / _from_bits(word)) if known else None}

    return calculate


def _build_half(one, modifiers, operands, code):
    """Compilers load constants by ``HFMA2 R0, -RZ, RZ, a, b``: a and b are the halves of a word."""
    if len(operands) != 5 or operands[1].lstrip("-") != "RZ" or operands[2].lstrip("-") != "RZ":
        return None
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in operands[3:])
    except (ValueError, OverflowError):
        return None
    return lambda state: {operands[0]: high << 16 | low}


def _build_p2r(one, modifiers, operands, code):
    name, _, other, mask = operands[:4]
    source, bits = _value(other, code), int(mask, 16)

    def calculate(state):
        base = source(state)
        flags = [state.registers.get(f"P{i}", None) for i in range(7)]
        if base is None or modifiers or any(flags[i] is None for i in range(7) if bits >> i & 1):
            return {name: None}
        packed = sum(flags[i] << i for i in range(7) if bits >> i & 1)
        return {name: base & ~bits & _MASK | packed}

    return calculate


def _build_r2p(one, modifiers, operands, code):
    source, bits = _value(operands[1], code), int(operands[2], 16) if len(operands) > 2 else 0x7F

    def calculate(state):
        word = None if modifiers else source(state)
        return {f"P{i}": None if word is None else bool(word >> i & 1) for i in range(7) if bits >> i & 1}

    return calculate


def _build_fchk(one, modifiers, operands, code):
    return lambda state: {operands[0]: False}  # no operand of the division is out of range


_BUILDERS = {
    "MOV": _build_mov,
    "IMAD": _build_imad,
    "IADD3": _build_iadd3,
    "IADD": _build_iadd3,
    "VIADD": _build_iadd3,
    "LEA": _build_lea,
    "SHF": _build_shf,
    "LOP3": _build_lop3,
    "PLOP3": _build_plop3,
    "ISETP": _build_isetp,
    "SEL": _build_sel,
    "FSEL": _build_sel,
    "IMNMX": _build_minmax,
    "VIMNMX": _build_minmax,
    "S2R": _build_special,
    "S2UR": _build_special,
    "CS2R": _build_special,
    "LDC": _build_load_constant,
    "LDCU": _build_load_constant,
    "LDG": _build_load,
    "LD": _build_load,
    "LDS": _build_load,
    "R2UR": _build_copy,
    "SHFL": _build_copy,
    "VOTE": _build_vote,
    "VOTEU": _build_vote,
    "PRMT": _build_prmt,
    "SGXT": _build_sgxt,
    "IABS": _build_iabs,
    "POPC": _build_bits,
    "FLO": _build_bits,
    "I2F": _build_to_float,
    "I2FP": _build_to_float,
    "F2I": _build_to_integer,
    "MUFU": _build_mufu,
    "HFMA2": _build_half,
    "P2R": _build_p2r,
    "R2P": _build_r2p,
    "FCHK": _build_fchk,
}

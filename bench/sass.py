"""Executed instructions of NVIDIA machine code, counted without a GPU.

``Code`` holds what nvdisasm prints. ``Code.walk`` follows one warp from the first instruction to EXIT with the launch's
arguments: it computes integers and predicates, on which branches and loops depend, and leaves all else unknown (data in
memory, floating point). So a loop counts as often as it runs, whatever the compiler unrolled; what depends on data
counts once.
"""

from __future__ import annotations

import math
import operator
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*(.*?)\s*;")
_CONTROL = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_LABEL = re.compile(r"^([.$\w]+):")
_SCHEDULING = re.compile(r"\s[&?]\w+(?:=[^\s,]*)?")  # printed for sm_100, beside the encoding
_TARGET = re.compile(r"`\(([^)]+)\)")
_RELATIVE = re.compile(r"32@(lo|hi)\(\((\S+) \+ (\S+)@srel\)\)")
_CONSTANT = re.compile(r"c\[0x([0-9a-f]+)\]\[(?:(U?R\w+)\+?)?(?:0x([0-9a-f]+))?\]")
_ADDRESS = re.compile(r"\[(U?R\w+?)(?:\.64|\.U32)*(?:\+(UR\w+))?(?:\+(-?0x[0-9a-f]+))?\]")
_DESCRIPTOR = re.compile(r"desc\[\w+\]")
_SIGNED = re.compile(r"(-(?!\d)|~|(?=\|))(.+)")  # an operand with a sign, a complement, or its magnitude
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

    Attributes:
        loops: (first, last) index of each loop: the target and the place of a backward jump.
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
            operands = tuple(filter(None, map(str.strip, _SCHEDULING.sub("", match[4]).split(","))))
            guard = match[2] or ""
            encoding = int(control[1], 16) if control else 0
            self.instructions.append(Instruction(int(match[1], 16), guard, match[3], operands, encoding))
        if not self.instructions:
            raise ValueError("no instructions in this disassembly: is it the output of nvdisasm?")
        self._at = {one.address: index for index, one in enumerate(self.instructions)}
        targets = [(self.target(one), i) for i, one in enumerate(self.instructions) if one.base == "BRA"]
        self.loops = [(first, last) for first, last in targets if first is not None and first < last]
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
        result = Walk([0] * len(self.instructions))
        latencies = latencies or {}
        ready = [0] * 8  # when each of the six scoreboard barriers is released; 7 means none
        index = clock = 0
        for _ in range(_MOST_STEPS):
            if index >= len(self.instructions):
                result.cycles = clock
                return result
            step = self._decoded[index]
            result.executed[index] += 1
            for barrier in step.waits:
                clock = max(clock, ready[barrier])
            if step.barrier != 7:
                ready[step.barrier] = clock + latencies.get(step.latency, 0)
            clock += step.stall
            guard = step.guard(state)
            if step.jump is not None:
                index = self._jump(index, step, guard, state, result)
                continue
            if guard is not False:
                if step.touch is not None:
                    address = step.touch(state)
                    result.touched[index, None if address is None else address >> REGION] += 1
                if step.run is not None:
                    step.run(state, guard)
            index += 1
        raise RuntimeError(f"the walk of a kernel took over {_MOST_STEPS} instructions")

    def _jump(self, index: int, step: _Step, guard: bool | None, state: _State, result: Walk) -> int:
        """Index of the instruction after this one; that after the last ends the walk."""
        following, end = index + 1, len(self.instructions)
        if step.jump == "branch":
            return self._branch(index, step.target, guard, state, result)
        if step.jump == "exit":
            return end if guard is True else following
        if guard is False:
            return following
        if step.jump == "call":
            return following if step.target is None else step.target
        place = step.run(state)
        if place is None:
            return end
        # A return is relative to the function of its label, by default the kernel itself.
        start = 0 if step.target is None else self.instructions[step.target].address
        return self._at[start + place]

    def _branch(self, index: int, target: int | None, guard: bool | None, state: _State, result: Walk) -> int:
        following = index + 1
        if guard is False or target is None:
            return following
        if guard is True:
            # `.L: BRA .L` after a kernel's end.
            return len(self.instructions) if target == index else target
        if target <= index:
            result.unknown.add(target)
            return following
        # What is skipped with a call is a rare case: a division's or a root's of denormal numbers.
        if any(one.base == "CALL" for one in self.instructions[following:target]):
            return target
        around = [(last - first, first, last) for first, last in self.loops if first <= index <= last]
        if not around:
            return following
        # In a loop, and whether out of it: once.
        leaves = target > min(around)[2]
        result.unknown.add(max(first for _, first, _ in around) if leaves else index)
        state.seen[index] += 1
        return following if state.seen[index] == 1 or (leaves and state.seen[index] % 2) else target


class _State:
    """Registers with known values: "R3", "UR4" are 32-bit words, "P0", "UP0" truth values."""

    def __init__(self, constants: Mapping[int, int], special: Mapping[str, int], memory: Callable):
        self.registers: dict[str, int | bool] = {}
        self.constants, self.special, self.memory = constants, special, memory
        self.seen: Counter[int] = Counter()  # branches that depend on data

    def write(self, name: str, value: int | bool | None) -> None:
        """None is not known. The registers that are constant keep their value."""
        if value is None:
            self.registers.pop(name, None)
        elif name not in ("RZ", "URZ", "PT", "UPT"):
            self.registers[name] = value


# What an operand or an instruction reads or computes; None if it is not known.
_Read = Callable[[_State], Any]
# Registers that an instruction writes, and their values in this order; None if none is known.
_Written = tuple[Sequence[str], _Read]


class _Step(NamedTuple):
    run: Callable | None
    guard: _Read
    jump: str | None
    target: int | None
    stall: int
    barrier: int
    waits: tuple[int, ...]
    latency: str
    touch: _Read | None


def _decode(one: Instruction, code: Code) -> _Step:
    control = one.control >> 41
    stall, barrier, wait = (control & 15, control >> 5 & 7, control >> 11 & 63) if one.control else (1, 7, 0)
    waits = tuple(i for i in range(6) if wait >> i & 1)
    guard = _predicate(one.guard) if one.guard else _always
    target = touch = None
    base = one.base
    jump = _JUMPS.get(base)
    if base == "BRA":
        conditions = filter(_is_predicate, one.operands)
        guard = _never if ".DIV" in one.name else reduce(_both, map(_predicate, conditions), guard)
    if jump in ("branch", "call", "return"):
        target = code.target(one)
    if jump == "return":
        run = _value(one.operands[0].partition(" ")[0], code) if one.operands else _unknown
    else:
        run = None if jump else _semantics(one, code)
    if base in (*LOADS, *STORES):
        touch = _address(one, code)
        if base == "LDGSTS" and _is_predicate(one.operands[-1]):
            guard = _both(guard, _predicate(one.operands[-1]))
    return _Step(run, guard, jump, target, max(stall, 1), barrier, waits, _LATENCIES.get(base, "other"), touch)


_JUMPS = {
    "BRA": "branch",
    "CALL": "call",
    **dict.fromkeys(("EXIT", "KILL"), "exit"),
    **dict.fromkeys(("RET", "BRX", "JMX"), "return"),
}
_LATENCIES = {
    **dict.fromkeys(("LDG", "LD", "LDL", "ATOMG", "TEX", "RED"), "global"),
    **dict.fromkeys(("LDS", "LDSM", "ATOMS", "SHFL"), "shared"),
}


def _always(state: _State) -> bool:
    return True


def _never(state: _State) -> bool:
    return False


def _unknown(state: _State) -> None:
    return None


def _apply(function: Callable, *sources: _Read) -> _Read:
    """``function`` of values that must all be known."""

    def evaluate(state):
        values = [source(state) for source in sources]
        return None if None in values else function(*values)

    return evaluate


def _both(one: _Read, other: _Read) -> _Read:
    return lambda state: _logic("AND", one(state), other(state))


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[0-9T]+", text) is not None


def _predicate(text: str) -> _Read:
    negative, name = text.startswith("!"), text.lstrip("!")
    if name in ("PT", "UPT"):
        return _never if negative else _always

    def evaluate(state):
        value = state.registers.get(name)
        return value if value is None else value != negative

    return evaluate


def _value(text: str, code: Code, word: int = 0) -> _Read:
    """A 32-bit operand, with sign and complement applied modulo 2**32; ``word`` 1 is the upper half of a 64-bit one."""
    text = text.replace(".reuse", "")
    signed = _SIGNED.fullmatch(text)
    if signed:
        sign, inner = signed[1], _value(signed[2].strip("|"), code, word)
        absolute = signed[2].startswith("|")

        def apply_sign(value):
            value = abs(_signed(value)) if absolute else value
            return (~value if sign == "~" else -value if sign == "-" else value) & _MASK

        return _apply(apply_sign, inner)
    if text in ("RZ", "URZ"):
        return lambda state: 0
    register = re.fullmatch(r"(U?R)(\d+)(?:\.64|\.U32)?", text)
    if register:
        key = f"{register[1]}{int(register[2]) + word}"
        return lambda state: state.registers.get(key)
    relative = _RELATIVE.search(text)
    if relative:
        index = code.labels.get(relative[3], 0)  # the kernel itself has no label
        place = code.instructions[index].address if relative[1] == "lo" else 0
        return lambda state: place
    constant = _CONSTANT.fullmatch(text.removesuffix(".64"))
    if constant and int(constant[1], 16) == 0:
        offset = int(constant[3] or "0", 16) + 4 * word
        if constant[2] is None:
            return lambda state: state.constants.get(offset)
        index = _value(constant[2], code)
        return lambda state: None if index(state) is None else state.constants.get(index(state) + offset)
    number = _immediate(text, word)
    return lambda state: number


def _immediate(text: str, word: int) -> int | None:
    """A word of an integer, or the bits of a floating-point number."""
    try:
        return int(text, 0) >> 32 * word & _MASK
    except ValueError:
        pass
    try:
        return 0 if word else _to_bits(float(text))
    except (ValueError, OverflowError):
        return None


def _pair(text: str, code: Code) -> _Read:
    """A 64-bit operand."""
    return _apply(lambda low, high: high << 32 | low, _value(text, code), _value(text, code, 1))


def _address(one: Instruction, code: Code) -> _Read:
    """Of a load or a store in global memory."""
    places = [match for operand in one.operands if (match := _ADDRESS.search(_DESCRIPTOR.sub("", operand)))]
    if not places:
        return _unknown
    register, added, offset = places[-1].groups()  # LDGSTS names shared memory first
    distance = int(offset or "0", 16)
    return _apply(lambda base, more: base + more + distance, _pair(register, code), _pair(added or "RZ", code))


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _is_wide(modifiers: Sequence[str]) -> bool:
    """Whether integers have 64 bits."""
    return any(m in ("U64", "S64") for m in modifiers)


def _words_of(modifiers: Sequence[str]) -> int:
    return 4 if "128" in modifiers else 2 if "64" in modifiers else 1


def _registers(name: str, words: int) -> list[str]:
    """Names of the registers that hold a value of so many words, from the lowest."""
    match = re.fullmatch(r"(U?R)(\d+)(?:\.\w+)?", name)
    return [f"{match[1]}{int(match[2]) + i}" if match else "RZ" for i in range(words)]


def _split_words(value: int) -> tuple[int, int]:
    return value & _MASK, value >> 32 & _MASK


_COMBINE = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}


def _logic(operation: str, a: bool | None, b: bool | None) -> bool | None:
    """Of truth values that may be unknown."""
    for absorbing, name in ((False, "AND"), (True, "OR")):
        if operation == name and absorbing in (a, b):
            return absorbing
    return None if a is None or b is None else _COMBINE[operation](a, b)


def _semantics(one: Instruction, code: Code) -> Callable | None:
    """What an instruction does to the registers that are known; None if it writes none."""
    base, *modifiers = one.name.split(".")
    build = _BUILDERS.get(base.removeprefix("U"))
    built = build(one, modifiers, one.operands, code) if build else None
    names, read = built or (_destinations(one), _unknown)

    def run(state, guard):
        values = None if guard is None else read(state)
        for name, value in zip(names, values or (None,) * len(names), strict=False):
            state.write(name, value)

    return run if names else None


_NO_RESULT = ("ST", "STG", "STS", "STL", "BAR", "RED", "NOP", "BSSY", "BSYNC", "BREAK", "DEPBAR", "LDGDEPBAR", "LDGSTS",
              "WARPSYNC", "MEMBAR", "ERRBAR", "FENCE", "UBLKCP", "WARPGROUP", "YIELD", "NANOSLEEP", "PREFETCH", "CCTL",
              "BMOV", "ACQBULK", "UTMALDG", "UTMASTG")  # fmt: skip


def _destinations(one: Instruction) -> list[str]:
    """Registers that an instruction may write."""
    if one.base in _NO_RESULT or not one.operands:
        return []
    width = 4 if ".128" in one.name or "MMA" in one.base else 2 if re.search(r"64|WIDE", one.name) else 1
    names = []
    for operand in one.operands:
        if re.fullmatch(r"U?R\d+(\.64)?", operand):
            return names + _registers(operand, width)
        if not re.fullmatch(r"U?P[0-9T]", operand):
            break
        names.append(operand)
    return names


def _three(operands: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Predicates and register that an instruction writes, values that it reads, predicates that it reads."""
    place = next((i for i, o in enumerate(operands) if not _is_predicate(o)), len(operands))
    written = list(operands[: place + 1])
    rest = list(operands[place + 1 :])
    while rest and _is_predicate(rest[0]):
        written.append(rest.pop(0))
    values = [o for o in rest if not _is_predicate(o)]
    return written, values, [o for o in rest if _is_predicate(o)]


# Each ``_build_`` function gives what an instruction writes, from the instruction, its modifiers and operands; None
# where this is not followed.


def _copied(name: str, source: str, words: int, code: Code) -> _Written:
    sources = [_value(source, code, word) for word in range(words)]
    return _registers(name, words), lambda state: [read(state) for read in sources]


def _build_mov(one, modifiers, operands, code):
    return _copied(*operands[:2], _words_of(modifiers), code)


def _build_imad(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    a, b = (_value(v, code) for v in values[:2])
    wide, high, unsigned = "WIDE" in modifiers, "HI" in modifiers, "U32" in modifiers
    c = (_pair if wide or high else _value)(values[2], code)
    extra = _predicate(taken[-1]) if "X" in modifiers and taken else _never

    def multiply(state):
        x, y = a(state), b(state)
        if 0 in (x, y):
            return 0
        return None if None in (x, y) else x * y if unsigned else _signed(x) * _signed(y)

    def add(product, z, carry):
        total = product + z + carry
        low, upper = _split_words(total)
        return (upper,) if high else (low, upper, *[bool(total >> 64)] * len(carries))

    return [*_registers(name, 2), *carries] if wide else [name], _apply(add, multiply, c, extra)


def _build_iadd3(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    words = _words_of(modifiers)
    read = _pair if words == 2 else _value

    def term(text):
        if not text.startswith("-") or text.startswith("-0x"):
            return read(text, code)
        # A negated term is its complement plus one, whose carry the upper words of a long subtraction need.
        return _apply(lambda value: (1 << 32 * words) - value, read(text[1:], code))

    def add(*terms):
        total = sum(terms)
        return *_split_words(total)[:words], *[bool(total >> 32 * words)] * len(carries)

    taken = taken if "X" in modifiers else []
    return [*_registers(name, words), *carries], _apply(add, *map(term, values), *map(_predicate, taken))


def _build_lea(one, modifiers, operands, code):
    (name, *carries), values, taken = _three(operands)
    high = "HI" in modifiers
    third = values[2] if high and len(values) > 3 else "RZ"
    shift = int(values[-1], 16) if values[-1].startswith("0x") else 0
    extra = _predicate(taken[-1]) if "X" in modifiers and taken else _never
    negative = values[0].startswith("-")

    def add(x, y, z, carry):
        wide = _signed(x) if "SX32" in modifiers else z << 32 | x
        total = _split_words(wide << shift)[high] + y + carry
        return total & _MASK, *[bool(total >> 32) and not negative] * len(carries)

    return [name, *carries], _apply(add, *(_value(v, code) for v in (*values[:2], third)), extra)


def _build_shf(one, modifiers, operands, code):
    name, low, by, up = operands[:4]
    left, wide, high = "L" in modifiers, _is_wide(modifiers), "HI" in modifiers
    signed = any(m in ("S32", "S64") for m in modifiers)
    # Of one word, what comes out at its own end does not depend on the other word.
    low = "RZ" if not left and not wide and high else low
    up = "RZ" if left and not wide and not high else up

    def shift(low, by, up):
        by = by & (63 if wide else 31) if "W" in modifiers else min(by, 64 if wide else 32)
        both = up << 32 | low
        both = both << by if left else (_signed(both, 64) if signed else both) >> by
        return (_split_words(both)[high],)

    return [name], _apply(shift, *(_value(v, code) for v in (low, by, up)))


def _build_lop3(one, modifiers, operands, code):
    written, values, taken = _three(operands)
    sources = [_value(v, code) for v in values[:3]]
    table = int(values[3], 16)
    combined = _predicate(taken[-1]) if taken else _never
    flags = [_is_predicate(name) for name in written]

    def calculate(state):
        words = [source(state) for source in sources]
        # Known whatever an unknown word is, as is x & 0.
        totals = {_logic3(table, *(fill if word is None else word for word in words)) for fill in (0, _MASK)}
        total = totals.pop() if len(totals) == 1 and words.count(None) < 2 else None
        nonzero = _logic("OR", None if total is None else total != 0, combined(state))
        return [nonzero if flag else total for flag in flags]

    return written, calculate


def _logic3(table: int, a: int, b: int, c: int) -> int:
    """LOP3's function of three words: bit i of ``table`` is its value where the bits of a, b and c are those of i."""
    total = 0
    for case in range(8):
        if table >> case & 1:
            term = (a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c)
            total |= term & _MASK
    return total


def _build_plop3(one, modifiers, operands, code):
    inputs = [_predicate(p) for p in operands[2:5]]
    tables = [int(t, 16) for t in operands[5:7]]

    def calculate(state):
        cases = list(product(*((0, 1) if (value := p(state)) is None else (int(value),) for p in inputs)))
        results = [{bool(_logic3(table, *case) & 1) for case in cases} for table in tables]
        return [possible.pop() if len(possible) == 1 else None for possible in results]

    return operands[:2], calculate


def _build_isetp(one, modifiers, operands, code):
    first, second, left, right, combined, *more = operands
    compare = getattr(operator, modifiers[0].lower(), lambda x, y: None)
    operation = next((m for m in modifiers if m in _COMBINE), "AND")
    wide, extended = _is_wide(modifiers), "EX" in modifiers
    unsigned = any(m in ("U32", "U64") for m in modifiers)
    a, b = ((_pair if wide else _value)(text, code) for text in (left, right))
    with_, lower = _predicate(combined), _predicate(more[0]) if extended and more else _always

    def calculate(state):
        x, y, rest, result = a(state), b(state), with_(state), None
        if x is not None and y is not None:
            if not unsigned:
                x, y = (_signed(v, 64 if wide else 32) for v in (x, y))
            result = lower(state) if extended and x == y else compare(x, y)
        opposite = None if result is None else not result
        return _logic(operation, result, rest), _logic(operation, opposite, rest)

    return (first, second), calculate


def _build_sel(one, modifiers, operands, code):
    name, yes, no, condition = operands
    which, words = _predicate(condition), _words_of(modifiers)
    (names, yes), (_, no) = (_copied(name, source, words, code) for source in (yes, no))

    def calculate(state):
        chosen = which(state)
        return None if chosen is None else (yes if chosen else no)(state)

    return names, calculate


def _build_minmax(one, modifiers, operands, code):
    written, values, taken = _three(operands)
    if len(values) != 2 or not taken:
        return None
    sign = int if "U32" in modifiers else _signed

    def choose(x, y, least):
        return ((min if least else max)(x, y, key=sign),)

    return written[:1], _apply(choose, *(_value(v, code) for v in values), _predicate(taken[-1]))


def _build_special(one, modifiers, operands, code):
    name, source = operands[0], operands[-1]
    words = 2 if one.base == "CS2R" and "32" not in modifiers else 1

    def calculate(state):
        value = 0 if source == "SRZ" else state.special.get(source)
        return None if value is None else (value, 0)

    return _registers(name, words), calculate


def _register(written: Sequence[str]) -> str:
    return next((name for name in written if not _is_predicate(name)), "RZ")


def _build_load(one, modifiers, operands, code):
    words, size = _words_of(modifiers), min(one.bits // 8, 4)
    address = _address(one, code)

    def calculate(state):
        place = address(state)
        return None if place is None else [state.memory(place + 4 * i, size) for i in range(words)]

    return _registers(_register(_three(operands)[0]), words), calculate


def _build_copy(one, modifiers, operands, code):
    """A value of the first lane, taken over by all."""
    written, values, _ = _three(operands)
    if one.base == "SHFL" and ("IDX" not in modifiers or values[1] not in ("RZ", "0x0")):
        return written, _unknown
    source, flags = _value(values[0], code), [_is_predicate(name) for name in written]
    return written, lambda state: [flag or source(state) for flag in flags]


def _build_vote(one, modifiers, operands, code):
    """Lanes of a warp are taken to agree."""
    *written, source = operands
    if not _is_predicate(source):
        return None
    units = [1 if _is_predicate(name) else _MASK for name in written]
    return written, _apply(lambda value: [unit * value for unit in units], _predicate(source))


def _one(function: Callable, one: Instruction, code: Code, *operands: str) -> _Written:
    """One register from known words; ``function`` may give None."""
    return one.operands[:1], _apply(lambda *words: (function(*words),), *(_value(text, code) for text in operands))


def _build_prmt(one, modifiers, operands, code):
    def permute(x, selector, y):
        source, result = y << 32 | x, 0
        for byte in range(4):
            nibble = selector >> 4 * byte & 15
            value = source >> 8 * (nibble & 7) & 255
            if nibble & 8:
                value = 255 if value >> 7 else 0
            result |= value << 8 * byte
        return result

    return None if modifiers else _one(permute, one, code, *operands[1:])


def _build_sgxt(one, modifiers, operands, code):
    def extend(value, width):
        if not width:
            return None
        value &= (1 << width) - 1
        return value if "U32" in modifiers else _signed(value, width) & _MASK

    return _one(extend, one, code, *operands[1:3])


def _build_iabs(one, modifiers, operands, code):
    return _one(lambda value: abs(_signed(value)) & _MASK, one, code, operands[1])


def _build_flo(one, modifiers, operands, code):
    def find(value):
        last = value.bit_length() - 1
        return (31 - last if "SH" in modifiers and value else last) & _MASK

    return _one(find, one, code, operands[-1])


def _from_bits(word: int) -> float:
    return struct.unpack("<f", struct.pack("<I", word))[0]


def _to_bits(value: float, up: bool = False) -> int:
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    return word + 1 if up and _from_bits(word) < value else word


def _build_to_float(one, modifiers, operands, code):
    if any(m in ("F64", "F16", "BF16", "U8", "U16", "S8", "S16") for m in modifiers):
        return None
    bits, read = (64, _pair) if _is_wide(modifiers) else (32, _value)
    signed = not any(m.startswith("U") for m in modifiers)

    def convert(value):
        return (_to_bits(_signed(value, bits) if signed else value, "RP" in modifiers),)

    return operands[:1], _apply(convert, read(operands[1], code))


def _build_to_integer(one, modifiers, operands, code):
    if any(m in ("F64", "F16", "BF16") for m in modifiers) or "TRUNC" not in modifiers:
        return None

    def convert(word):
        value = _from_bits(word)
        return _split_words(int(value)) if math.isfinite(value) else None

    return _registers(operands[0], 1 + _is_wide(modifiers)), _apply(convert, _value(operands[1], code))


def _build_mufu(one, modifiers, operands, code):
    def invert(word):
        value = _from_bits(word)
        return _to_bits(1.0 / value) if 0.0 < abs(value) < math.inf else None

    return _one(invert, one, code, operands[1]) if modifiers == ["RCP"] else None


def _build_half(one, modifiers, operands, code):
    """Compilers load constants by ``HFMA2 R0, -RZ, RZ, a, b``: a and b are the halves of a word."""
    if len(operands) != 5 or operands[1].lstrip("-") != "RZ" or operands[2].lstrip("-") != "RZ":
        return None
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in operands[3:])
    except (ValueError, OverflowError):
        return None
    return operands[:1], lambda state: (high << 16 | low,)


def _build_p2r(one, modifiers, operands, code):
    bits = int(operands[3], 16)
    places = [i for i in range(7) if bits >> i & 1]
    flags = [_predicate(f"P{i}") for i in places]

    def pack(base, *flags):
        return (base & ~bits & _MASK | sum(flag << i for i, flag in zip(places, flags, strict=True)),)

    return None if modifiers else (operands[:1], _apply(pack, _value(operands[2], code), *flags))


_BUILDERS: dict[str, Callable[[Instruction, list[str], tuple[str, ...], Code], _Written | None]] = {
    "MOV": _build_mov,
    "IMAD": _build_imad,
    **dict.fromkeys(("IADD3", "IADD", "VIADD"), _build_iadd3),
    "LEA": _build_lea,
    "SHF": _build_shf,
    "LOP3": _build_lop3,
    "PLOP3": _build_plop3,
    "ISETP": _build_isetp,
    **dict.fromkeys(("SEL", "FSEL"), _build_sel),
    **dict.fromkeys(("IMNMX", "VIMNMX"), _build_minmax),
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _build_special),
    **dict.fromkeys(("LDC", "LDCU"), _build_mov),
    **dict.fromkeys(("LDG", "LD"), _build_load),
    **dict.fromkeys(("R2UR", "SHFL"), _build_copy),
    **dict.fromkeys(("VOTE", "VOTEU"), _build_vote),
    "PRMT": _build_prmt,
    "SGXT": _build_sgxt,
    "IABS": _build_iabs,
    "FLO": _build_flo,
    **dict.fromkeys(("I2F", "I2FP"), _build_to_float),
    "F2I": _build_to_integer,
    "MUFU": _build_mufu,
    "HFMA2": _build_half,
    "P2R": _build_p2r,
}

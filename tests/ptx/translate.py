"""Blocks of PTX to functions of Python.

A block becomes ``block(L, R, act)``: L the launch (launch.py), R the registers that outlive a block, act the lanes that
are here, None for all. What only one block uses is a local variable there and is freed after its last use, as a kernel
of thousands of registers would not fit into the processor's cache. Lanes that are not here compute as well, into the
void: registers that outlive the block keep their values, memory is not touched.
"""

from __future__ import annotations

import re
from types import CodeType

import numpy as np

from ptx import values, warp
from ptx.arithmetic import EXPRESSIONS, compare_upper
from ptx.faults import UnknownInstruction
from ptx.reader import SIZES, Block, Instruction, Kernel, address_of, registers_in
from ptx.values import DTYPES
from ptx.warp import REDUCTIONS

SPECIAL = {'tid.x', 'tid.y', 'tid.z', 'ctaid.x', 'ctaid.y', 'ctaid.z', 'nctaid.x', 'nctaid.y', 'nctaid.z', 'ntid.x',
           'laneid'}  # fmt: skip
NOTHING = {'membar', 'fence', 'pragma', 'prefetch', 'griddepcontrol', 'createpolicy'}  # about order and caches only
SPACES = {'global': 'memory', 'shared': 'shared'}  # attributes of a launch
CACHE = re.compile(r'nc|ca|cg|cs|cv|lu|wb|wt|evict_\w+|L[12]::\w+')
NAMESPACE = {name: value for name, value in vars(values).items() if not name.startswith('_')}
NAMESPACE.update(np=np)


class Program:
    """A kernel's blocks as functions, made when they are first needed.

    constants: Numbers in the code, by their bits and size.
    """

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.constants: dict[str, np.ndarray] = {}
        self.live_in, self.live_out = _liveness(kernel)
        self.global_granule, self.shared_granule = _granule(kernel, 'global'), _granule(kernel, 'shared')
        self._code: dict[tuple[int, bool], CodeType] = {}

    def source(self, index: int, full: bool) -> str:
        """The function of a block in Python, for all lanes or for some."""
        return _BlockWriter(self, index, full).write()

    def code(self, index: int, full: bool) -> CodeType:
        if (index, full) not in self._code:
            where = f'<{self.kernel.name}, block {index}>'
            self._code[index, full] = compile(self.source(index, full), where, 'exec')
        return self._code[index, full]

    def constant(self, bits: int, size: int) -> str:
        name = f'c{size}_{bits:x}'
        self.constants[name] = np.array([bits], f'u{size}')
        return name


def _granule(kernel: Kernel, space: str) -> int:
    """Bytes of the smallest access: the checks need to know no less."""
    access = [i for block in kernel.blocks for i in block.instructions if i.has(space) and i.kind in SIZES]
    sizes = [4 if i.opcode in warp.OPCODES else SIZES[i.kind] for i in access]
    return min(sizes, default=4)


def destinations(i: Instruction) -> list[str]:
    """Registers that an instruction writes."""
    if i.opcode in ('st', 'stmatrix', 'bra', 'ret', 'exit', 'bar', 'barrier', 'cp', *NOTHING) or not i.operands:
        return []
    return registers_in(i.operands[0])


def sources(i: Instruction) -> list[str]:
    """Registers that an instruction reads; the old value of its destinations where a guard may leave them."""
    own = i.operands if not destinations(i) else i.operands[1:]
    found = [name for operand in own for name in registers_in(operand)]
    if i.guard:
        found += [i.guard, *destinations(i)]
    return found


def _liveness(kernel: Kernel) -> tuple[list[set[str]], list[set[str]]]:
    """Registers that are needed at the start and at the end of each block."""
    uses, defines = [], []
    for block in kernel.blocks:
        used, defined = set(), set()
        for i in block.instructions:
            used |= {name for name in sources(i) if name in kernel.registers} - defined
            defined |= set(destinations(i))
        uses.append(used)
        defines.append(defined)
    live_in = [set(used) for used in uses]
    live_out: list[set[str]] = [set() for _ in uses]
    changed = True
    while changed:
        changed = False
        for index in reversed(range(len(uses))):
            block = kernel.blocks[index]
            follow = [block.target] if block.target is not None else []
            follow += [index + 1] if block.falls and index + 1 < len(uses) else []
            out = set().union(*(live_in[next_] for next_ in follow))
            if out != live_out[index]:
                live_out[index] = out
                live_in[index] = uses[index] | (out - defines[index])
                changed = True
    return live_in, live_out


class _BlockWriter:
    def __init__(self, program: Program, index: int, full: bool):
        self.program, self.index, self.full = program, index, full
        self.block: Block = program.kernel.blocks[index]
        self.registers = program.kernel.registers
        self.lines: list[str] = []

    def write(self) -> str:
        outliving = self.program.live_out[self.index]
        last_use = {}
        for number, i in enumerate(self.block.instructions):
            last_use.update(dict.fromkeys(sources(i) + destinations(i), number))
        known = set()
        written = set()
        for number, i in enumerate(self.block.instructions):
            for name in dict.fromkeys(sources(i)):
                if name not in known and name in self.registers:  # from another block, or never written: a NaN
                    self.lines.append(f"{name} = R['{name}']")
                    known.add(name)
            ends = i.opcode in ('bra', 'ret', 'exit', 'bar', 'barrier')
            if ends:
                self._keep(outliving & written)
            self._instruction(number, i)
            known |= set(destinations(i))
            written |= set(destinations(i))
            dead = [n for n in last_use if last_use[n] == number and n in known and n not in outliving]
            if dead and not ends:
                self.lines.append(f'del {", ".join(dead)}')
                known -= set(dead)
        if self.block.instructions[-1].opcode not in ('bra', 'ret', 'exit', 'bar', 'barrier'):
            self._keep(outliving & written)
        if self.block.instructions[-1].opcode not in ('bra', 'ret', 'exit'):
            self.lines.append(f'L.go({self.index + 1}, act)')
        return 'def block(L, R, I, act):\n    ' + '\n    '.join(self.lines)

    def _keep(self, names: set[str]) -> None:
        for name in sorted(names):
            self.lines.append(f"R['{name}'] = {name if self.full else f'''np.where(act, {name}, R['{name}'])'''}")
        if self.full:
            for name in sorted(self.program.live_in[self.index] - self.program.live_out[self.index]):
                self.lines.append(f"R.pop('{name}', None)")

    # operands
    def read(self, text: str, dtype: str) -> str:
        """An operand as an array of ``dtype``; of a wider register its low part."""
        size = 1 if dtype == '?' else int(dtype[1:])
        negated, text = text.startswith('!'), text.removeprefix('!')
        if text.startswith('%'):
            name = text[1:]
            if name in SPECIAL:
                return _as(f"L.special['{name}']", 4, dtype)
            if name not in self.registers:
                raise UnknownInstruction(f'special register {text}')
            kind = self.registers[name]
            if kind == 'pred':
                if dtype != '?':
                    raise UnknownInstruction(f'predicate {text} as {dtype}')
                return f'~{name}' if negated else name
            if SIZES[kind] < size:
                raise UnknownInstruction(f'{text} of {kind} as {dtype}')
            return _as(name, SIZES[kind], dtype)
        if dtype == '?':
            return f'np.array([{bool(int(text, 0)) != negated}])'
        if text == 'global_smem':
            return self.program.constant(0, size)
        number = re.fullmatch(r'(?:0[fd])([0-9a-fA-F]+)|(-?(?:0x[0-9a-fA-F]+|\d+))U?', text)
        if not number:
            raise UnknownInstruction(f'operand {text}')
        bits = int(number[1], 16) if number[1] else int(number[2], 0)
        constant = self.program.constant(bits & ((1 << 8 * size) - 1), size)
        return constant if dtype[0] == 'u' else f"{constant}.view('{dtype}')"

    def assign(self, operand: str, value: str, i: Instruction) -> None:
        """``value``: unsigned of the register's size, or a predicate."""
        name = operand.strip().lstrip('%')
        if name == '_':
            return
        if i.guard:
            value = f'np.where({self._guard(i)}, {value}, {name})'
        self.lines.append(f'{name} = {value}')

    def fitted(self, operand: str, value: str, kind: str) -> str:
        """``value`` of dtype ``kind`` as the bits of a register, which may be wider: extended by the type's sign."""
        register = self.registers.get(operand.strip().lstrip('%'))
        if register in (None, 'pred') or SIZES[register] == SIZES[kind]:
            return value if DTYPES[kind][0] == 'u' or register == 'pred' else f"{value}.view('u{SIZES[kind]}')"
        return f"{value}.view('{DTYPES[kind]}').astype('{DTYPES[kind][0]}{SIZES[register]}').view('u{SIZES[register]}')"

    def _guard(self, i: Instruction) -> str:
        return f'~{i.guard}' if i.negated else i.guard

    def mask(self, i: Instruction) -> str:
        if i.guard:
            return self._guard(i) if self.full else f'(act & {self._guard(i)})'
        return 'act'

    def address(self, operand: str, size: int) -> str:
        base, offset = address_of(operand)
        start = self.read(base, f'u{size}')
        return f'({start} + {self.program.constant(offset & ((1 << 8 * size) - 1), size)})' if offset else start

    # instructions
    def _instruction(self, number: int, i: Instruction) -> None:
        if i.opcode in NOTHING:
            return
        special = getattr(self, f'_{i.opcode}', None)
        if i.opcode in warp.OPCODES:
            warp.write(self, number, i)
        elif special is not None:
            special(number, i)
        elif i.opcode in EXPRESSIONS:
            self._compute(i)
        else:
            raise UnknownInstruction(f'PTX instruction {i.name} ({i.source})')

    def _compute(self, i: Instruction) -> None:
        def read(n: int, dtype: str) -> str:
            return self.read(i.operands[n], dtype)

        value = EXPRESSIONS[i.opcode](i, read)
        first, *second = i.operands[0].split('|')
        if i.opcode == 'cvt':
            value = self.fitted(first, value, i.modifiers[-2])
        elif i.opcode != 'setp' and i.kind != 'pred' and not i.has('wide') and not i.has('f32'):
            value = f"({value}).view('u{SIZES[i.kind]}')"
        elif i.has('f32') and i.opcode != 'setp':
            value = f"({value}).view('u4')"
        self.assign(first, value, i)
        for other in second:
            self.assign(other, compare_upper(i, read) or f'~{first.lstrip("%")}', i)

    def _mov(self, _: int, i: Instruction) -> None:
        to, of = i.operands
        size = 1 if i.kind == 'pred' else SIZES[i.kind]
        if of.startswith('{'):
            parts = [part.strip() for part in of.strip('{} ').split(',')]
            own, bits = size // len(parts), 8 * size // len(parts)
            values = (f"({self.read(part, f'u{own}')}.astype('u{size}') << np.uint{8 * size}({bits * n}))"
                      for n, part in enumerate(parts))  # fmt: skip
            self.assign(to, f'({" | ".join(values)})', i)
        elif to.startswith('{'):
            parts = [part.strip() for part in to.strip('{} ').split(',')]
            own, bits = size // len(parts), 8 * size // len(parts)
            self.lines.append(f'packed = {self.read(of, f"u{size}")}')
            for n, part in enumerate(parts):
                self.assign(part, f"(packed >> np.uint{8 * size}({bits * n})).astype('u{own}')", i)
        else:
            self.assign(to, self.read(of, '?' if i.kind == 'pred' else f'u{size}'), i)

    def _cvta(self, _: int, i: Instruction) -> None:
        self.assign(i.operands[0], self.read(i.operands[1], 'u8'), i)

    def _ld(self, number: int, i: Instruction) -> None:
        if i.has('param'):
            name, offset = address_of(i.operands[1])
            if offset:
                raise UnknownInstruction(f'{i.name} with an offset')
            value = self.fitted(i.operands[0], f"L.parameters['{name}']", i.kind)
            self.assign(i.operands[0], value, i)
            return
        space, width = _space(i)
        where = self.address(i.operands[1], 8 if space == 'global' else 4)
        self.lines.append(
            f'got = L.{SPACES[space]}.load(I[{number}], {where}, {SIZES[i.kind]}, {width}, {self.mask(i)})'
        )
        for n, register in enumerate(i.operands[0].strip('{} ').split(',')):
            self.assign(register, self.fitted(register, f'got[{n}]', i.kind), i)

    def _st(self, number: int, i: Instruction) -> None:
        space, _ = _space(i)
        where = self.address(i.operands[0], 8 if space == 'global' else 4)
        stored = [
            self.read(register.strip(), f'u{SIZES[i.kind]}') for register in i.operands[1].strip('{} ').split(',')
        ]
        self.lines.append(f'L.{SPACES[space]}.store(I[{number}], {where}, [{", ".join(stored)}], {self.mask(i)})')

    def _shfl(self, number: int, i: Instruction) -> None:
        value, lane, clamp = (self.read(operand, 'u4') for operand in i.operands[1:4])
        shuffled = f"L.shuffle(I[{number}], {value}, {lane}, {clamp}, '{i.modifiers[1]}', {self.mask(i)})"
        if '|' in i.operands[0] or i.modifiers[0] != 'sync':
            raise UnknownInstruction(i.name)
        self.assign(i.operands[0], shuffled, i)

    def _redux(self, number: int, i: Instruction) -> None:
        if i.modifiers[0] != 'sync' or i.modifiers[1] not in REDUCTIONS or len(i.modifiers) != 3 or i.guard:
            raise UnknownInstruction(i.name)
        value = self.read(i.operands[1], DTYPES[i.kind])
        self.assign(i.operands[0], f"L.reduce(I[{number}], {value}, {self.mask(i)}).view('u{SIZES[i.kind]}')", i)

    def _bar(self, number: int, i: Instruction) -> None:
        if i.modifiers == ('warp', 'sync'):
            self.lines.append(f'L.warp_barrier(I[{number}], {self.mask(i)})')
        elif i.modifiers == ('sync',) and len(i.operands) == 1 and not i.guard:
            self.lines.append(f'L.barrier(I[{number}], act)')
        else:
            raise UnknownInstruction(f'{i.name} {", ".join(i.operands)}')

    def _bra(self, _: int, i: Instruction) -> None:
        self.lines.append(f'L.branch({self.block.target}, {self.index + 1}, {self._guard(i)}, act)')

    def _ret(self, _: int, i: Instruction) -> None:
        end = len(self.program.kernel.blocks)
        self.lines.append(f'L.branch({end}, {self.index + 1}, {self._guard(i)}, act)')

    _exit = _ret


def _space(i: Instruction) -> tuple[str, int]:
    """Global or shared, and how many elements a lane moves at once."""
    width, space = 1, None
    for modifier in i.modifiers[:-1]:
        if modifier in ('global', 'shared'):
            space = modifier
        elif re.fullmatch(r'v\d', modifier):
            width = int(modifier[1:])
        elif not CACHE.fullmatch(modifier):
            raise UnknownInstruction(f'{i.name} (modifier {modifier})')
    if space is None or i.kind not in SIZES:
        raise UnknownInstruction(i.name)
    return space, width


def _as(name: str, size: int, dtype: str) -> str:
    if dtype == f'u{size}':
        return name
    wanted = int(dtype[1:])
    narrow = name if wanted == size else f"{name}.astype('u{wanted}')"
    return narrow if dtype[0] == 'u' else f"{narrow}.view('{dtype}')"

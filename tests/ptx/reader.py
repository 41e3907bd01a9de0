"""Reads PTX: text to blocks of instructions. Knows the grammar that Triton's compiler uses, not the opcodes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {
    'b8': 1, 'u8': 1, 's8': 1, 'b16': 2, 'u16': 2, 's16': 2, 'f16': 2, 'bf16': 2, 'b32': 4, 'u32': 4, 's32': 4,
    'f32': 4, 'f16x2': 4, 'bf16x2': 4, 'tf32': 4, 'b64': 8, 'u64': 8, 's64': 8, 'f64': 8, 'f32x2': 8,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode.modifiers operands;`` and where it comes from."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str | None = None  # register's name without %
    negated: bool = False  # the guard
    source: str = '?'

    @property
    def name(self) -> str:
        return '.'.join((self.opcode, *self.modifiers))

    @property
    def kind(self) -> str:
        """The type that it works on: its last modifier."""
        return self.modifiers[-1] if self.modifiers else ''

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers


@dataclass
class Block:
    """Instructions that are executed together: only the last one branches, leaves, or waits for other warps."""

    instructions: list[Instruction] = field(default_factory=list)
    target: int | None = None  # where the last one may branch to
    falls: bool = True  # whether the next block may follow


@dataclass
class Kernel:
    """An entry of a PTX module.

    parameters: Name and type, in order.
    registers: Type of each, 'pred' or as SIZES.
    threads: Of a program, as .reqntid says; 0 if it does not.
    """

    name: str
    parameters: list[tuple[str, str]]
    registers: dict[str, str]
    blocks: list[Block]
    threads: int


def read(ptx: str) -> Kernel:
    """The only entry of ``ptx``."""
    ptx = ptx.replace('::cta', '')  # shared::cta is what shared means
    entry = re.search(r'\.entry\s+(\w+)\((.*?)\)([^{]*)\{(.*?)\n\}', ptx + '\n}', re.S)
    if not entry:
        raise ValueError('no .entry in this PTX')
    name, head, directives, body = entry.groups()
    parameters = [
        (parameter, kind)
        for kind, parameter in re.findall(
            r'\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+(\w+)', head
        )
    ]
    threads = re.search(r'\.(?:reqntid|maxntid)\s+(\d+)', directives)
    registers = {}
    for kind, prefix, count in re.findall(r'\.reg \.(\w+)\s+%(\w+)<(\d+)>;', body):
        registers.update((f'{prefix}{i}', kind) for i in range(int(count)))
    for kind, names in re.findall(r'\.reg \.(\w+)\s+([%\w, ]+);', body):  # those of inline assembly
        registers.update((one.strip().lstrip('%'), kind) for one in names.split(','))
    return Kernel(name, parameters, registers, _blocks(body, _files(ptx)), int(threads[1]) if threads else 0)


def _files(ptx: str) -> dict[str, str]:
    return {number: path.rsplit('/', 1)[-1] for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}


def _blocks(body: str, files: dict[str, str]) -> list[Block]:
    blocks, labels, source = [Block()], {}, '?'
    for line in body.split('\n'):
        text, _, comment = line.partition('//')
        text = text.strip()
        location = re.match(r'\.loc\s+(\d+)\s+(\d+)', text)
        label = re.match(r'(\$\w+):$', text)
        if location:
            source = _source(location, comment, files)
        elif label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
        elif re.match(r'[@a-z]', text):
            for part in filter(None, (part.strip() for part in text.split(';'))):
                instruction = parse(part, source)
                blocks[-1].instructions.append(instruction)
                if instruction.opcode in ('bra', 'ret', 'exit', 'bar', 'barrier'):
                    blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    for block in blocks:
        last = block.instructions[-1]
        if last.opcode == 'bra':
            block.target = labels[last.operands[0]]
        block.falls = last.opcode not in ('bra', 'ret', 'exit') or last.guard is not None
    return blocks


def _source(location: re.Match, comment: str, files: dict[str, str]) -> str:
    """``file:line``, and where that was called: a comment says ``a.py:1:2 @[ b.py:3:4 ]``."""
    chain = re.findall(r'([\w.<>-]+):(\d+):\d+', comment)
    if not chain:
        chain = [(files.get(location[1], f'file {location[1]}'), location[2])]
    return ' called at '.join(f'{file}:{line}' for file, line in chain)


def parse(text: str, source: str = '?') -> Instruction:
    """One instruction without its semicolon."""
    guard = re.match(r'@(!?)%?(\w+)\s+(.*)', text, re.S)
    if guard:
        text = guard[3]
    name, _, rest = text.replace('\t', ' ').partition(' ')
    opcode, *modifiers = name.split('.')
    operands = tuple(part.strip() for part in re.split(r',(?![^{\[]*[}\]])', rest) if part.strip())
    return Instruction(
        opcode, tuple(modifiers), operands, guard[2] if guard else None, bool(guard and guard[1]), source
    )


def registers_in(operand: str) -> list[str]:
    """Names, without %, of what an operand mentions; special registers such as %tid.x are none."""
    return re.findall(r'%(\w+)(?![\w.])', operand)


def address_of(operand: str) -> tuple[str, int]:
    """Base and offset of ``[base + offset]``."""
    found = re.fullmatch(r'\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]', operand)
    if not found:
        raise ValueError(f'not an address: {operand}')
    return found[1], int(found[2] or 0)

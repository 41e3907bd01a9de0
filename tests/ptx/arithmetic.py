"""Instructions that compute: each as an expression of Python over arrays (values.py).

``EXPRESSIONS[opcode](instruction, read)`` gives the expression of the result, whose dtype is that of the instruction's
type or unsigned of its size. ``read(i, dtype)`` gives operand i.
"""

from __future__ import annotations

from collections.abc import Callable

from ptx.faults import UnknownInstruction
from ptx.reader import SIZES, Instruction
from ptx.values import DTYPES, ROUNDINGS

Read = Callable[[int, str], str]
EXPRESSIONS: dict[str, Callable[[Instruction, Read], str]] = {}
IGNORED_MODIFIERS = {'rn', 'full', 'approx'}  # the last two allow an error; here there is none
SYMBOLS = {'add': '+', 'sub': '-', 'mul': '*', 'and': '&', 'or': '|', 'xor': '^'}
COMPARISONS = {
    'eq': '==', 'ne': '!=', 'lt': '<', 'le': '<=', 'gt': '>', 'ge': '>=', 'lo': '<', 'ls': '<=', 'hi': '>', 'hs': '>=',
}  # fmt: skip
FUNCTIONS = {
    'sqrt': 'np.sqrt({})', 'rcp': '(1 / {})', 'rsqrt': '(1 / np.sqrt({}))', 'ex2': 'np.exp2({})', 'lg2': 'np.log2({})',
    'tanh': 'np.tanh({})', 'sin': 'np.sin({})', 'cos': 'np.cos({})',
}  # fmt: skip


def expression(*opcodes: str):
    def register(function):
        EXPRESSIONS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def is_float(kind: str) -> bool:
    return kind[0] == 'f' or kind.startswith('bf')


def unsigned(kind: str) -> str:
    return f'u{SIZES[kind]}'


def _only(instruction: Instruction, *known: str) -> None:
    """Refuse modifiers that nothing here knows: they may change the meaning."""
    unknown = set(instruction.modifiers[:-1]) - IGNORED_MODIFIERS - set(known)
    if unknown:
        raise UnknownInstruction(f'{instruction.name} (modifier {", ".join(sorted(unknown))})')


def float_expression(opcode: str, kind: str, values: list[str]) -> str:
    """Of add, sub, mul, fma on floats given as float32 or float64 expressions."""
    if opcode == 'fma':
        return f'{"fma64" if kind == "f64" else "fma"}({", ".join(values)})'
    return f'({values[0]} {SYMBOLS[opcode]} {values[1]})'


@expression('add', 'sub', 'mul', 'fma', 'mad')
def _arithmetic(i: Instruction, read: Read) -> str:
    count = 3 if i.opcode in ('fma', 'mad') else 2
    if i.kind in ('f32x2', 'f16x2', 'bf16x2'):
        return _packed(i, read, count)
    if i.kind in ('f16', 'bf16'):
        _only(i, 'f32')
        if i.has('f32'):  # sm_100: narrow operands, the last one and the result are float32
            values = [widened(i.kind, read(n, 'u2')) for n in range(1, count)] + [read(count, 'f4')]
            return float_expression(i.opcode, 'f32', values)
        return narrowed(
            i.kind, float_expression(i.opcode, 'f32', [widened(i.kind, read(n, 'u2')) for n in range(1, count + 1)])
        )
    if is_float(i.kind):
        _only(i)
        dtype = DTYPES[i.kind]
        opcode = 'fma' if i.opcode == 'mad' else i.opcode
        return float_expression(opcode, i.kind, [read(n, dtype) for n in range(1, count + 1)])
    return _integers(i, read)


def _integers(i: Instruction, read: Read) -> str:
    _only(i, 'lo', 'hi', 'wide')
    own = unsigned(i.kind)
    if i.opcode in ('add', 'sub'):
        return f'({read(1, own)} {SYMBOLS[i.opcode]} {read(2, own)})'
    size, addend_dtype = SIZES[i.kind], own
    if i.has('lo'):
        product = f'({read(1, own)} * {read(2, own)})'
    else:
        if size == 8:
            raise UnknownInstruction(i.name)
        sign, wide = DTYPES[i.kind][0], f'{DTYPES[i.kind][0]}{2 * size}'
        product = f"({read(1, f'{sign}{size}')}.astype('{wide}') * {read(2, f'{sign}{size}')}.astype('{wide}'))"
        if i.has('hi'):
            product = f"({product} >> {8 * size}).astype('{DTYPES[i.kind]}').view('{own}')"
        else:
            addend_dtype = f'u{2 * size}'
            product = f"{product}.view('{addend_dtype}')"
    return f'({product} + {read(3, addend_dtype)})' if i.opcode == 'mad' else product


def _packed(i: Instruction, read: Read, count: int) -> str:
    """Two values in one register."""
    _only(i)
    word = f'u{SIZES[i.kind]}'
    halves = []
    for half in ('low_half', 'high_half'):
        values = [f'{half}({read(n, word)})' for n in range(1, count + 1)]
        if i.kind == 'f32x2':
            halves.append(float_expression(i.opcode, 'f32', [f"{value}.view('f4')" for value in values]))
        else:
            kind = i.kind.removesuffix('x2')
            halves.append(narrowed(kind, float_expression(i.opcode, 'f32', [widened(kind, value) for value in values])))
    return f'pack({halves[0]}, {halves[1]})'


def widened(kind: str, bits: str) -> str:
    """float32 of 16 bits."""
    return f'float_of_bf16({bits})' if kind == 'bf16' else f"{bits}.view('f2').astype('f4')"


def narrowed(kind: str, value: str) -> str:
    """16 bits of float32. Where the exact result lies between two floats32, this rounds twice."""
    return f'bf16_of_float({value})' if kind == 'bf16' else f"({value}).astype('f2').view('u2')"


@expression('and', 'or', 'xor')
def _logic(i: Instruction, read: Read) -> str:
    dtype = DTYPES[i.kind]
    return f'({read(1, dtype)} {SYMBOLS[i.opcode]} {read(2, dtype)})'


@expression('not')
def _not(i: Instruction, read: Read) -> str:
    return f'~{read(1, DTYPES[i.kind])}'


@expression('neg', 'abs')
def _sign(i: Instruction, read: Read) -> str:
    if i.kind in ('f16', 'bf16', 'f16x2', 'bf16x2', 'f32', 'f64'):
        _only(i)
        bits, word = 8 * SIZES[i.kind], unsigned(i.kind)
        top = 0x80008000 if i.kind.endswith('x2') else 1 << (bits - 1)  # of the bits, as a NaN keeps its own
        mask = f'np.uint{bits}({top if i.opcode == "neg" else ~top & (1 << bits) - 1})'
        return f'({read(1, word)} {"^" if i.opcode == "neg" else "&"} {mask})'
    if is_float(i.kind):
        raise UnknownInstruction(i.name)
    return f'(-{read(1, unsigned(i.kind))})' if i.opcode == 'neg' else f'np.abs({read(1, DTYPES[i.kind])})'


@expression('shl', 'shr')
def _shift(i: Instruction, read: Read) -> str:
    dtype = DTYPES[i.kind] if i.opcode == 'shr' else unsigned(i.kind)
    return f'{"shift_left" if i.opcode == "shl" else "shift_right"}({read(1, dtype)}, {read(2, "u4")})'


@expression('bfe')
def _bit_field(i: Instruction, read: Read) -> str:
    if i.kind not in ('u32', 's32'):
        raise UnknownInstruction(i.name)
    name = 'bit_field' if i.kind == 'u32' else 'signed_bit_field'
    return f'{name}({read(1, "u4")}, {read(2, "u4")}, {read(3, "u4")})'


@expression('prmt')
def _permute(i: Instruction, read: Read) -> str:
    if i.modifiers != ('b32',):
        raise UnknownInstruction(i.name)
    return f'permute({read(1, "u4")}, {read(2, "u4")}, {read(3, "u4")})'


@expression('lop3')
def _any_function(i: Instruction, read: Read) -> str:
    return f'any_function({read(1, "u4")}, {read(2, "u4")}, {read(3, "u4")}, {int(i.operands[4], 0)})'


@expression('min', 'max')
def _extreme(i: Instruction, read: Read) -> str:
    _only(i, 'NaN')
    if i.kind not in DTYPES or i.kind in ('bf16', 'f16x2', 'bf16x2'):
        raise UnknownInstruction(i.name)
    # Of a number and a NaN, PTX takes the number unless .NaN is said.
    name = f'{i.opcode}imum' if i.has('NaN') or not is_float(i.kind) else f'f{i.opcode}'
    return f'np.{name}({read(1, DTYPES[i.kind])}, {read(2, DTYPES[i.kind])})'


@expression('div', 'rem')
def _division(i: Instruction, read: Read) -> str:
    _only(i)
    a, b = read(1, DTYPES[i.kind]), read(2, DTYPES[i.kind])
    if is_float(i.kind):
        if i.opcode == 'rem' or i.kind not in ('f32', 'f64'):
            raise UnknownInstruction(i.name)
        return f'({a} / {b})'
    return f'{"quotient" if i.opcode == "div" else "remainder"}({a}, {b})'


@expression(*FUNCTIONS)
def _function(i: Instruction, read: Read) -> str:
    _only(i, 'ftz')
    if i.kind not in ('f32', 'f64'):
        raise UnknownInstruction(i.name)
    return FUNCTIONS[i.opcode].format(read(1, DTYPES[i.kind]))


@expression('setp')
def _compare(i: Instruction, read: Read) -> str:
    """Of packed operands the lower halves, and :func:`compare_upper` of the upper ones, which must have a place."""
    if i.kind in ('f16x2', 'bf16x2'):
        if '|' not in i.operands[0]:
            raise UnknownInstruction(i.name)
        return _compared(i, i.kind.removesuffix('x2'), read, [_half(i, read, n, 0) for n in (1, 2)])
    if i.kind == 'f32x2':
        raise UnknownInstruction(i.name)
    dtype = DTYPES[i.kind]
    values = [widened('bf16', read(n, 'u2')) if i.kind == 'bf16' else read(n, dtype) for n in (1, 2)]
    return _compared(i, i.kind, read, values)


def compare_upper(i: Instruction, read: Read) -> str | None:
    """What the second place of a comparison gets: that of the upper halves; None if these are not packed."""
    if i.kind not in ('f16x2', 'bf16x2'):
        return None
    return _compared(i, i.kind.removesuffix('x2'), read, [_half(i, read, n, 1) for n in (1, 2)])


def _half(i: Instruction, read: Read, n: int, half: int) -> str:
    return widened(i.kind.removesuffix('x2'), f"({read(n, 'u4')} >> np.uint32({16 * half})).astype('u2')")


def _compared(i: Instruction, kind: str, read: Read, values: list[str]) -> str:
    comparison, (a, b) = i.modifiers[0], values
    unordered = f'(np.isnan({a}) | np.isnan({b}))'
    if comparison == 'nan':
        code = unordered
    elif comparison == 'num':
        code = f'~{unordered}'
    elif comparison in COMPARISONS:
        code = f'({a} {COMPARISONS[comparison]} {b})'
        if is_float(kind) and comparison == 'ne':
            code = f'({code} & ~{unordered})'
    elif comparison.removesuffix('u') in COMPARISONS and is_float(kind):
        code = f'(({a} {COMPARISONS[comparison[:-1]]} {b}) | {unordered})'
    else:
        raise UnknownInstruction(i.name)
    if i.modifiers[1] in SYMBOLS:
        code = f'({code} {SYMBOLS[i.modifiers[1]]} {read(3, "?")})'
    elif len(i.modifiers) > 2:
        raise UnknownInstruction(i.name)
    return code


@expression('selp')
def _select(i: Instruction, read: Read) -> str:
    dtype = unsigned(i.kind)
    return f'np.where({read(3, "?")}, {read(1, dtype)}, {read(2, dtype)})'


@expression('cvt')
def _convert(i: Instruction, read: Read) -> str:
    to, of = i.modifiers[-2:]
    modes = set(i.modifiers[:-2])
    if modes - {'rn', 'rna', *ROUNDINGS}:
        raise UnknownInstruction(i.name)
    if to in ('f16x2', 'bf16x2'):
        kind = to.removesuffix('x2')
        return f'pack({narrowed(kind, read(2, "f4"))}, {narrowed(kind, read(1, "f4"))})'
    if to == 'tf32':
        return f'tf32_of({read(1, "f4")})'
    value = widened('bf16', read(1, 'u2')) if of == 'bf16' else read(1, DTYPES[of])
    rounding = ROUNDINGS.keys() & modes
    if rounding:
        value = f'np.{ROUNDINGS[rounding.pop()].__name__}({value})'
    elif is_float(of) and not is_float(to):
        raise UnknownInstruction(i.name)
    if to == 'bf16':
        return f"bf16_of_float({value}.astype('f4'))"
    if is_float(of) and not is_float(to):
        return f"integer_of({value}, '{DTYPES[to]}')"
    return f"{value}.astype('{DTYPES[to]}')"

"""What the checks raise."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 6  # lanes that a message names


class UnknownInstruction(NotImplementedError):
    """PTX that this machine does not execute; the message names it."""


class Fault(RuntimeError):
    """Something that a GPU would not, or not reliably, do as the kernel means it.

    kind: What is wrong, one of the words below.
    kernel, source: The kernel, and the place in its source: ``file:line``, with the places of the calls around it.
    lanes: (program, thread) of the lanes concerned.
    address: Of the first of them, as text; None if it is not about memory.
    """

    OUTSIDE = 'outside of every tensor'
    MISALIGNED = 'misaligned'
    UNWRITTEN = 'shared memory that was never written'
    RACE = 'race of two warps without a barrier between them'
    PROGRAMS = 'two programs write different values to one place'
    READ_OF_WRITTEN = 'one program reads what another writes'
    AMBIGUOUS = 'lanes of one store write different values to one place'
    BARRIER = 'a barrier that not all lanes reach'
    WARP = 'an instruction of a whole warp that not all its lanes reach'
    SHUFFLE = 'a shuffle with a lane that is not there'
    ENDLESS = 'no end'
    ARGUMENTS = 'arguments that do not fit the kernel'

    def __init__(
        self,
        kind: str,
        kernel: str = '?',
        source: str = '?',
        lanes: Sequence[tuple[int, int]] = (),
        address: str | None = None,
        detail: str = '',
    ):
        self.kind, self.kernel, self.source, self.lanes, self.address = kind, kernel, source, list(lanes), address
        shown = ', '.join(f'{program}:{thread}' for program, thread in self.lanes[:SHOWN])
        more = f' and {len(self.lanes) - SHOWN} more' if len(self.lanes) > SHOWN else ''
        parts = [
            f'{kernel}, {source}: {kind}',
            detail,
            f'address {address}' if address else '',
            f'lanes (program:thread) {shown}{more}' if self.lanes else '',
        ]
        super().__init__('; '.join(part for part in parts if part))

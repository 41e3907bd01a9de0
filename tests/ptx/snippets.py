"""Runs PTX that a test writes: a few lines between what every kernel begins and ends with."""

from __future__ import annotations

import torch

from ptx.global_memory import GlobalMemory
from ptx.launch import Launch
from ptx.reader import read
from ptx.translate import Program

FRAME = """
.visible .entry snippet(.param .u64 .ptr .global .align 1 a, .param .u64 .ptr .global .align 1 b)
{{
	.reg .pred %p<20>;
	.reg .b16 %h<20>;
	.reg .b32 %r<40>;
	.reg .b64 %d<20>;
	.file	1 "/somewhere/snippet.py"
	.loc	1 1 1
	ld.param.b64 %d1, [a];
	ld.param.b64 %d2, [b];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	mul.wide.u32 %d3, %r1, 4;
	add.s64 %d4, %d1, %d3;
	add.s64 %d5, %d2, %d3;
{body}
	ret;
}}
"""


def execute(
    body: str,
    *tensors: torch.Tensor,
    programs: int = 1,
    threads: int = 32,
    shared_bytes: int = 0,
    counting: bool = False,
) -> Launch:
    """Run ``body`` on at most two tensors. Given are %d1 and %d2, their addresses, %r1 and %r2, the numbers of the
    thread and of the program, %d4 and %d5, the addresses of the thread's own 32-bit elements."""
    program = Program(read(FRAME.format(body=body)))
    ranges = [(t.data_ptr(), t.untyped_storage().nbytes(), name) for t, name in zip(tensors, 'ab')]
    memory = GlobalMemory(ranges, program.global_granule)
    addresses = [t.data_ptr() for t in tensors]
    launch = Launch(program, (programs, 1, 1), threads, shared_bytes, addresses, memory, counting=counting)
    launch.run()
    return launch

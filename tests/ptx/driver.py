"""The GPU that Triton and the package see: :func:`machine` compiles for a capability and executes on CPU tensors."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver as triton_driver

from bnet_mm.ops import dispatch
from bnet_mm.ops.triton import OPERATORS
from ptx.faults import Fault
from ptx.global_memory import GlobalMemory
from ptx.launch import Launch
from ptx.reader import read
from ptx.translate import Program

SHARED_LIMITS = {75: 65536, 80: 166912, 90: 232448, 100: 232448, 120: 101376}


@functools.lru_cache(maxsize=512)
def translated(ptx: str) -> Program:
    return Program(read(ptx))


@dataclass
class Executed:
    """One launch that was executed."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    stream: int
    device: int
    counts: Counter
    compiled: CompiledKernel


@dataclass
class Machine:
    """What :func:`machine` gives: the launches so far, and how they are run.

    capability: 75, 80, ... as in sm_75; the number of the current device as well, which keeps Triton's caches apart.
    stream: What Triton is told is the current stream.
    only: Says for a kernel's name and its number of programs which of them run; None is all.
    counting: Whether accesses are counted as well, which takes time.
    rewrite: Changes the PTX before it is read: for deliberate faults.
    """

    capability: int
    counting: bool = False
    only: Callable[[str, int], Sequence[int] | None] | None = None
    rewrite: Callable[[str], str] | None = None
    stream: int = 0
    launches: list[Executed] = field(default_factory=list)

    def program(self, compiled: CompiledKernel) -> Program:
        text = compiled.asm['ptx']
        return translated(self.rewrite(text) if self.rewrite else text)

    def execute(self, compiled: CompiledKernel, grid: tuple[int, int, int], stream: int, arguments: tuple) -> None:
        """Run a kernel with the arguments of its Python function."""
        metadata, program = compiled.metadata, self.program(compiled)
        values, tensors = [], []
        for (name, kind), argument in zip(compiled.src.signature.items(), arguments):
            if kind == 'constexpr':
                continue
            if isinstance(argument, torch.Tensor):
                tensors.append((name, argument))
                argument = argument.data_ptr()
            elif kind.startswith('*') and argument:  # an address: of some tensor that is alive
                tensors.append((name, _tensor_at(int(argument), program.kernel.name)))
            values.append(argument)
        ranges = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes(), name) for name, t in tensors]
        memory = GlobalMemory(_merged(ranges), program.global_granule)
        number = grid[0] * grid[1] * grid[2]
        launch = Launch(
            program, grid, 32 * metadata.num_warps, metadata.shared, values, memory,
            self.only(metadata.name, number) if self.only else None, counting=self.counting,
        )  # fmt: skip
        counts = launch.run()
        done = Executed(metadata.name, grid, launch.threads, stream, self.capability, counts, compiled)
        self.launches.append(done)

    def total(self, name: str = '') -> Counter:
        """Counts of the launches of kernels whose names contain ``name``."""
        return sum((launch.counts for launch in self.launches if name in launch.kernel), Counter())


def _merged(ranges: list[tuple[int, int, str]]) -> list[tuple[int, int, str]]:
    """One range for each storage, named for all arguments that share it."""
    names: dict[tuple[int, int], list[str]] = {}
    for start, length, name in ranges:
        names.setdefault((start, length), []).append(name)
    return [(start, length, '/'.join(own)) for (start, length), own in names.items()]


def _tensor_at(address: int, kernel: str) -> torch.Tensor:
    for item in gc.get_objects():
        # Other tests may have left tensors alive that have no memory of their own, such as sparse ones.
        is_plain = type(item) in (torch.Tensor, torch.nn.Parameter) and item.device.type == 'cpu'
        if is_plain and torch._C._has_storage(item) and item.numel():
            storage = item.untyped_storage()
            if 0 <= address - storage.data_ptr() < storage.nbytes():
                return item
    raise Fault(Fault.OUTSIDE, kernel, detail='an argument is the address of no tensor', address=f'{address:#x}')


class _Launcher:
    """What Triton calls to launch: every way past its JIT ends here too."""

    def __init__(self, source, metadata):
        self.compiled: CompiledKernel | None = None  # _handles sets it

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        driver = triton_driver.active
        driver.machine.execute(self.compiled, (x, y, z), stream, arguments)


class _Utilities:
    def __init__(self, capability: int):
        self.shared = SHARED_LIMITS[capability]

    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def get_device_properties(self, device):
        return dict(max_shared_mem=self.shared, multiprocessor_count=132, max_num_regs=65536, warpSize=32,
                    sm_clock_rate=1_755_000, mem_clock_rate=2_619_000, mem_bus_width=5120)  # fmt: skip


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, machine: Machine):
        self.machine, self.utils = machine, _Utilities(machine.capability)

    def get_current_target(self):
        return GPUTarget('cuda', self.machine.capability, 32)

    def get_current_device(self):
        return self.machine.capability

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return self.machine.stream

    def get_device_capability(self, device=0):
        return divmod(self.machine.capability, 10)

    def get_active_torch_device(self):
        return torch.device('cpu')

    def get_device_interface(self):
        return torch.cuda


@contextlib.contextmanager
def machine(capability: int = 90, counting: bool = False, fresh_is_nan: bool = True) -> Iterator[Machine]:
    """Within it, the package runs its Triton kernels, and other kernels of Triton run as well, on CPU tensors.

    Args:
        capability: Of the GPU for which kernels are compiled: 75, 80, 90, 100 or 120.
        counting: Whether sectors and conflicts are counted, which takes time.
        fresh_is_nan: Whether new tensors start as NaN. False for tensors larger than this machine's memory.
    """
    one = Machine(capability, counting)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_active_driver(_Driver(one)))
        stack.enter_context(_package_on_the_cpu())
        if fresh_is_nan:
            stack.enter_context(_fresh_tensors_of_nan())
        yield one


@contextlib.contextmanager
def _active_driver(driver: _Driver) -> Iterator[None]:
    previous, handles = triton_driver._active, CompiledKernel._init_handles

    def init_handles(self):
        handles(self)
        if isinstance(self._run, _Launcher):
            self._run.compiled = self

    triton_driver.set_active(driver)
    CompiledKernel._init_handles = init_handles
    try:
        yield
    finally:
        CompiledKernel._init_handles = handles
        triton_driver._active = previous


@contextlib.contextmanager
def _package_on_the_cpu() -> Iterator[None]:
    """The package's table of backends with Triton's only, for CPU tensors; operators as they were afterwards."""
    backends = dict(dispatch.BACKENDS)
    triton = backends['triton']._replace(device='cpu', load=lambda: 'executed PTX', check=None)
    library = torch.library.Library('bnet_mm', 'IMPL')
    try:
        for function in OPERATORS:
            library.impl(function.__name__, function, 'CPU', allow_override=True)
        dispatch.BACKENDS.clear()
        dispatch.BACKENDS['triton'] = triton
        dispatch.forget()
        yield
    finally:
        library._destroy()
        dispatch.BACKENDS.clear()
        dispatch.BACKENDS.update(backends)
        dispatch.forget()


@contextlib.contextmanager
def _fresh_tensors_of_nan() -> Iterator[None]:
    fills = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fills

"""Executes the PTX that Triton's compiler writes for a GPU, on CPU tensors, and complains as a GPU's tools would.

    with machine(90):                     # a GPU of compute capability 9.0
        y = BNET(64)(x)                   # ordinary calls; what they launch is executed

reader.py: PTX text to instructions; translate.py with arithmetic.py and warp.py: instructions to numpy; launch.py: the
lanes of a launch, divergence and barriers; global_memory.py, shared_memory.py: memory and its checks; faults.py: what a
check raises; counts.py: what was executed; driver.py: the GPU that Triton and the package see.
"""

"""Runs the PTX that nvcc makes of the CUDA kernels, on the CPU, without a GPU.

The SIMT executor (csrc/simt) runs the kernels' C++ and replaces each instruction of the hardware by a function of its own.
Here nvcc compiles the kernels, and the text of its PTX runs, inline assembly included. Nothing is shared with the executor.
Each rule comes from the PTX manual, and kernels of CUTLASS, which are right on hardware, run here too (calibrate/).

    build.py       nvcc's objects, the launchers of csrc/cuda and runtime.cpp as one Python module
    runtime.cpp    stands in for the CUDA runtime: each launch is handed to Python
    launch.py      takes a launch: PTX of the kernel, parameters, grid
    parse.py       PTX text to instructions
    grid.py        blocks, warps and their threads, in a random order
    warp.py        the threads of a warp: divergence, predicates
    arithmetic.py  conversion.py  memory.py  copies.py  barriers.py  products.py     the instructions
    matrix.py  wgmma.py  tensor_map.py     fragments, operands in shared memory, bulk copies, as functions of numbers

It cannot test speed, nor all that a GPU's memory model allows. Copies and wgmma run at a random moment between their issue and
the wait for them, warps and blocks in a random order; a store is visible to all at once.
"""

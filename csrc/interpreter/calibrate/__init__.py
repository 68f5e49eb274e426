"""Programs that calibrate the interpreter: GEMMs of CUTLASS, and small kernels through CuTe and CUDA C++.

CUTLASS is right on hardware. If its kernels give right results here, the interpreter reads their instructions as the hardware
does. A test runs each function of these programs (python_tests/interpreter/test_cutlass.py).

No code of CUTLASS is here. The programs include its headers, from the package nvidia-cutlass, as a user of the library does.

    sm80_gemm.cu   device::Gemm: cp.async, ldmatrix, mma.sync, a semaphore between blocks
    sm90_gemm.cu   collective builders: bulk copies, mbarriers, wgmma, warp specialisation, clusters, early launch
    cute_sm90.cu   CuTe: wgmma of each width, type and operand layout that the project's kernels use
    cuda_sm90.cu   CUDA C++ and its libraries: other blocks' shared memory, atomics, named barriers, shuffles
    build.py       finds the headers, compiles and links
    forms.py       which instruction forms of the project's kernels occur in these programs
"""

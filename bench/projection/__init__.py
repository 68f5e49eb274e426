"""Models the speed of each CUDA kernel on known GPUs, from its machine code and the executor's counts; needs no GPU."""

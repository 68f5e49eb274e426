"""How fast each CUDA kernel would be on known GPUs, from its machine code and the executor's counts: a model, no GPU needed."""

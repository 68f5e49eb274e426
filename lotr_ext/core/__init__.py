"""The core: how one call of an adapted layer is computed, forward and backward.

    dispatch         chooses the autograd nodes of a call, or the PyTorch fallback
    request          which layers use other cores, or none, inside a context
    strategy         the order of the base product and the adapter's product
    factor_cache     a cache per factor, which all calls with that factor share
    nodes            the autograd Functions
    grouped          the base product of a mixture of experts
    fallback         the layer in PyTorch operations
    kernel_support   whether the kernels can run on a device
    call             the arguments of a layer's call
    operators        loads the compiled library; output shapes for torch.compile
    _torch_private   every private name of torch that the core uses

A module imports only from modules below it in this list. Users need none of them.
"""

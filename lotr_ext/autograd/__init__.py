"""The autograd nodes of an adapted layer, the gradient that layers share and the input that siblings share."""

"""The autograd nodes of an adapted layer, and what layers share. Where to look first:

call.py              what a call runs, and running it
  one_node.py          LoTRFunction: a layer as one node
  two_nodes.py         LoTRShrink, LoTRExpand: siblings share u = x A
  row_nodes.py         LoTRExpandRows: a core for each row or token
  traced.py            the same under torch.compile
sharing.py           one u for siblings and the pending gradients of u and x; the Call
shared_gradient.py   one sum for the gradient of a factor
magnitude.py         a trained length of each row of an adapted weight
tensor_parallel.py   layers on local tensors, and one sum of their gradients over the processes
bank.py              the forward scope: all layers' folded factors at once
"""

"""The autograd nodes of an adapted layer, and the state that layers share. The files:

call.py              plans and runs a call
  one_node.py          LoTRFunction: a layer as one node
  two_nodes.py         LoTRShrink, LoTRExpand: siblings share u = x A
  row_nodes.py         LoTRExpandRows: the same with a core for each row or token
  traced.py            the same under torch.compile
sharing.py           siblings' shared u, and the pending gradients of u and x; the Call
shared_gradient.py   one sum for a factor's gradient
magnitude.py         a trained length of each row of an adapted weight
tensor_parallel.py   layers on local tensors, and the sum of their gradients over processes
bank.py              the forward scope: all layers' folded factors at once
"""

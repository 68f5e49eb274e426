"""Adapted layers of any model. The files:

layer.py           LoTRLayer: the forward of every adapted layer, merging, state
  linear.py          LoTRLinear, LoTRConv1D;  wrapped.py: LoTRWrapped;  experts.py, hosted.py: experts of mixtures
  factors.py         A and B;  core.py, cores.py: G, and cores made of fewer numbers
  magnitude.py       a trained length for each row of W
  settings.py        scaling and dropout;  checks.py: of arguments
  init.py            initial values of factors and cores;  tucker.py: Tucker-2;  gradient.py: from gradients of weights
functional.py      lotr_linear, explain
request.py         the contexts `disabled` and `mixed`;  mixture.py: a core for each row
merging.py         merging into weights;  quantized.py: bases with a quantised weight;  packed.py: quantised experts
sums.py            weighted sums of adapters' tensors
tuning.py          tune;  untouched.py: passes over a model that change nothing in it;  progress.py: a progress bar
parallel_styles.py the hooks and styles of tensor parallelism around a layer's forward
sharded.py         FSDP, ZeRO-3, tensor parallelism;  placement.py: accelerate's offloading;  parametrized.py: computed
parts
"""

"""Adapted layers, of any model. Where to look first:

layer.py           LoTRLayer: the forward of every adapted layer, merging, state
  linear.py          LoTRLinear, LoTRConv1D, LoTRWrapped;  experts.py, hosted.py: experts of mixtures
  factors.py         A and B;  core.py, cores.py: G, and cores made of fewer numbers
  magnitude.py       a trained length of each row
  settings.py        scaling and dropout;  checks.py: of arguments
  init.py            how factors and cores start;  tucker.py: Tucker-2;  gradient.py: from gradients of weights
functional.py      lotr_linear, explain
request.py         the state of `disabled` and `mixed`;  mixture.py: a core for each row
merging.py         what merging writes;  quantized.py: bases with a quantised weight
tuning.py          tune
parallel_styles.py what tensor parallelism puts around a layer's forward
sharded.py         FSDP, ZeRO-3, tensor parallelism;  placement.py: accelerate's offloading;  parametrized.py: computed
parts
"""

"""Adapters of whole models. The files:

apply.py             apply_lotr: puts an adapter into a model; merging.py: merge and unload take it out
  config.py            LoTRConfig
  targets.py           which layers; effect.py, heads.py, experts.py, sizes.py, names.py: what it asks
  shared_factors.py    A and B of each group; core_forms.py: cores made of fewer numbers
  starts.py            init "svd" and "gradient"; gradient.py: init_from_gradient
  scope.py             the hooks of the forward scope; batching.py: refuses what they do not reach
adapters.py          several adapters by name, and `mixed`; parked.py: the adapters that are not active
tasks.py             TaskBank: the cores of many tasks; task_optimizer.py: an optimizer with a state for each
combine.py           weighted sums of adapters; activated.py: a task for each token
saving.py            save_adapter;  loading.py, loading_checks.py: load_adapter
  adapter_files.py     the format of a folder; saved.py: which tensors of a model it contains
  peft_files.py        folders that PEFT wrote; fingerprint.py: identifies the base model
  save_hook.py         save_pretrained of an adapted model; replaced.py: how; pretrained.py: from_pretrained
  sentence_transformers.py  the same for a SentenceTransformer; holders.py: names this class; stages.py: the model inside
pipeline.py          PipelineStages: the stages of one process
per_example.py       gradients of each example; influence.py: which examples matter; evolution.py: training by forwards alone
adapted.py           the adapted layers of a model; summary.py, groups.py: counts, groups for an optimizer
first_step.py        warns about an optimizer without the adapter

There are no packages inside. A package for files, or one for starts, would import `apply` and be imported by it: loading and
gradient stand above apply.py, saving, save_hook, starts and shared_factors below it.

Named adapters and tasks have separate tables of cores, because a named adapter may have factors of its own, and the state_dict
of a saved model names both. `mixed` and TaskBank give the layers the same record, `layers.mixture.Mixture`.
"""

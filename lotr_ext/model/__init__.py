"""Adapters of whole models. Where to look first:

apply.py           apply_lotr, merge, unload: an adapter into a model and out of it
  config.py          LoTRConfig
  targets.py         which layers: names, exclusions, what cannot be adapted (heads, readers, experts, sizes)
  shared_factors.py  A and B of each group; core_forms.py: what makes the cores
  starts.py          init "svd" and "gradient"; gradient.py: init_from_gradient
  scope.py           the hooks of the forward scope
adapters.py        several adapters by name, and `mixed`; parked.py: where those are that are not active
tasks.py           TaskBank: the cores of many tasks
saving.py          save_adapter;  loading.py: load_adapter
  adapter_files.py   the format of a folder; saved.py: which tensors of a model belong into it
  peft_files.py      folders that PEFT wrote; fingerprint.py: of which base model
  save_hook.py       save_pretrained of an adapted model; pretrained.py: from_pretrained
  sentence_transformers.py  the same for a SentenceTransformer; stages.py: the model inside
adapted.py         the adapted layers of a model; summary.py, groups.py: counts, groups for an optimizer
first_step.py      a warning of an optimizer without the adapter
"""

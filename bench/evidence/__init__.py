"""What LoTR is worth: held-out loss against trained parameters, beside LoRA and full fine-tuning, with intervals."""

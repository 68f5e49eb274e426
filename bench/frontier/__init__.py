"""Accuracy against trained parameters: LoTR, its relatives, LoRA and VeRA on the demo's task."""

"""Adapters in servers: relative throughput, memory per task, and the time to push a new version."""

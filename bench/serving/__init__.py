"""Adapters in servers: throughput kept, memory a task, and how long a new version takes."""

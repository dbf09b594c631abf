"""The engine: one training loop, one inference loop, and what they are made of. It knows no task by name."""

"""The verbs, one a file: wiring only."""

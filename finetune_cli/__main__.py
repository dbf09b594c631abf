"""``python -m finetune_cli VERB …`` is the same as ``ftune VERB …``."""

from finetune_cli.cli import entry

if __name__ == "__main__":
    entry()

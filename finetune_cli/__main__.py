"""``python -m finetune_cli VERB …`` is the same as ``ftune VERB …``."""

import os
import sys

if __name__ == "__main__":
    here = os.getcwd()
    if not os.path.isdir(os.path.join(here, "finetune_cli")):  # -m puts it first: what lies where the user stands would be imported
        sys.path[:] = [place for place in sys.path if place not in ("", here)]

    from finetune_cli.cli import entry

    entry()

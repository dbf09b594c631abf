"""Several processes that work at one run: what they say to each other, how they are started, and how a lost one is noticed.

Rank 0 leads: it is the process that the user started, and the only one that reads data, writes files and speaks. The others follow: they
get what the leader prepared, compute their share of every batch, and end with it. ``Alone`` says the same words for one process.
"""

from finetune_cli.world.alone import Alone, Stopping
from finetune_cli.world.crew import Crew, Place, follow_if_outside, lead_outside, outside
from finetune_cli.world.group import Group

__all__ = ["Alone", "Crew", "Group", "Place", "Stopping", "follow_if_outside", "lead_outside", "outside"]

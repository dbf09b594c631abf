"""How a command becomes several processes, and what those do that do not lead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from finetune_cli import console
from finetune_cli.config import EvalConfig, PredictConfig
from finetune_cli.device import DevicePlan
from finetune_cli.engine.inference import Labelled, infer
from finetune_cli.engine.opened import Opened, open_model
from finetune_cli.engine.signals import StopFlag
from finetune_cli.world import Alone, Crew, Group, lead_outside, outside


def gathered(plan: DevicePlan, stop: StopFlag, module: str) -> Alone:
    """The world that a plan asks for, with this process leading; the others call ``module.follow``."""
    if plan.processes == 1:
        return Alone(stop)
    place = outside()
    with console.working(f"meeting {plan.processes - 1} other processes" if place else f"starting {plan.processes} processes"):
        return lead_outside(place, stop) if place else Crew(plan.processes, module).lead(stop)


def opened_by(config: EvalConfig | PredictConfig, *, local_rank: int = 0) -> Opened:
    """The model that a command names."""
    return open_model(
        config.ckpt,
        root=config.run.root,
        task=config.task,
        data=config.data,
        where=config.device,
        offline=config.offline,
        local_rank=local_rank,
    )


@contextmanager
def worked_at(config: EvalConfig | PredictConfig, stop: StopFlag) -> Iterator[tuple[Opened, Alone]]:
    """The model that a command names, in as many processes as its plan says, which this one leads.

    In the block ``world.share(Labelled)`` comes before each ``infer``. Where the block ends well, the others end too.
    """
    opened = opened_by(config)
    world = gathered(opened.device, stop, __name__)
    try:
        opened.device.apply()
        world.share(config)
        world.on(opened.device.device)
        yield opened, world
        if world.size > 1:
            world.share(None)
            world.close()
    finally:
        world.abandon()


def follow(world: Group) -> None:
    """What a process of ``eval`` and ``predict`` does that does not lead: its share of everything it is given, until nothing is left."""
    opened = opened_by(world.share(cast(EvalConfig, None)), local_rank=world.local_rank)
    world.on(opened.device.device)
    while (data := world.share(cast(Labelled | None, None))) is not None:
        infer(
            opened.task,
            opened.model,
            data,
            layout=opened.layout,
            plan=opened.plan,
            device=opened.device,
            check=world.pause,
            world=world,
        )
    world.close()

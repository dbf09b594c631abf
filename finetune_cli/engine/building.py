"""From what was prepared to what is trained: the model with its head and adapter, the plan of its batches, and all of it put together."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from finetune_cli import adapters, batching, checkpoint, console, models, packing
from finetune_cli.adapters import Adapter
from finetune_cli.batching import BatchPlan
from finetune_cli.checkpoint import Knowledge, Saver
from finetune_cli.config import Pooling, TrainConfig
from finetune_cli.engine import environment, resume
from finetune_cli.engine.optimizer import warmup_steps
from finetune_cli.engine.prepared import Prepared
from finetune_cli.engine.profile import Profile
from finetune_cli.engine.resume import Resumed
from finetune_cli.engine.timetable import Timetable
from finetune_cli.engine.trainer import Trainer
from finetune_cli.packing import Packed
from finetune_cli.run import Run
from finetune_cli.world import Alone


def model(config: TrainConfig, p: Prepared, start: Path | None, *, base_dir: Path) -> tuple[nn.Module, Adapter | None]:
    """The model with this run's head, and its adapter if any: from a checkpoint, from pretrained weights, or from scratch.

    ``base_dir``: where a base without a name will be kept.
    """
    where = p.device.device.type
    if start:
        network, adapter = checkpoint.load_model(start, p.task, offline=config.offline, device=where)
    else:
        network, new, drawn = _fresh(config, p, where)
        changed = config.model.pooling != Pooling.own or drawn != new
        source = None if changed else p.source  # a base that is no longer what its name says is kept in the run
        adapter = adapters.attach(network, config.model, source=source, new=new, kept=base_dir, seed=config.train.seed)
    if config.model.gradient_checkpointing:
        models.checkpoint_gradients(network)
    return network, adapter


def _fresh(config: TrainConfig, p: Prepared, where: str) -> tuple[nn.Module, list[str], list[str]]:
    """A model before its first step, the names of what its source did not have, and of those what stays as the seed drew it."""
    if p.source is None:
        model, new = models.build(config.model, p.task, p.tokenizer, seed=config.train.seed), list[str]()
    else:
        held = adapters.loading(config.model, p.task, p.model_config, where)
        with console.working("loading the model"):
            model, new = models.load(
                p.source, config.model, p.task, p.model_config, seed=config.train.seed, offline=config.offline, held=held
            )
    known = p.task.prepare(model)
    drawn = [name for name in new if name not in known]
    if known:
        console.say(f"set by the task before the first step: {', '.join(known)}")
    if p.source is not None:
        console.say(f"new in the model, drawn from the seed: {', '.join(drawn) or 'nothing'}")
    random = drawn if p.source is not None else ["all weights"]
    if config.train.steps == 0 and random and p.task.fitting_head() is None:
        console.warn(f"train.steps=0 trains nothing, and this stays random: {', '.join(random)}; the answers mean nothing")
    return model, new, drawn


def batches(config: TrainConfig, p: Prepared, network: Any, *, packed: bool, layout: str, saved_plan: dict[str, Any] | None) -> BatchPlan:
    """How the rows pass through the device; a run that goes on keeps its own plan."""
    if saved_plan and saved_plan["packed"] != packed:
        console.warn(f"the run was packed and goes on {layout}: the same to rounding, not to the bit")
    return batching.find(
        config.train.batch_size,
        config.train.order,
        p.data["train"].examples.lengths(),
        memory_bytes=min(environment.free_memory(p.device.device), (config.device.memory_budget or math.inf) * 2**30),
        bytes_per_token=models.activation_bytes(network.config, kept=not config.model.gradient_checkpointing),
        whole=p.task.rows_interact,
        packed=packed,
        layout=layout,
        saved=saved_plan,
    )


def assembled(config: TrainConfig, p: Prepared, directory: Run, resumed: Resumed | None, world: Alone, *, config_yaml: str = "") -> Trainer:
    """Model, plan and run directory put together, in every process alike; nothing is written yet. Who saves gives ``config_yaml``."""
    train, start = p.data["train"], resumed.checkpoint if resumed else None
    timetable = Timetable.of(config.train, len(train.examples))
    warmup_steps(config.optimizer, timetable.total)  # a user's error, so before the model is loaded
    p.device.apply()
    world.on(p.device.device)
    network, adapter = model(config, p, start, base_dir=directory.base_dir)
    network = network if adapter and adapter.base.is_quantised else network.to(p.device.device)
    world.same(network)
    state = checkpoint.load_state(start) if start else None
    begun = p.begun
    saved_plan = state["plan"] if state else begun["batches"] if begun else None
    layout, layout_told = packing.layout(
        network,
        pad_id=p.tokenizer.pad_token_id or 0,
        limit=p.max_length,
        device=p.device,
        saved=saved_plan["packed"] if saved_plan else None,
    )
    p.task.adjust(network)
    models.keep_table_gradients(network)
    if p.device.compiled:
        packing.compile_layers(network)
    plan = world.share(batches(config, p, network, packed=isinstance(layout, Packed), layout=layout_told, saved_plan=saved_plan))
    plans = {"device": p.device.saved(), "batches": plan.saved()}
    if begun:
        plans = {name: resume.in_its_words(now, begun[name]) for name, now in plans.items()}
    trainer = Trainer(
        task=p.task,
        model=network,
        train=train,
        validation=p.data.get("validation"),
        config=config.train,
        optimizer=config.optimizer,
        timetable=timetable,
        plan=plan,
        device=p.device,
        layout=layout,
        run=directory,
        saver=Saver(directory.store, _known(config, p, plans), p.tokenizer, config_yaml, adapter),
        world=world,
        profile=Profile(directory, p.device, wanted=config.device.profile and world.leads),
    )
    if state and start:
        try:
            trainer.restore(state)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise checkpoint.unfit(start, error) from error
    return trainer


def _known(config: TrainConfig, p: Prepared, plans: dict[str, Any]) -> Knowledge:
    """What eval and predict must know beside the weights."""
    return Knowledge(
        task=p.task.name, facts=p.task.facts, columns=p.splits.roles.options, max_length=p.max_length, seed=config.train.seed, plan=plans
    )

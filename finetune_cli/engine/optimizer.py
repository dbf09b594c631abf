"""Parameter groups, optimizers, learning-rate schedules, and the update itself with clipping and its guard against non-finite gradients."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor, nn

from finetune_cli.config.choices import OptimizerName, Schedule
from finetune_cli.config.schema import OptimizerConfig
from finetune_cli.errors import Diverged, UserError

FUSED = (OptimizerName.adamw, OptimizerName.adam, OptimizerName.sgd, OptimizerName.adagrad)
"""torch fuses these: clipping and the withheld update happen inside one pass over the weights."""
MAX_SKIPS = 20
"""fp16 steps that may be skipped in a row before the run counts as diverged."""


def warmup_steps(config: OptimizerConfig, total: int) -> int:
    """Steps of linear warmup: a count from 1 on, a fraction below."""
    steps = int(config.warmup) if config.warmup >= 1 else math.ceil(config.warmup * total)
    if steps > total:
        raise UserError(
            f"{steps} steps of warmup are more than the {total} steps of the run",
            where="optimizer.warmup",
            fix=f"at most {total}, or a fraction below 1",
        )
    return steps


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """Learning rate of update ``step`` (from 0) of ``total``: a pure function, so there is no schedule state to save."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == Schedule.constant:
        return config.lr
    if config.schedule == Schedule.inverse_sqrt:
        return config.lr * math.sqrt(max(1, warmup) / max(1, warmup, step + 1))
    done = (step - warmup) / max(1, total - warmup)
    shape = {
        Schedule.linear: 1 - done,
        Schedule.cosine: 0.5 * (1 + math.cos(math.pi * done)),
        Schedule.polynomial: float((1 - done) ** config.power),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * max(0.0, shape)


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay; norms and biases do not, T5's table of relative_attention_bias included."""
    trainable = [(p, p.ndim > 1 and "bias" not in name) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for p, decays in trainable if decays]
    rest = [p for p, decays in trainable if not decays]
    return [g for g in ({"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}) if g["params"]]


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over both groups; its learning rate is set before every update."""
    params, lr = groups(model, config.weight_decay), config.lr
    betas = (config.betas[0], config.betas[1]) if len(config.betas) == 2 else None
    if betas is None or not all(0 <= b < 1 for b in betas):
        raise UserError(f"betas are {config.betas}", where="optimizer.betas", fix="two numbers from 0 to below 1, such as [0.9,0.999]")
    if config.nesterov and not config.momentum:
        raise UserError("Nesterov momentum needs a momentum", where="optimizer.nesterov", fix="optimizer.momentum=0.9")
    match config.name:
        case OptimizerName.adamw:
            return torch.optim.AdamW(params, lr=lr, betas=betas, eps=config.eps, fused=True)
        case OptimizerName.adamw_8bit:
            return _in_8_bits(model, params, lr=lr, betas=betas, eps=config.eps)
        case OptimizerName.adam:
            return torch.optim.Adam(params, lr=lr, betas=betas, eps=config.eps, fused=True)
        case OptimizerName.sgd:
            return torch.optim.SGD(params, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
        case OptimizerName.adagrad:
            return torch.optim.Adagrad(params, lr=lr, eps=config.eps, fused=True)
        case OptimizerName.nadam:
            return torch.optim.NAdam(params, lr=lr, betas=betas, eps=config.eps, decoupled_weight_decay=True)
        case OptimizerName.radam:
            return torch.optim.RAdam(params, lr=lr, betas=betas, eps=config.eps, decoupled_weight_decay=True)
        case OptimizerName.rmsprop:
            return torch.optim.RMSprop(params, lr=lr, eps=config.eps, momentum=config.momentum)
        case OptimizerName.adafactor:
            return torch.optim.Adafactor(params, lr=lr)


def refuse_missing(config: OptimizerConfig) -> None:
    """Raise UserError for an optimizer whose package is not installed; called before a model is loaded."""
    if config.name == OptimizerName.adamw_8bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "optimizer.name=adamw_8bit needs the package bitsandbytes, which is not installed",
            where="optimizer.name",
            fix="pip install bitsandbytes, or optimizer.name=adamw",
        )


def _in_8_bits(model: nn.Module, params: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """AdamW whose moments are quantised in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861); those of embeddings keep 32 bits."""
    import bitsandbytes

    optimizer = bitsandbytes.optim.AdamW8bit(params, **options)
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    manager.initialize()  # it knows parameters by their addresses, those of another run in this process too
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.override_config(module.weight, "optim_bits", 32)
    found: torch.optim.Optimizer = optimizer
    return found


def _own(name: str, value: Any) -> Any:
    """A value of a parameter's state that shares no memory with another's: bitsandbytes gives all the same tables of 256 numbers."""
    return value.clone() if name.startswith("qmap") else value


MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}
"""Names of torch's optimizers for moments that have a parameter's own shape; others are factored or packed."""


class Updater:
    """One update: gradient norm, clipping, step. An update whose gradients or loss are not finite never touches the weights.

    On a CPU, with fp16 or with an unfused optimizer the host looks at the norm before every step. Fused optimizers on CUDA withhold
    the update on the device instead, and every later one too, and the host learns of it when it next calls ``raise_if_bad``.
    """

    def __init__(
        self, model: nn.Module, config: OptimizerConfig, *, clip: float, device: torch.device, scaler: torch.amp.GradScaler | None
    ) -> None:
        self.optimizer = build(model, config)
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        self.clip = clip
        self.scaler = scaler
        self.fused = config.name in FUSED and scaler is None
        self.host_looks = device.type == "cpu" or not self.fused
        self.first_bad = torch.full((), math.inf, device=device)
        self.skips = 0
        self.norms: tuple[list[int], Tensor] | None = None
        """Of the last update: which parameters had a gradient, and the norm of each before clipping, on the device."""

    def update(self, lr: float, *, step: int, loss: Tensor) -> Tensor:
        """Apply the gradients and drop them; returns their norm before clipping, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        there = [place for place, p in enumerate(self.parameters) if p.grad is not None]
        gradients = [gradient for p in self.parameters if (gradient := p.grad) is not None]
        norm = self._norm(there, gradients)
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        if self.scaler is not None:
            self._scaled_step(norm, gradients, step)
        else:
            self.first_bad = torch.minimum(self.first_bad, torch.where(bad, float(step), math.inf))
            if self.host_looks:
                self.raise_if_bad()
            self._step(norm, gradients)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _norm(self, there: list[int], gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients, as ``torch.nn.utils.get_total_norm`` has it; those it is made of are kept."""
        self.norms = None
        if not gradients:
            return torch.nn.utils.get_total_norm(gradients)
        norms = torch.stack([norm.to(self.first_bad.device, torch.float32) for norm in torch._foreach_norm(gradients)])
        self.norms = there, norms
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm

    def _step(self, norm: Tensor, gradients: list[Tensor]) -> None:
        if not self.fused:
            if self.clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
            self.optimizer.step()
            return
        # the fused kernels divide gradients by grad_scale and leave everything alone where found_inf is set
        if self.clip:
            self.optimizer.grad_scale = torch.clamp((norm.float() + 1e-6) / self.clip, min=1.0)  # type: ignore[attr-defined]
        if not self.host_looks:
            self.optimizer.found_inf = torch.isfinite(self.first_bad).float()  # type: ignore[attr-defined]
        self.optimizer.step()

    def _scaled_step(self, norm: Tensor, gradients: list[Tensor], step: int) -> None:
        assert self.scaler is not None
        self.skips = self.skips + 1 if not bool(torch.isfinite(norm)) else 0
        if self.skips > MAX_SKIPS:
            self.first_bad = torch.full_like(self.first_bad, float(step))
            self.raise_if_bad()
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def drop_gradients(self) -> None:
        """Forget a step that was begun; nothing of it has touched the weights."""
        self.optimizer.zero_grad(set_to_none=True)

    def release(self) -> None:
        """Give back the memory of moments and gradients: no further update will be made."""
        self.drop_gradients()
        self.optimizer.state.clear()

    def raise_if_bad(self) -> None:
        """Read the guard back from the device and raise Diverged with the first bad step."""
        first = self.bad_step()
        if first is not None:
            raise Diverged(
                f"loss or gradients are not finite at step {first}; the update was withheld",
                where=f"step {first}",
                fix="a smaller optimizer.lr, a longer optimizer.warmup, or device.precision=fp32; then resume from the last checkpoint",
            )

    def bad_step(self) -> int | None:
        """The first update that was not finite, if any was; reads the device."""
        first = float(self.first_bad)
        return int(first) if math.isfinite(first) else None

    def state(self) -> dict[str, Any]:
        """Moments and counters, in the order of the parameters."""
        state = self.optimizer.state
        moments = [{name: _own(name, value) for name, value in state[p].items()} if p in state else {} for p in self.parameters]
        return {"moments": moments, "scaler": self.scaler.state_dict() if self.scaler else {}, "skips": self.skips}

    def load(self, saved: dict[str, Any]) -> None:
        """Put a saved state back. Raises ValueError where it is that of other parameters."""
        for parameter, moments in zip(self.parameters, saved["moments"], strict=True):
            if wrong := [name for name in MOMENTS & moments.keys() if moments[name].shape != parameter.shape]:
                raise ValueError(f"{wrong[0]} is {tuple(moments[wrong[0]].shape)}, its parameter {tuple(parameter.shape)}")
            if moments:
                self.optimizer.state[parameter] = {
                    name: value.to(parameter.device if name != "step" or self.fused else "cpu") if isinstance(value, Tensor) else value
                    for name, value in moments.items()
                }
        if self.scaler is not None and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.skips = saved["skips"]

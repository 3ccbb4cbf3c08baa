"""What a network predicts at a state, as clean sample and noise, with the conditions of its pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..samplers.errors import InputError
from ..samplers.linear import Time, combine
from ..samplers.network import output_rows
from ..samplers.process import Process
from . import row_trees
from .conditions import BESIDE, Branch, Condition, Layout

Network = Callable[..., Any]
"""A denoiser of diffusers, or a wrapper of one."""


class Prediction(NamedTuple):
    """A prediction at a state x_t = alpha_t x0 + sigma_t eps: two tensors of the state's shape, at least float32."""

    x0: Tensor
    eps: Tensor


def predict(network: Network, process: Process, x: Tensor, t: Time, condition: Condition) -> Prediction:
    """What the network predicts of states, told the condition.

    The network is called as its pipeline calls it: with the state scaled, in the condition's dtype and layout, and the
    time in its own unit. What it answers is brought to the samples' shape (channels of a learned variance are left
    out) and converted in at least float32. Differentiable in ``x`` and in the network's parameters.

    Args:
        network: the denoiser that the condition was captured from, or one that is called like it.
        process: of the pipeline's scheduler.
        x: (B, ...) states alpha x0 + sigma eps.
        t: in the scheduler's units: one time, or (B,).
        condition: of the B samples, on the network's device.

    Raises:
        InputError: when the shapes do not fit, a time is not permitted, or the output does not determine x0 and eps
            there (`Process.to_x0`).
    """
    return _prediction(process, _answers(network, process, x, t, condition, ("cond",))["cond"], x, t)


def guided(
    network: Network, process: Process, x: Tensor, t: Time, condition: Condition, scale: float | Tensor
) -> Prediction:
    """As `predict`, with classifier-free guidance: uncond + g (cond - uncond) (arXiv:2205.11487, Eq. 2).

    Papers and scripts that follow latent consistency models (arXiv:2310.04378) write cond + w (cond - uncond), which is
    the same for w = g - 1; so does the pipeline of Z-Image. Branches that the pipeline evaluates in one batch are
    evaluated in one.

    Args:
        network: as in `predict`.
        process: as in `predict`.
        x: as in `predict`.
        t: as in `predict`.
        condition: as in `predict`, with an unconditional branch.
        scale: g, one number or (B,); 1 is no guidance.

    Raises:
        InputError: as `predict`, or when the condition has one branch only.
    """
    condition.branch("uncond")
    answers = _answers(network, process, x, t, condition, condition.layout.branches)
    cond, uncond = answers["cond"], answers["uncond"]
    g = scale
    if isinstance(scale, Tensor) and scale.ndim:
        if scale.shape != (len(x),):
            raise InputError(f"a guidance scale is one number or one per sample; got {tuple(scale.shape)} for {len(x)}")
        g = scale.to(cond).view(-1, *(1,) * (cond.ndim - 1))
    return _prediction(process, uncond + g * (cond - uncond), x, t)


def cut_to(rows: Tensor, unit_dim: int | None, shape: Sequence[int]) -> Tensor:
    """A network's output (rows, ...) cut to the samples' ``shape``.

    Raises:
        InputError: when it is not at least as large.
    """
    cut = rows if unit_dim is None else rows.squeeze(unit_dim)
    if cut.ndim != len(shape) + 1 or any(have < want for have, want in zip(cut.shape[1:], shape, strict=True)):
        raise InputError(
            f"the network predicts {tuple(rows.shape[1:])} for samples of shape {tuple(shape)}; fewstep knows networks "
            "that predict the samples' shape, or more along a dimension"
        )
    for dim, size in enumerate(shape, 1):
        cut = cut.narrow(dim, 0, size)
    return cut


def _prediction(process: Process, out: Tensor, x: Tensor, t: Time) -> Prediction:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return Prediction(process.to_x0(out, wide, t), process.to_eps(out, wide, t))


def _answers(
    network: Network, process: Process, x: Tensor, t: Time, condition: Condition, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The network's output for each branch, as the scheduler is given it, (B, ...) in at least float32."""
    layout = condition.layout
    if len(x) != len(condition) or tuple(x.shape[1:]) != layout.shape:
        raise InputError(
            f"the condition is of {len(condition)} samples of shape {layout.shape}; got states of {tuple(x.shape)}"
        )
    shown = combine(x, (process.input_scale(t), x)).to(condition.dtype)
    times = torch.as_tensor(t, device=x.device).expand(len(x))
    branches = [condition.branch(name) for name in names]
    if len(branches) > 1 and layout.stacked:
        rowed = branches[0].rowed
        both = Branch(row_trees.joined([branch.inputs for branch in branches], rowed), rowed)
        out = _run(network, layout, torch.cat([shown] * len(branches)), times.repeat(len(branches)), both)
        return dict(zip(names, out.chunk(len(branches)), strict=True))
    return {name: _run(network, layout, shown, times, branch) for name, branch in zip(names, branches, strict=True)}


def _run(network: Network, layout: Layout, shown: Tensor, times: Tensor, branch: Branch) -> Tensor:
    """One call of the network."""
    inputs = dict(branch.inputs)
    beside = inputs.pop(BESIDE, None)
    if layout.beside_dim is not None:
        assert beside is not None
        shown = torch.cat([shown, beside.to(shown)], layout.beside_dim)
    if layout.unit_dim is not None:
        shown = shown.unsqueeze(layout.unit_dim)
    told = {layout.state: list(shown.unbind()) if layout.listed else shown, layout.time: layout.told(times)}
    out = output_rows(network(**inputs, **told, return_dict=False))
    out = cut_to(out, layout.unit_dim, layout.shape)
    return layout.sign * out.to(torch.promote_types(out.dtype, torch.float32))

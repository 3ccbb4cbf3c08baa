"""Float64 coefficients of time, and the one place where they meet tensors of another dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError

#: A time: one number for the whole batch, or a tensor () or (B,) with one per sample.
Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """A time as a float64 tensor () or (B,), on its own device where that has float64, else on the CPU.

    Raises:
        InputError: when ``t`` has more than one dimension.
    """
    if not isinstance(t, Tensor):
        return torch.tensor(t, dtype=torch.float64)
    if t.ndim > 1:
        raise InputError(f"a time is one number or one per sample; got a tensor of shape {tuple(t.shape)}")
    return t.cpu().double() if t.device.type == "mps" else t.double()


def require(allowed: Tensor, value: Tensor, message: str) -> None:
    """Raises ``message`` with the first value that is not allowed.

    Nothing is checked for tensors on an accelerator: the host would have to wait for them.
    """
    if allowed.device.type == "cpu" and not bool(allowed.all()):
        raise InputError(message.format(f"{first(value, ~allowed):g}"))


def first(value: Tensor, where: Tensor) -> float:
    """The first element of ``value``, broadcast to the shape of ``where``, that is marked there."""
    return float(value.expand(where.shape)[where].flatten()[0])


def combine(like: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """Sum of coefficient () or (B,) times tensor (B, ...), of the shape, dtype and device of ``like``.

    The one cast: coefficients from float64 and tensors from their own dtype to the widest of the tensors'
    dtypes and float32, where the sum is formed; then to the dtype of ``like``.

    Raises:
        InputError: when shapes disagree or a tensor is not floating point.
    """
    work = torch.float32
    for value in (like, *(value for _, value in terms)):
        if value.shape != like.shape:
            raise InputError(
                f"tensors of one step must have one shape; got {tuple(value.shape)} beside "
                f"{tuple(like.shape)}, drop a learned variance first"
            )
        if not value.is_floating_point():
            raise InputError(f"tensors must be floating point; got {value.dtype}")
        work = torch.promote_types(work, value.dtype)
    total = torch.zeros((), dtype=work, device=like.device)
    for coefficient, value in terms:
        total = total + _broadcast(coefficient, like).to(work) * value.to(work)
    return total.to(like.dtype)


def _broadcast(coefficient: Tensor, like: Tensor) -> Tensor:
    if coefficient.ndim == 0:
        # A number on the host multiplies a tensor anywhere without a copy.
        return coefficient if coefficient.device.type == "cpu" else coefficient.to(like.device)
    if like.ndim == 0 or coefficient.shape[0] not in (1, like.shape[0]):
        raise InputError(
            f"got {coefficient.shape[0]} times for tensors of shape {tuple(like.shape)}; give one, or one per sample"
        )
    return coefficient.to(like.device).view(-1, *(1,) * (like.ndim - 1))

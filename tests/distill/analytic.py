"""Teachers in closed form: Gaussian and Gaussian-mixture data, their predictions and the true maps of their ODEs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.distill.jumps import Denoiser
from fewstep.distill.predict import Prediction
from fewstep.samplers.prediction import Epsilon, Flow, Velocity
from fewstep.samplers.process import Process
from fewstep.samplers.schedules import EDMSchedule, FlowSchedule, TableSchedule, TrigSchedule

BETAS = torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)
VP = Process(TableSchedule(tuple((1 - BETAS).cumprod(0).tolist())), Epsilon())
FLOW = Process(FlowSchedule(), Flow())
TRIG = Process(TrigSchedule(), Velocity())
EDM = Process(EDMSchedule(), Epsilon())
PROCESSES = {"vp": VP, "flow": FLOW, "trig": TRIG, "edm": EDM}

#: A map of the ODE: state (B, ...) and times (B,) to the state at other times (B,).
Map = Callable[[Tensor, Tensor, Tensor], Tensor]


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ...) of the dtype of ``like``."""
    return values.to(like.dtype).view(-1, *(1,) * (like.ndim - 1))


@dataclass(frozen=True)
class Mixture:
    """Data whose elements are draws of one mixture of normal laws; one component is Gaussian data.

    Args:
        process: the noise levels.
        means: of the components.
        std: of every component.
        shares: of the components, summing to 1.
    """

    process: Process
    means: tuple[float, ...] = (0.7,)
    std: float = 0.5
    shares: tuple[float, ...] = (1.0,)

    def draw(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        count = torch.Size(shape).numel()
        pick = torch.multinomial(torch.tensor(self.shares), count, replacement=True, generator=generator)
        centres = torch.tensor(self.means, dtype=torch.float64)[pick].view(shape)
        return centres + self.std * torch.randn(shape, generator=generator, dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """E[x0 | x_t] and E[eps | x_t]."""
        alpha, sigma = column(self.process.alpha(t), x), column(self.process.sigma(t), x)
        variance = (alpha * self.std) ** 2 + sigma**2
        means = torch.tensor(self.means, dtype=x.dtype)
        logits = torch.tensor(self.shares, dtype=x.dtype).log() - (x[..., None] - alpha[..., None] * means) ** 2 / (
            2 * variance[..., None]
        )
        centre = (logits.softmax(dim=-1) * means).sum(dim=-1)
        x0 = centre + alpha * self.std**2 / variance * (x - alpha * centre)
        return Prediction(x0, sigma / variance * (x - alpha * centre))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The gradient of log p_t, by differentiating the density."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            alpha, variance = self._at(x, t)
            means, shares = torch.tensor(self.means, dtype=x.dtype), torch.tensor(self.shares, dtype=x.dtype)
            law = torch.distributions.Normal(alpha[..., None] * means, variance.sqrt()[..., None])
            density = (law.log_prob(x[..., None]) + shares.log()).logsumexp(dim=-1)
            return torch.autograd.grad(density.sum(), x)[0]

    def map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the ODE takes x from t to s: to the same quantile (exact in one dimension), by 80 bisections."""
        level = self._below(x, t)
        low, high = torch.full_like(x, -2000.0), torch.full_like(x, 2000.0)
        for _ in range(80):
            middle = (low + high) / 2
            less = self._below(middle, s) < level
            low, high = torch.where(less, middle, low), torch.where(less, high, middle)
        return (low + high) / 2

    def _at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = column(self.process.alpha(t), x), column(self.process.sigma(t), x)
        return alpha, (alpha * self.std) ** 2 + sigma**2

    def _below(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = self._at(x, t)
        means, shares = torch.tensor(self.means, dtype=x.dtype), torch.tensor(self.shares, dtype=x.dtype)
        deviations = (x[..., None] - alpha[..., None] * means) / variance.sqrt()[..., None]
        return (torch.special.ndtr(deviations) * shares).sum(dim=-1)


@dataclass(frozen=True)
class Gaussian(Mixture):
    """One component, whose map is linear."""

    def map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (a, v), (b, w) = self._at(x, t), self._at(x, s)
        return b * self.means[0] + (w / v).sqrt() * (x - a * self.means[0])


def consistent(process: Process, true_map: Map, end: Callable[[Tensor], Tensor]) -> Denoiser:
    """The student whose landing at ``end(t)`` is the true map: the pair that gives x at t, and the map there."""

    def denoise(x: Tensor, t: Tensor) -> Prediction:
        s = end(t)
        landed = true_map(x, t, s)
        a, b = column(process.alpha(t), x), column(process.sigma(t), x)
        c, d = column(process.alpha(s), x), column(process.sigma(s), x)
        determinant = b * c - a * d
        return Prediction((b * landed - d * x) / determinant, (c * x - a * landed) / determinant)

    return denoise


def shifted(denoise: Denoiser, process: Process, by: float | Tensor) -> Denoiser:
    """A wrong student: x0 off by ``by``, one number or (B,), and the noise that goes with it."""

    def wrong(x: Tensor, t: Tensor) -> Prediction:
        x0, eps = denoise(x, t)
        off = column(torch.as_tensor(by).expand(len(x)), x)
        return Prediction(x0 + off, eps - column(process.alpha(t) / process.sigma(t), x) * off)

    return wrong


class Scaled:
    """A network times a weight, which tells whether a gradient came here."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.weight = inner, torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        return Prediction(*(part * self.weight for part in self.inner(x, t)))


#: Three times of each process away from its ends.
MIDDLE = {"vp": (200.0, 450.0, 700.0), "flow": (200.0, 500.0, 800.0), "trig": (0.2, 0.5, 0.8), "edm": (-0.3, 0.0, 0.3)}

#: Means, standard deviation and shares of the mixture of most tests.
MIXTURE = ((-1.0, 0.8), 0.4, (0.3, 0.7))


def middle(name: str) -> Tensor:
    return torch.tensor(MIDDLE[name], dtype=torch.float64)


def noisy(process: Process, t: Tensor) -> Tensor:
    """States (B, 4) at t."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 4, generator=generator, dtype=torch.float64)
    return process.add_noise(x0, noise, t)

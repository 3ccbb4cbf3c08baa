"""The forward process of a pipeline, x_t = alpha(t) x0 + sigma(t) eps, whatever its scheduler.

Everything that turns a network output into a step is a linear combination of two or three tensors. Its
coefficients are computed in float64 and cast once: to the widest dtype of the tensors involved, at least
float32, in which the combination is formed; the result has the dtype of the state.

Where a check would make an accelerator wait (times that live on one), bad times give NaN instead of an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .linear import Time, as_time, combine, first, require
from .prediction import PREDICTIONS, Epsilon, OfPair, OfState, Prediction, Sample
from .recognise import recognise
from .schedules import FlowSchedule, Levels, NoiseSchedule, TimeRange


@dataclass(frozen=True)
class Process:
    """x_t = alpha(t) x0 + sigma(t) eps, its time, and what the network predicts.

    Time is the scheduler's timestep, the number the pipeline hands to the network (before what a pipeline
    does to it on the way: Flux divides it by 1000). Variance preserving: 0 to 999, fractions allowed, -1 for
    clean data. Flow matching: 0 (clean) to 1000 (noise), after any shift. EDM: log(sigma)/4. ``out`` is the
    network output as the pipeline hands it to ``scheduler.step``, guidance applied, learned variance dropped.

    Every ``t`` and ``s`` is a float or a tensor () or (B,). Coefficient methods return float64 tensors of its
    shape on its device (CPU for a float); the others take tensors (B, ...) and return one like the first,
    same dtype and device.

    Args:
        schedule: alpha and sigma against time.
        prediction: what the network predicts.
        state_over_alpha: whether the scheduler keeps x_t / alpha(t), as the Euler family does, instead of
            x_t.
    """

    schedule: NoiseSchedule
    prediction: Prediction
    state_over_alpha: bool = False
    _known: dict[float, Levels] = field(default_factory=dict, init=False, repr=False, compare=False)
    "Of single times, which every step asks for several times over."

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> Process:
        """The process of a diffusers scheduler, read from its config and table; its timesteps do not matter.

        Raises:
            InputError: when the scheduler is not known, its config contradicts itself, or its betas make no
                table.
        """
        return cls(*recognise(scheduler))

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction, sample, flow_prediction, inverted_flow, edm or edm_v."""
        return self.prediction.name

    @property
    def clean_time(self) -> float:
        """The time that stands for clean data (alpha = 1, sigma = 0): to land at, not to ask a network at."""
        return self.schedule.clean_time

    @property
    def time_range(self) -> TimeRange:
        """Cleanest and noisiest time at which the scheduler calls the network."""
        return self.schedule.time_range

    # Coefficients

    def alpha(self, t: Time) -> Tensor:
        """Factor of x0, in [0, 1]; exactly 0 where the scheduler's is.

        Raises:
            InputError: when a time is not permitted.
        """
        return self._levels(t).alpha

    def sigma(self, t: Time) -> Tensor:
        """Factor of eps, at least 0.

        Raises:
            InputError: when a time is not permitted.
        """
        return self._levels(t).sigma

    def log_snr(self, t: Time) -> Tensor:
        """2 log(alpha/sigma): -infinity at zero terminal SNR, infinity at clean data.

        Raises:
            InputError: when a time is not permitted.
        """
        return _log_snr(self._levels(t))

    def snr(self, t: Time) -> Tensor:
        """(alpha/sigma)^2: 0 at zero terminal SNR, infinity at clean data.

        Raises:
            InputError: when a time is not permitted.
        """
        alpha, sigma = self._levels(t)
        return (alpha / sigma) ** 2

    def time_of_log_snr(self, log_snr: Time) -> Tensor:
        """The time of a log-SNR, inverse of ``log_snr``. Infinity gives ``clean_time``.

        A finite value beyond a variance-preserving table gives the nearest end of the table. An EDM process
        has no time of zero SNR: -infinity gives infinity (or 1), which the other methods refuse.

        Raises:
            InputError: when a value is NaN.
        """
        value = as_time(log_snr)
        require(~value.isnan(), value, "log-SNR is {}; give a number")
        return self.schedule.time_of_log_snr(value)

    def from_uniform(self, u: Time) -> Tensor:
        """The time at fraction ``u`` in [0, 1], cleanest to noisiest, of the scheduler's own spacing.

        Variance preserving: even in time. Flow matching: even in sigma, then shifted (`shift_time`). EDM:
        equation 5 of arXiv:2206.00364.

        Raises:
            InputError: when ``u`` is outside [0, 1], or the shift depends on the resolution and is not set.
        """
        value = as_time(u)
        require((value >= 0) & (value <= 1), value, "fraction {} is outside 0 to 1")
        return self.schedule.from_uniform(value)

    def shift_time(self, t: Time) -> Tensor:
        """A flow-matching time shifted: sigma' = shift sigma / (1 + (shift - 1) sigma).

        Equation 23 of arXiv:2403.03206.

        Raises:
            InputError: when the process is not flow matching, its shift is not set, or a time is not
                permitted.
        """
        schedule = self._flow_schedule()
        return schedule.from_uniform(self._levels(t).sigma)

    def with_shift(self, shift: float) -> Process:
        """The same flow-matching process with another ``shift`` (> 0) in `shift_time` and `from_uniform`.

        Raises:
            InputError: when the process is not flow matching, or ``shift`` is not positive and finite.
        """
        return replace(self, schedule=replace(self._flow_schedule(), shift=shift))

    def with_mu(self, mu: float) -> Process:
        """`with_shift` by a resolution's ``mu``: shift = exp(mu), or mu where ``time_shift_type`` is linear.

        Raises:
            InputError: as `with_shift`.
        """
        return self.with_shift(self._flow_schedule().shift_of_mu(mu))

    def input_scale(self, t: Time) -> Tensor:
        """What x_t is multiplied with for the network: 1, or c_in of EDM (arXiv:2206.00364, table 1).

        Raises:
            InputError: when a time is not permitted.
        """
        self._levels(t)
        return self.schedule.input_scale(as_time(t))

    def scheduler_state_scale(self, t: Time) -> Tensor:
        """What x_t is multiplied with to be the scheduler's ``sample``: 1, or 1/alpha for the Euler family.

        Raises:
            InputError: when a time is not permitted.
        """
        alpha = self._levels(t).alpha
        return 1 / alpha if self.state_over_alpha else torch.ones_like(alpha)

    # From data to noise

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t = alpha x0 + sigma eps, of the shape and dtype of ``x0``.

        Raises:
            InputError: when shapes disagree, a tensor is not floating point, or a time is not permitted.
        """
        alpha, sigma = self._levels(t)
        return combine(x0, (alpha, x0), (sigma, eps))

    def target(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """The output that a network is trained to give for this pair, of the shape and dtype of ``x0``.

        Raises:
            InputError: as `add_noise`.
        """
        of_x0, of_eps = self.prediction.target(*self._levels(t))
        return combine(x0, (of_x0, x0), (of_eps, eps))

    # From network output to data, noise and velocity, and back

    def to_x0(self, out: Tensor, x: Tensor, t: Time) -> Tensor:
        """The clean sample that a network output means at state ``x``, of the shape and dtype of ``x``.

        Raises:
            InputError: as `add_noise`, or when the output does not determine it (epsilon at zero SNR).
        """
        time = as_time(t)
        return self._of_state(self.prediction.x0(*self._levels(time)), out, x, time, "x0")

    def to_eps(self, out: Tensor, x: Tensor, t: Time) -> Tensor:
        """The noise that a network output means at state ``x``, of the shape and dtype of ``x``.

        Raises:
            InputError: as `add_noise`, or when the output does not determine it (a sample at clean data).
        """
        time = as_time(t)
        return self._of_state(self.prediction.eps(*self._levels(time)), out, x, time, "eps")

    def to_v(self, out: Tensor, x: Tensor, t: Time) -> Tensor:
        """The velocity alpha eps - sigma x0 (arXiv:2202.00512), of the shape and dtype of ``x``.

        Raises:
            InputError: as `to_x0` and `to_eps`.
        """
        return self.convert(out, x, t, "v_prediction")

    def convert(self, out: Tensor, x: Tensor, t: Time, prediction: str | Prediction) -> Tensor:
        """The output that a network of another prediction type would give, of the shape and dtype of ``x``.

        Raises:
            InputError: as `to_x0` and `to_eps`, or when the prediction type is not known.
        """
        time = as_time(t)
        levels = self._levels(time)
        wanted = PREDICTIONS[prediction] if isinstance(prediction, str) else prediction
        coefficients = wanted.target(*levels).through(self.prediction, *levels)
        return self._of_state(coefficients, out, x, time, wanted.name)

    def from_x0(self, x0: Tensor, x: Tensor, t: Time) -> Tensor:
        """The network output that would give ``x0``, of the shape and dtype of ``x``; inverse of `to_x0`.

        Raises:
            InputError: as `add_noise`, or when x0 does not determine it (sigma = 0).
        """
        time = as_time(t)
        levels = self._levels(time)
        coefficients = self.prediction.target(*levels).through(Sample(), *levels)
        self._require_determined(coefficients, time, "sample", self.prediction_type)
        return combine(x, (coefficients.x, x), (coefficients.out, x0))

    # Between times

    def jump(
        self,
        x: Tensor,
        t: Time,
        s: Time,
        *,
        out: Tensor | None = None,
        x0: Tensor | None = None,
        eps: Tensor | None = None,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The DDIM landing at time ``s`` from ``x`` at time ``t``, arXiv:2010.02502 equation 12.

        x_s = alpha_s x0 + sqrt(sigma_s^2 - std^2) eps + std noise. Give what is known at (x, t): the network
        output ``out``; or ``x0``, or ``eps``, and the other follows from x; or both, and x only lends shape
        and dtype. ``s`` may be ``clean_time``, and noisier than ``t`` when eta is 0 (inversion).

        Args:
            x: state (B, ...) at time ``t``.
            t: where x is.
            s: where to land.
            out: network output, shape of x.
            x0: clean sample, shape of x.
            eps: noise, shape of x.
            eta: 0 (deterministic) to 1 (ancestral): std = eta (sigma_s/sigma_t) sqrt(sigma_t^2 -
                (alpha_t/alpha_s)^2 sigma_s^2), equation 16 in the form that holds for any alpha and sigma.
            noise: standard normal, shape of x; needed exactly when eta > 0.

        Raises:
            InputError: as `to_x0`, or when the arguments do not fit together.
        """
        here, there = as_time(t), as_time(s)
        start, end = self._levels(here), self._levels(there)
        std = self._ancestral_std(here, there, eta, noise)
        direction = (end.sigma**2 - std**2).sqrt()
        fresh = [] if noise is None else [(std, noise)]
        if out is None and x0 is not None and eps is not None:
            return combine(x, (end.alpha, x0), (direction, eps), *fresh)
        known = [("out", self.prediction, out), ("x0", Sample(), x0), ("eps", Epsilon(), eps)]
        given = [(name, source, value) for name, source, value in known if value is not None]
        if len(given) != 1:
            names = " and ".join(name for name, *_ in given) or "none"
            raise InputError(f"jump needs out, x0, eps, or both x0 and eps; got {names}")
        _, source, value = given[0]
        coefficients = OfPair(end.alpha, direction).through(source, *start)
        self._require_determined(coefficients, here, source.name, "the landing")
        return combine(x, (coefficients.x, x), (coefficients.out, value), *fresh)

    def travel(self, x: Tensor, t: Time, s: Time, noise: Tensor) -> Tensor:
        """Re-noises a state that is not clean, from ``t`` to ``s`` at least as noisy: a draw of q(x_s | x_t).

        x_s = r x_t + sqrt(sigma_s^2 - r^2 sigma_t^2) noise with r = alpha_s / alpha_t, the transition of
        arXiv:2107.00630 appendix A.1. From zero SNR to zero SNR the state stays.

        Args:
            x: state (B, ...) at time ``t``.
            t: where x is.
            s: where to go.
            noise: standard normal, shape of x.

        Raises:
            InputError: as `add_noise`, or when ``s`` is less noisy than ``t``.
        """
        here, there = as_time(t), as_time(s)
        start, end = self._levels(here), self._levels(there)
        allowed = _log_snr(end) <= _log_snr(start)
        require(allowed, there, "cannot travel to time {}, which is less noisy than the start; use jump")
        ratio = torch.where(start.alpha > 0, end.alpha / start.alpha, 1.0)
        variance = (end.sigma**2 - (ratio * start.sigma) ** 2).clamp(min=0)
        return combine(x, (ratio, x), (torch.where(allowed, variance, torch.nan).sqrt(), noise))

    # Inner parts

    def _levels(self, t: Time) -> Levels:
        if isinstance(t, Tensor):
            return self._computed_levels(as_time(t))
        if t not in self._known:
            with torch.inference_mode(False):  # they may be asked for again where gradients flow
                self._known[t] = self._computed_levels(as_time(t))
        return self._known[t]

    def _computed_levels(self, time: Tensor) -> Levels:
        valid = self.schedule.valid(time)
        require(valid, time, f"time {{}} is outside {self.schedule.domain}")
        return Levels(*(torch.where(valid, level, torch.nan) for level in self.schedule.levels(time)))

    def _flow_schedule(self) -> FlowSchedule:
        if not isinstance(self.schedule, FlowSchedule):
            raise InputError("only a flow-matching process has a shift; this one is not, leave the shift out")
        return self.schedule

    def _of_state(self, coefficients: OfState, out: Tensor, x: Tensor, time: Tensor, what: str) -> Tensor:
        self._require_determined(coefficients, time, self.prediction_type, what)
        return combine(x, (coefficients.x, x), (coefficients.out, out))

    def _require_determined(self, coefficients: OfState, time: Tensor, given: str, what: str) -> None:
        finite = coefficients.x.isfinite() & coefficients.out.isfinite()
        if finite.device.type == "cpu" and not bool(finite.all()):
            lost = first(time, ~finite)
            why = "the SNR is zero" if self.alpha(lost) == 0 else "there is no noise"
            raise InputError(
                f"{given} does not determine {what} at time {lost:g}, where {why}; "
                "use a v_prediction network or another time"
            )

    def _ancestral_std(self, here: Tensor, there: Tensor, eta: float, noise: Tensor | None) -> Tensor:
        start, end = self._levels(here), self._levels(there)
        if not 0 <= eta <= 1:
            raise InputError(f"eta must be 0 to 1; got {eta}")
        if (noise is not None) != (eta > 0):
            raise InputError(f"noise goes with eta > 0; got eta={eta} {'without' if eta else 'with'} noise")
        if eta == 0:
            return torch.zeros_like(end.sigma * start.sigma)
        allowed = _log_snr(end) >= _log_snr(start)
        require(allowed, there, "cannot jump with eta > 0 to time {}, which is noisier than the start; use travel")
        forward = (start.sigma**2 - (start.alpha / end.alpha * end.sigma) ** 2).clamp(min=0)
        std = eta * end.sigma / start.sigma * forward.sqrt()
        return torch.where(allowed, torch.where(end.sigma == 0, 0.0, std), torch.nan)


def _log_snr(levels: Levels) -> Tensor:
    return 2 * (levels.alpha.log() - levels.sigma.log())

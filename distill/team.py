"""The roles of a run as denoisers: what a method trains with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..samplers.errors import InputError
from ..samplers.process import Process
from .conditions import Condition
from .jumps import Denoiser
from .lora import LoraSetting
from .method import Method, Moment, seed_of
from .predict import Prediction, guided, predict
from .role_kinds import Adapter, Ema, Extra, FullCopy, Kind, checked_layers
from .roles import Roles
from .schedule import AVERAGE
from .shards import Sharing, cut
from .times import Draws, Range


@dataclass(frozen=True)
class Team:
    """The networks of a run, and the process they predict.

    Attributes:
        roles: who holds which weights.
        process: the forward process of the pipeline.
        guidance: the scale with which the teacher is guided where a method says none; 1 is no guidance.
        sharing: the processes that the networks are cut over; None where each holds them whole.
    """

    roles: Roles
    process: Process
    guidance: float = 1.0
    sharing: Sharing | None = None

    def trainable(self, role: str, /) -> Mapping[str, nn.Parameter]:
        """The parameters that a role trains, by name."""
        return self.roles.trainable(role)

    def update_ema(self, role: str, /, decay: float) -> None:
        """Moves an average towards the role it follows."""
        self.roles.update_ema(role, decay)

    def state(self) -> Mapping[str, Tensor]:
        """All tensors that a checkpoint has to hold."""
        return self.roles.state()

    def load_state(self, state: Mapping[str, Tensor], /) -> None:
        """Takes what `state` gave."""
        self.roles.load_state(state)

    def paired_noise(self) -> AbstractContextManager[None]:
        """All networks used in the block draw the same dropout."""
        return self.roles.paired_noise()

    def denoiser(self, role: str, condition: Condition, *, grad: bool = True, frozen: bool = False) -> Denoiser:
        """A role, told the condition, without guidance.

        Args:
            role: its name.
            condition: of the samples it will be asked about.
            grad: whether its operations are recorded.
            frozen: whether its parameters take no gradient; what made its input still does.
        """

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            with self.roles.use(role, grad=grad, frozen=frozen) as network:
                return predict(network, self.process, x, t, condition)

        return denoise

    def guided(
        self, role: str, condition: Condition, scale: float | Tensor, *, grad: bool = False, frozen: bool = False
    ) -> Denoiser:
        """A role, told the condition, with classifier-free guidance; the second branch is not asked at scale 1.

        Processes that share networks ask it unless the scale is 1 in all of them.

        Args:
            role: its name.
            condition: of the samples; without an unconditional branch there is no guidance, whatever the scale.
            scale: g of uncond + g (cond - uncond), one number or (B,).
            grad: as in `denoiser`, but not recorded where nothing is said: most teachers are only asked.
            frozen: as in `denoiser`.
        """
        plain = condition.uncond is None or bool((torch.as_tensor(scale) == 1).all())
        if plain if self.sharing is None else self.sharing.everywhere(plain):
            return self.denoiser(role, condition, grad=grad, frozen=frozen)

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            with self.roles.use(role, grad=grad, frozen=frozen) as network:
                return guided(network, self.process, x, t, condition, scale)

        return denoise

    def scales(self, ends: Sequence[float], count: int, draws: Draws) -> Tensor:
        """Guidance scales of some samples, float64 (count,).

        Args:
            ends: of the range that they are drawn from; one number for all; none for the team's own.
            count: number of samples.
            draws: generators.

        Raises:
            InputError: for more than two ends.
        """
        if len(ends) > 2:
            raise InputError(f"a guidance scale is one number, or the two ends of a range; got {list(ends)}")
        low, high = (ends[0], ends[-1]) if ends else (self.guidance, self.guidance)
        return Range(low, high)(count, draws)


def noise_like(x: Tensor, moment: Moment) -> Tensor:
    """Standard normal noise, (B, ...) like ``x`` in float32, that the moment's generators draw for each sample."""
    return moment.rows(lambda generator: torch.randn(x.shape[1:], generator=generator))


@dataclass(frozen=True)
class Cast:
    """The roles of a run before they are made: nothing has been changed yet.

    Attributes:
        network: that they are made of: the teacher's, or one with more inputs that predicts the same.
        kinds: what each role is, by name.
        teacher: the network of the pipeline.
    """

    network: nn.Module
    kinds: Mapping[str, Kind]
    teacher: nn.Module


def make_cast(
    network: nn.Module, method: Method, lora: LoraSetting | None, seed: int = 0, average: bool = False
) -> Cast:
    """The roles of a method on a network.

    Args:
        network: the teacher's.
        method: says who there is.
        lora: the student's adapter; None to train all weights.
        seed: of what heads begin with; one for all processes.
        average: whether the student is averaged over the run (`AVERAGE`).

    Raises:
        InputError: when the method cannot train such a network.
    """
    student = FullCopy() if lora is None else Adapter(lora)
    fitted = method.fitted(network)
    averaged = {AVERAGE: Ema("student")} if average else {}
    with _own_seed(seed, "kinds"):
        cast = Cast(fitted, {**method.kinds(student, fitted), **averaged}, network)
    checked_layers(cast.network, cast.kinds)
    return cast


def team_of(cast: Cast, process: Process, guidance: float, seed: int = 0, sharing: Sharing | None = None) -> Team:
    """The team of a cast, whose network it freezes and puts adapters on.

    Args:
        cast: who there is.
        process: of the pipeline.
        guidance: scale of the teacher where the method says none.
        seed: of what adapters begin with; one for all processes.
        sharing: the processes that the networks are cut over; None to keep them whole in each.

    Raises:
        InputError: for a network that cannot be cut (`shards.cut`).
    """
    if sharing is not None:
        extras = [kind.module for kind in cast.kinds.values() if isinstance(kind, Extra)]
        cut((cast.network, cast.teacher, *extras), sharing)
    with _own_seed(seed, "roles"):
        return Team(Roles(cast.network, cast.kinds), process, guidance, sharing)


@contextmanager
def _own_seed(seed: int, what: str) -> Iterator[None]:
    """What is random in the block follows from the arguments; torch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed_of(seed, what))
        yield


def make_team(
    network: nn.Module,
    process: Process,
    method: Method,
    lora: LoraSetting | None,
    guidance: float,
    seed: int = 0,
    average: bool = False,
    sharing: Sharing | None = None,
) -> Team:
    """`make_cast` and `team_of` in one.

    Raises:
        InputError: when the method cannot train such a network; it has not been changed then.
    """
    return team_of(make_cast(network, method, lora, seed, average), process, guidance, seed, sharing)

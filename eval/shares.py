"""Where the time of one call goes: encoders, denoiser, decoder, and the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..samplers import denoisers

REPEATS = 3
TOLERANCE = 0.01
"Largest gap between the sum of the shares and the whole, as a share of the whole."
RESOLUTION_S = 5e-4
"A gap below this many seconds is the clock's, however short the call."


@dataclass(frozen=True)
class Shares:
    """Seconds of one call with one image.

    Attributes:
        encode_s: text and image encoders, and the autoencoder's ``encode``.
        denoise_s: the denoising networks.
        decode_s: the autoencoder's ``decode``.
        other_s: everything between them: scheduler, guidance, conversion, Python.
        total_s: the whole call, by a clock of its own.
    """

    encode_s: float
    denoise_s: float
    decode_s: float
    other_s: float
    total_s: float

    @property
    def gap(self) -> float:
        """Seconds by which the sum of the shares misses the whole."""
        return abs(self.encode_s + self.denoise_s + self.decode_s + self.other_s - self.total_s)

    @property
    def adds_up(self) -> bool:
        """Whether the shares sum to the whole within 1 %."""
        return self.gap <= max(TOLERANCE * self.total_s, RESOLUTION_S)


def component_shares(pipe: Any, call: Callable[[], None], expected_s: float) -> tuple[Shares, tuple[str, ...]]:
    """The shares of the call of median length among `REPEATS`, and a warning when they do not add up.

    Args:
        pipe: the pipeline that ``call`` calls.
        call: one call with one image.
        expected_s: median seconds of the call without stamps, to notice a disturbance by them.
    """
    return _median_shares(lambda clock: _stamped(pipe, clock), pipe.device, call, expected_s)


def network_shares(
    networks: Iterable[nn.Module], device: torch.device, call: Callable[[], None], expected_s: float
) -> tuple[Shares, tuple[str, ...]]:
    """As `component_shares`, of a call in which there are only networks, all of them denoisers, and the rest."""
    parts = [(network, "denoise_s") for network in networks]
    return _median_shares(lambda clock: _stamped_modules(parts, clock), device, call, expected_s)


def _median_shares(
    stamped: Callable[[Clock], AbstractContextManager[None]],
    device: torch.device,
    call: Callable[[], None],
    expected_s: float,
) -> tuple[Shares, tuple[str, ...]]:
    measured = []
    for _ in range(REPEATS):
        clock = Clock(device)
        with stamped(clock):
            measured.append(clock.seconds(call))
    good = [shares for shares in measured if shares.adds_up]
    chosen = sorted(good or measured, key=lambda shares: shares.total_s)[(len(good or measured) - 1) // 2]
    warnings = []
    if not good:
        warnings.append(f"the shares of the components miss the whole by {chosen.gap / chosen.total_s:.1%}")
    if chosen.total_s > 1.5 * expected_s:
        warnings.append(
            f"busy machine: the call that was split into shares took {chosen.total_s:.3g} s, "
            f"the others {expected_s:.3g} s"
        )
    return chosen, tuple(warnings)


class Clock:
    """Stamps on the device's own time line: events on CUDA, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._stamps: list[tuple[str, Any]] = []
        self._open: list[str] = ["other_s"]

    def enter(self, part: str) -> None:
        """Time from here on belongs to ``part``; parts may nest, and the inner one counts."""
        self._stamp()
        self._open.append(part)

    def leave(self) -> None:
        """Time from here on belongs to what the innermost part is in."""
        self._stamp()
        self._open.pop()

    def _stamp(self) -> None:
        if self._cuda:
            event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._stamps.append((self._open[-1], event))
        else:
            self._stamps.append((self._open[-1], time.perf_counter()))

    def seconds(self, call: Callable[[], None]) -> Shares:
        """Runs ``call`` between the first stamp and the last, and sums the gaps between stamps by part."""
        self._wait()
        start = time.perf_counter()
        self._stamp()
        call()
        self._stamp()
        self._wait()
        total_s = time.perf_counter() - start
        sums = {"encode_s": 0.0, "denoise_s": 0.0, "decode_s": 0.0, "other_s": 0.0}
        for (_, before), (part, after) in zip(self._stamps, self._stamps[1:], strict=False):
            sums[part] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        return Shares(**sums, total_s=total_s)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


@contextmanager
def _stamped_modules(parts: Iterable[tuple[nn.Module, str]], clock: Clock) -> Iterator[None]:
    """Stamps at the boundaries of some modules, each with its part, for the block."""
    hooks = []
    for module, part in parts:
        hooks.append(module.register_forward_pre_hook(lambda *_, part=part: clock.enter(part)))
        hooks.append(module.register_forward_hook(lambda *_: clock.leave(), always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _stamped(pipe: Any, clock: Clock) -> Iterator[None]:
    """Stamps at the boundaries of every component, for the block."""
    parts = dict.fromkeys(denoisers(pipe), "denoise_s")
    parts |= {
        name: "encode_s"
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and name.startswith(("text_encoder", "image_encoder"))
    }
    coders = [part for name in ("vae", "vqvae", "movq") if (part := pipe.components.get(name)) is not None]
    for coder in coders:
        coder.__dict__["encode"] = _between(clock, "encode_s", coder.encode)
        coder.__dict__["decode"] = _between(clock, "decode_s", coder.decode)
    try:
        with _stamped_modules([(pipe.components[name], part) for name, part in parts.items()], clock):
            yield
    finally:
        for coder in coders:
            del coder.__dict__["encode"], coder.__dict__["decode"]


def _between(clock: Clock, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def stamped(*args: Any, **kwargs: Any) -> Any:
        clock.enter(part)
        try:
            return method(*args, **kwargs)
        finally:
            clock.leave()

    return stamped

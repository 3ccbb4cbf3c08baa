"""Where batches come from: prompts or labels alone, images, or pairs that a teacher made.

A batch is decided by the seed and its number alone. A resumed run, and a run of another number of processes or
micro-batches at the same global batch, sees the same samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..samplers.errors import InputError
from .conditions import Condition
from .encoder import Encoder, Value
from .latents import Latents
from .method import seed_of
from .pairs import Pairs


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        numbers: int64 (B,), the samples' numbers in the run: position k of global batch i has i times its size plus k.
        condition: what the network is told about them.
        x0: (B, ...) clean samples as the network sees them; None where there are no data.
        start: (B, ...) the states from which a teacher reached ``x0``; None where it did not.
    """

    numbers: Tensor
    condition: Condition
    x0: Tensor | None = None
    start: Tensor | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The batch on a device, its condition in a dtype; samples stay float32."""
        x0, start = (None if rows is None else rows.to(device) for rows in (self.x0, self.start))
        return replace(
            self, numbers=self.numbers.to(device), condition=self.condition.to(device, dtype), x0=x0, start=start
        )


class Order:
    """In which order a run visits items: shuffled anew in each epoch.

    Args:
        size: number of items.
        global_batch: samples of a batch over all processes and micro-batches.
        seed: of the run.

    Raises:
        InputError: when there are no items, or the batch is empty.
    """

    def __init__(self, size: int, global_batch: int, seed: int) -> None:
        if size < 1 or global_batch < 1:
            raise InputError(f"got {size} items and a global batch of {global_batch}; give at least one of each")
        self.size, self.global_batch, self.seed = size, global_batch, seed
        self._epochs: dict[int, Tensor] = {}

    def numbers(self, index: int, positions: Sequence[int]) -> list[int]:
        """Numbers of the samples at some positions of a global batch.

        Raises:
            InputError: when the batch has no such position.
        """
        if any(not 0 <= position < self.global_batch for position in positions) or index < 0:
            raise InputError(
                f"batch {index} has positions 0 to {self.global_batch - 1}; got {min(positions)} to {max(positions)}"
            )
        return [index * self.global_batch + position for position in positions]

    def item(self, number: int) -> int:
        """The item that a sample is made of."""
        epoch, place = divmod(number, self.size)
        if epoch not in self._epochs:
            generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, "order", epoch))
            kept = list(self._epochs.items())[-1:]  # a batch may reach over the end of an epoch
            self._epochs = dict([*kept, (epoch, torch.randperm(self.size, generator=generator))])
        return int(self._epochs[epoch][place])


class Batches(ABC):
    """A source of batches.

    Args:
        size: number of items.
        encoder: of their conditions.
        global_batch: samples of a batch over all processes and micro-batches.
        seed: of the run.
    """

    def __init__(self, size: int, encoder: Encoder, global_batch: int, seed: int) -> None:
        self.encoder = encoder
        self.order = Order(size, global_batch, seed)

    def batch(self, index: int, positions: Sequence[int]) -> Batch:
        """Some samples of a global batch, on the CPU.

        Args:
            index: number of the global batch.
            positions: which of its samples.

        Raises:
            InputError: when the batch has no such position, or a file is missing or damaged.
        """
        numbers = self.order.numbers(index, positions)
        return self._made(numbers, [self.order.item(number) for number in numbers])

    @abstractmethod
    def _made(self, numbers: list[int], items: list[int]) -> Batch:
        """The samples of these numbers, which are made of these items."""


class ConditionBatches(Batches):
    """Prompts or labels alone, for methods that need no data.

    Args:
        values: prompts or labels; (None,) for a pipeline that takes neither.
        encoder: of the pipeline.
        global_batch: samples of a batch over all processes and micro-batches.
        seed: of the run.

    Raises:
        InputError: when the pipeline does not take values of this sort.
    """

    def __init__(self, values: Sequence[Value], encoder: Encoder, global_batch: int, seed: int = 0) -> None:
        super().__init__(len(values), encoder, global_batch, seed)
        encoder.check(values)
        self.values = tuple(values)

    def _made(self, numbers: list[int], items: list[int]) -> Batch:
        return Batch(torch.tensor(numbers), self.encoder.encode([self.values[item] for item in items]))


class ImageBatches(Batches):
    """Images with their captions or labels.

    Args:
        latents: of the images, made.
        global_batch: samples of a batch over all processes and micro-batches.
        seed: of the run; what is drawn from the autoencoder's distribution depends on it too.
    """

    def __init__(self, latents: Latents, global_batch: int, seed: int = 0) -> None:
        super().__init__(len(latents), latents.encoder, global_batch, seed)
        self.latents = latents

    def _made(self, numbers: list[int], items: list[int]) -> Batch:
        x0, values = self.latents.get(items, [seed_of(self.order.seed, number) for number in numbers])
        return Batch(torch.tensor(numbers), self.encoder.encode(values), x0)


class PairBatches(Batches):
    """Pairs of noise and the samples that a teacher reached from it.

    Args:
        pairs: made.
        global_batch: samples of a batch over all processes and micro-batches.
        seed: of the run.
    """

    def __init__(self, pairs: Pairs, global_batch: int, seed: int = 0) -> None:
        super().__init__(len(pairs), pairs.encoder, global_batch, seed)
        self.pairs = pairs

    def _made(self, numbers: list[int], items: list[int]) -> Batch:
        pair = self.pairs.get(items)
        condition = self.encoder.encode([self.pairs.value(item) for item in items])
        return Batch(torch.tensor(numbers), condition, pair.x0, pair.start)

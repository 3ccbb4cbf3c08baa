"""Methods at equal distance to the uncached run: how much faster each is there, between its settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Speed = Callable[[Row], float | None]
"How many times faster than uncached a row is, by operations or by time; None where it was not measured."


@dataclass(frozen=True)
class Point:
    """A setting of a method.

    Attributes:
        distance: paired feature distance to the uncached run.
        speed: how many times faster.
        name: method and setting.
    """

    distance: float
    speed: float
    name: str


@dataclass(frozen=True)
class Equal:
    """The fastest at one distance.

    Attributes:
        peer: the setting of another package that has this distance.
        ours: speed of the best method of this package there, and its name.
        control: speed of fewer steps there.
    """

    peer: Point
    ours: tuple[float, str]
    control: float

    @property
    def ratio(self) -> float:
        """Of our speed to the peer's."""
        return self.ours[0] / self.peer.speed


def distance(row: Row) -> float:
    """Paired feature distance to the uncached run; 0 for that run itself."""
    found = row["metrics"].get("feature_distance")
    return float(found["value"]) if found else 0.0


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that are faster than all that are nearer, nearest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.distance, -point.speed)):
        if not kept or point.speed > kept[-1].speed:
            kept.append(point)
    return kept


def speed_at(points: Sequence[Point], at: float) -> float:
    """Speed of one method at a distance: linear between its settings and from the uncached run, flat after the last.

    Args:
        points: its settings.
        at: distance.
    """
    line = [Point(0.0, 1.0, ""), *frontier(point for point in points if point.speed > 1)]
    return float(np.interp(at, [point.distance for point in line], [point.speed for point in line]))


def curves(rows: Iterable[Row], whose: str, speed: Speed) -> dict[str, list[Point]]:
    """The settings of each method of ours, of others or of the control that were measured, by method."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row["whose"] == whose and row["method"] != "uncached" and (value := speed(row)) is not None:
            point = Point(distance(row), value, f"{row['method']}: {row['setting']}")
            found.setdefault(row["method"], []).append(point)
    return found


def at_equal_distance(rows: Sequence[Row], speed: Speed) -> list[Equal]:
    """Ours against the best setting of other packages, at each distance where one of theirs is the fastest of them."""
    ours, control = curves(rows, "ours", speed), curves(rows, "control", speed)
    theirs = frontier(point for points in curves(rows, "peer", speed).values() for point in points if point.speed > 1)
    return [
        Equal(
            peer,
            max(((speed_at(points, peer.distance), name) for name, points in ours.items()), default=(1.0, "uncached")),
            max((speed_at(points, peer.distance) for points in control.values()), default=1.0),
        )
        for peer in theirs
        if peer.distance > 0
    ]


def by_operations(row: Row) -> float:
    """How many times fewer floating-point operations."""
    return float(row["flops"])


def by_time(batch: int, clock: str) -> Speed:
    """How many times less a call takes with ``batch`` images, by the ``wall`` or the ``processor`` clock."""

    def speed(row: Row) -> float | None:
        found = row["times"].get(str(batch))
        return float(found[clock]["ratio"]) if found else None

    return speed

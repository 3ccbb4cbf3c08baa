"""Which candidates go to the next round."""

from __future__ import annotations

from collections.abc import Sequence

from ..samplers import InputError
from .found import Candidate, Scored
from .objective import QUALITIES, Objective


def leaders(history: Sequence[Candidate], objective: Objective, count: int) -> tuple[Candidate, ...]:
    """The best of the candidates that were measured to the end and keep to the limits.

    Args:
        history: all candidates.
        objective: what they were measured for.
        count: the most that are returned.

    Returns:
        With one objective those of least loss, the best first. With two the front that no other candidate is better
        than in both, in order of cost; of a longer front the ends, and as evenly between them as its order allows.

    Raises:
        InputError: when there are none.
    """
    able = [candidate for candidate in history if candidate.state == "complete" and candidate.holds]
    if not able:
        measured = sum(candidate.state != "failed" for candidate in history)
        limits = ", ".join(map(str, objective.limits))
        reasons = sorted({candidate.reason or "" for candidate in history if candidate.state == "failed"})
        raise InputError(
            f"none of {len(history)} candidates kept to the limits {limits}; relax them, or search longer"
            if measured
            else f"none of {len(history)} candidates ran: {'; '.join(reasons)[:300]}"
        )
    able.sort(key=lambda candidate: (loss_of(candidate, objective), candidate.order))
    if objective.cost is None:
        return tuple(able[:count])
    front: list[Candidate] = []
    for candidate in able:
        if not front or _cost(candidate, objective) < _cost(front[-1], objective):
            front.append(candidate)
    front.reverse()
    if len(front) <= count:
        return tuple(front)
    places = [round(index * (len(front) - 1) / max(count - 1, 1)) for index in range(count)]
    return tuple(front[place] for place in dict.fromkeys(places))


def winner(front: Sequence[Candidate], objective: Objective) -> Candidate:
    """The candidate of best quality on fresh samples among those that keep to the limits there.

    Raises:
        InputError: when none does.
    """
    able = [candidate for candidate in front if candidate.holds]
    if not able:
        limits = ", ".join(map(str, objective.limits))
        raise InputError(f"none of the {len(front)} best candidates kept to the limits {limits} on fresh samples")
    return min(able, key=lambda candidate: loss_of(candidate, objective))


def loss_of(candidate: Candidate, objective: Objective) -> float:
    """The loss of a candidate on fresh samples, or where it was not measured there, at search."""
    value = _scored(candidate).quality.value
    return value if QUALITIES[objective.quality] == "<=" else -value


def _cost(candidate: Candidate, objective: Objective) -> float:
    return _scored(candidate).costs[str(objective.cost)]


def _scored(candidate: Candidate) -> Scored:
    found = candidate.fresh or candidate.at_search
    assert found is not None
    return found

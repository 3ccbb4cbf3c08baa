"""Which branch of guidance an evaluation belongs to, in pipelines that evaluate their branches in turn."""

from __future__ import annotations

from typing import Any

from .cache_call import tensors_in

CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_t5",
    "cap_feats",
    "class_labels",
    "context",
    "prompt_embeds",
)
"Inputs that differ between the branches."


class Branches:
    """Tells the branches of one call apart.

    A pipeline that evaluates its branches in turn hands over the same tensors of conditions at every step: what was
    the second evaluation of the first step stays branch 1, also in a step that leaves the first one out. Where the
    tensors are new in every step the place within the step decides, 0 for the only one.
    """

    def __init__(self) -> None:
        self._known: list[tuple[tuple[str, tuple[int, ...]], int, list[Any]]] = []

    def of(self, component: str, inputs: dict[str, Any], ordinal: int) -> int:
        """The branch of an evaluation.

        Args:
            component: the pipeline's name of the network.
            inputs: arguments of its forward by name.
            ordinal: its place among the evaluations of the step.
        """
        tensors = [value for name in CONDITIONS for value in tensors_in(inputs.get(name))]
        key = (component, tuple(id(tensor) for tensor in tensors))
        for known, branch, _ in self._known:
            if known == key and tensors:
                return branch
        self._known = [entry for entry in self._known if entry[0][0] != component or entry[1] != ordinal]
        self._known.append((key, ordinal, tensors))  # kept alive, so that no other tensor gets its id
        return ordinal

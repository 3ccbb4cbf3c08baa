"""A network that ships with a plan and runs instead of the pipeline's own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .errors import InputError
from .part import Part, Run
from .substitute import MUST_AGREE, check_network, device_of, inner, load_network, own_network
from .weights import WEIGHTS

GUIDANCE_EMBEDDING = "time_cond_proj_dim"
"Entry of a network's config: the width of the embedding of the guidance scale that it is told."


@WEIGHTS.register("student")
class StudentWeights(Part):
    """A network of the pipeline's class, in a folder beside the plan, that runs instead of the pipeline's own.

    While the plan is attached it is the pipeline's component, and pipelines that look at the config of their network
    see the student's: one that is told the guidance scale (``time_cond_proj_dim``, arXiv:2210.03142, Section 3.1) is
    told it where the pipeline knows how. The pipeline's own network stays where it is, and is back after ``detach``.
    That both predict the same thing (epsilon, v, ...) is not written in a network and cannot be checked.
    """

    type: Literal["student"] = "student"
    folder: str = Field(
        default="transformer", min_length=1, description="Folder of the network (save_pretrained) within the plan's."
    )
    component: str | None = Field(
        default=None, description="Which denoiser of the pipeline it replaces; null where it has one."
    )

    @property
    def files(self) -> tuple[str, ...]:
        """Files and folders beside the plan that this part reads."""
        return (self.folder,)

    def prepare(self, run: Run, known_arguments: frozenset[str]) -> None:
        """Loads and checks the network.

        Raises:
            InputError: when there is none in the folder, or it does not fit where the pipeline's own one does.
        """
        component, own = own_network(run.pipe, "student", self.component)
        if component in run.networks or component in run.additions:
            raise InputError(
                f"the student part replaces {component}, which another part of the weights changes; keep one of them"
            )
        if any(hasattr(module, "_hf_hook") for module in own.modules()):
            raise InputError(
                f"{component} is offloaded, which would move to the student; attach the plan to a pipeline without "
                "offloading, or put the student into the pipeline yourself"
            )
        device = device_of(run.pipe, own)
        network = load_network(run, "student", self.folder, own).to(device)
        agree = tuple(entry for entry in MUST_AGREE if entry != GUIDANCE_EMBEDDING)
        check_network(self.folder, network, own, device, agree)
        told = getattr(inner(network), "config", {}).get(GUIDANCE_EMBEDDING)
        name = type(run.pipe).__name__
        if told is not None and not hasattr(run.pipe, "get_guidance_scale_embedding"):
            raise InputError(
                f"network {self.folder!r} is told the guidance scale ({GUIDANCE_EMBEDDING}={told}), which {name} does "
                "not do; use a student without, or a pipeline that does, such as StableDiffusionPipeline"
            )
        if any(hasattr(module, "get_base_layer") for module in own.modules()):
            run.warnings.append(f"{component} has adapters, which do not act on the student that runs instead of it")
        run.replace_network(component, network)
        run.notes.append(f"{self.folder} runs instead of {component}: {len(network.state_dict())} tensors")

"""What ``fewstep search`` is told: one dataclass of flags for each search."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from ..eval.assets import DEMO_TOKENS, Dtype
from ..eval.commandline import Flag
from ..samplers.errors import InputError, unknown_name
from ..search import LADDERS, OPTUNA_SAMPLERS, PRESETS
from ..search.tokens import COSTS


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The flags that every search has."""

    pipe: Annotated[str, Flag("What is searched for.", "PATH|demo:NAME")]
    out: Annotated[Path, Flag("File to write.", "FILE")]
    n: Annotated[int, Flag("Number of samples.")]
    seed: Annotated[int, Flag("Seed of the first sample; fit on others than you score.")] = 1_000_000
    device: Annotated[str | None, Flag("cpu, cuda, cuda:1, ...; default: the best there is.")] = None
    dtype: Annotated[Dtype, Flag("Of weights and computation.")] = "float32"

    noun: ClassVar[str] = "plan"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"--n must be at least 1; got {self.n}")
        if self.out.suffix.lower() != ".json":
            raise InputError(f"--out {self.out} is not a {self.noun} file; give a name that ends in .json")


@dataclass(frozen=True, kw_only=True)
class FitOptions(SearchOptions):
    """The flags of every search on a pipeline."""

    pipe: Annotated[str, Flag("Pipeline folder, or a demo such as demo:fashion-dit.", "PATH|demo:NAME")] = (
        "demo:fashion-dit"
    )
    plan: Annotated[Path | None, Flag("Plan file: everything but the part that is searched.", "FILE")] = None
    out: Annotated[Path, Flag("Plan file to write; files that it names go beside it.", "FILE")] = Path("plan.json")
    n: Annotated[int, Flag("Number of samples to fit on.")] = 512
    prompts: Annotated[Path | None, Flag("Text file with one prompt a line.", "FILE")] = None
    class_labels: Annotated[
        tuple[int, ...], Flag("Labels to cycle through; default: all of the pipeline's.", "LABEL")
    ] = ()
    call_kwargs: Annotated[tuple[str, ...], Flag("Further arguments of the pipeline's call.", "KEY=VALUE")] = ()
    download: Annotated[bool, Flag("Whether weights may be fetched from a hub.")] = False


@dataclass(frozen=True, kw_only=True)
class TaughtOptions(FitOptions):
    """The flags of a search on samples that a teacher makes."""

    teacher: Annotated[Path | None, Flag("Plan that samples what is fitted on; default: 50 steps of DDIM.", "FILE")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class AlignerOptions(TaughtOptions):
    """The flags of ``fewstep search aligner``."""

    mode: Annotated[Literal["sequential", "parallel"], Flag("Which states a ratio is learned on.")] = "sequential"
    iterations: Annotated[int, Flag("Gradient steps for each step of the plan.")] = 500
    lr: Annotated[float, Flag("Learning rate.")] = 2e-3


@dataclass(frozen=True, kw_only=True)
class JudgedOptions(FitOptions):
    """The flags of a search with a judge."""

    scorer: Annotated[Literal["class", "clip"], Flag("Who judges a sample.")] = "class"
    net: Annotated[str, Flag("Feature net of the class scorer.")] = "fashion-features"
    net_path: Annotated[Path | None, Flag("Its folder; for clip a CLIP folder.", "PATH")] = None


@dataclass(frozen=True, kw_only=True)
class AdaptiveOptions(JudgedOptions):
    """The flags of ``fewstep search adaptive``."""

    steps: Annotated[tuple[int, ...], Flag("Numbers of steps to choose from.", "N")] = (4, 6, 8, 10)
    top: Annotated[int, Flag("How many of a sample's best choices count as good.")] = 2
    weight: Annotated[float, Flag("Worth of one unit of the score, beside the share of steps saved.")] = 1.0
    penalty: Annotated[float, Flag("Taken off for a choice that is not good.")] = 1.0
    spacing: Annotated[Literal["leading", "linspace", "trailing"], Flag("Of the steps.")] = "trailing"


@dataclass(frozen=True, kw_only=True)
class EscalateOptions(JudgedOptions):
    """The flags of ``fewstep search escalate``."""

    teacher: Annotated[Path | None, Flag("Plan, with a grid, that finishes rejected samples.", "FILE")] = None
    strength: Annotated[float, Flag("Share of the teacher's grid that runs on a rejected sample.")] = 0.7
    percentile: Annotated[float, Flag("Per cent of the samples to reject.")] = 50.0


@dataclass(frozen=True, kw_only=True)
class StartOptions(TaughtOptions):
    """The flags of ``fewstep search start``."""


@dataclass(frozen=True, kw_only=True)
class KnowledgeOptions(FitOptions):
    """The flags of ``fewstep search knowledge``; the plan has a redi part."""


@dataclass(frozen=True, kw_only=True)
class NetOptions(FitOptions):
    """The flags of a search that judges images."""

    net: Annotated[str | None, Flag("Feature network that judges; default: the demo's own.")] = None
    net_path: Annotated[Path | None, Flag("Its weights, where they do not ship.")] = None
    lpips_path: Annotated[Path | None, Flag("AlexNet weights (safetensors) for lpips.", "FILE")] = None


@dataclass(frozen=True, kw_only=True)
class PlanOptions(NetOptions):
    """The flags of ``fewstep search plan``, which is also what ``fewstep search`` does without an action."""

    n: Annotated[
        int, Flag("Samples that decide between candidates; with tpe and random a quarter stops the worse ones.")
    ] = 512
    steps: Annotated[int | None, Flag("Number of steps of the plan to find; default: those of --plan.", "STEPS")] = None
    preset: Annotated[str, Flag(f"What the other flags default to: {', '.join(PRESETS)}.", "PRESET")] = "fast"
    objective: Annotated[
        str | None, Flag("Quality; default: fd where there are real images, else relative_error.", "QUALITY")
    ] = None
    cost: Annotated[str | None, Flag("Second objective, for a front: nfe, flops or latency_s.", "COST")] = None
    limits: Annotated[tuple[str, ...], Flag("What plans must keep to: nfe<=10, fd<=1.02*teacher.", "LIMIT")] = ()
    space: Annotated[str | None, Flag("What varies, separated by commas: grid,solver,cache ...", "AXES")] = None
    trials: Annotated[int | None, Flag("Distinct plans to measure.")] = None
    sampler: Annotated[
        str | None, Flag(f"Who proposes candidates: {', '.join(OPTUNA_SAMPLERS.names())}.", "SAMPLER")
    ] = None
    starts: Annotated[tuple[Path, ...], Flag("Plans to begin with.", "PLAN")] = ()
    also: Annotated[tuple[str, ...], Flag("Further qualities to measure.", "QUALITY")] = ()
    teacher: Annotated[Path | None, Flag("Plan to compare with; default: the demo's, or 50 steps.", "FILE")] = None
    study: Annotated[Path | None, Flag("Folder of the search, to go on with; default: beside --out.", "DIR")] = None
    storage: Annotated[str | None, Flag("Database instead, for workers on several machines.", "URL")] = None
    search_seed: Annotated[int, Flag("Seed of the proposals.")] = 0
    confirm: Annotated[int, Flag("How many of the best are measured again on fresh samples.")] = 5
    fresh_n: Annotated[int, Flag("Fresh samples for that, and others for the evidence.")] = 2048
    batch_size: Annotated[int, Flag("Samples per call.")] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps must be at least 1; got {self.steps}")

    @property
    def folder(self) -> Path:
        """Where the study and the report are."""
        return self.study or self.out.with_suffix(".search")


@dataclass(frozen=True, kw_only=True)
class CacheOptions(NetOptions):
    """The flags of ``fewstep search cache``."""

    n: Annotated[int, Flag("Samples to choose on, and as many fresh ones to confirm.")] = 32
    cache: Annotated[str, Flag(f"Cache to calibrate: {', '.join(LADDERS.names())}.", "CACHE")] = "gate"
    budget: Annotated[
        str, Flag("How far the samples may be from those without the cache: psnr>=30, lpips<=0.05, fd<=0.2.", "LIMIT")
    ] = "psnr>=30"


@dataclass(frozen=True, kw_only=True)
class RouterOptions(FitOptions):
    """The flags of ``fewstep search router``; ``n`` samples make ``n / batch_size`` iterations."""

    n: Annotated[int, Flag("Samples to train on, each seen once; the state is kept beside the plan.")] = 4096
    batch_size: Annotated[int, Flag("Samples in an iteration.")] = 8
    method: Annotated[Literal["harmonica", "learning-to-cache"], Flag("How the router is trained.")] = "harmonica"
    penalty: Annotated[float, Flag("Cost of a sublayer that computes, in squared error of the prediction.")] = 1e-4
    lr: Annotated[float, Flag("Learning rate.")] = 0.01
    threshold: Annotated[float, Flag("Probability above which a sublayer computes.")] = 0.1


@dataclass(frozen=True, kw_only=True)
class TokenOptions(SearchOptions):
    """The flags of every search on token models, which asks them questions and writes a recipe."""

    noun: ClassVar[str] = "recipe"

    pipe: Annotated[str, Flag("Folder of token models, or demo:tokens.", "PATH|demo:tokens")] = DEMO_TOKENS
    out: Annotated[Path, Flag("Recipe file to write, with what was measured in .trials.json beside it.", "FILE")] = (
        Path("recipe.json")
    )
    n: Annotated[int, Flag("Questions to choose on, and as many fresh ones to report.")] = 256
    seed: Annotated[int, Flag("Seed of the first question; choose on others than you score.")] = 1_000_000
    questions: Annotated[
        Path | None, Flag("Lines of JSON with task, prompt and answers; default: the demo's tasks.", "FILE")
    ] = None
    gen_length: Annotated[int, Flag("Masks after each prompt.")] = 64
    objective: Annotated[str, Flag(f"What is to be least: {', '.join(COSTS)}.", "COST")] = "token_forwards"
    limits: Annotated[
        tuple[str, ...],
        Flag(
            "What recipes must keep to, such as mean_accuracy>=0.9; default: worst_accuracy>=0.98*reference.", "LIMIT"
        ),
    ] = ()
    reference: Annotated[
        str | None,
        Flag("Recipe that limits may be multiples of; default: one token a step, up to the first end.", "FILE|PRESET"),
    ] = None
    batch_size: Annotated[int, Flag("Questions at a time; it does not change answers.")] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gen_length", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(TokenOptions):
    """The flags of ``fewstep search recipe``."""

    recipe: Annotated[str, Flag("Recipe that is varied.", "FILE|PRESET")] = "fast-dllm-dual"
    vary: Annotated[
        tuple[str, ...],
        Flag("A field of it and its values: unmask.threshold=0.5,0.7 cache.type=dual,none.", "FIELD=VALUES"),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class FilterOptions(TokenOptions):
    """The flags of ``fewstep search token-filter``."""

    n: Annotated[int, Flag("Questions to train on, others to choose on, and others to report.")] = 256
    recipe: Annotated[
        str | None,
        Flag("Recipe that gets the filter; default: blocks of its length, up to the first end.", "FILE|PRESET"),
    ] = None
    length: Annotated[int, Flag("Positions of the blocks that the filter is made for.")] = 32
    thresholds: Annotated[tuple[float, ...], Flag("Probabilities of being final to choose from.", "P")] = (
        0.3,
        0.5,
        0.7,
        0.8,
        0.9,
        0.96,
        0.99,
    )
    steps: Annotated[int, Flag("Steps of the optimiser, all data in each.")] = 4000
    lr: Annotated[float, Flag("Learning rate.")] = 3e-3
    train_seed: Annotated[int, Flag("Seed of the filter's first weights.")] = 0


ACTIONS: dict[str, tuple[type[SearchOptions], str]] = {
    "plan": (PlanOptions, "find steps, solver and more; what is done without an action"),
    "aligner": (AlignerOptions, "fit the times that the network is told"),
    "cache": (CacheOptions, "find how much a cache may reuse within a budget of quality"),
    "router": (RouterOptions, "learn which attentions and MLPs of a transformer compute at which step"),
    "adaptive": (AdaptiveOptions, "train a policy that picks the number of steps for each condition"),
    "escalate": (EscalateOptions, "find the score below which a teacher finishes a sample"),
    "start": (StartOptions, "measure the Gaussian from which a late start samples"),
    "knowledge": (KnowledgeOptions, "collect the trajectories that a redi part looks up"),
    "recipe": (RecipeOptions, "find how to decode tokens at the least cost within limits of accuracy"),
    "token-filter": (FilterOptions, "train Learn2PD's filter, and choose its threshold"),
}

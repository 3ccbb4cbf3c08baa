"""Makes docs/distill.md: the methods, and what their students were measured at, from docs/results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..distill.commandline import method_lines
from ..distill.method import METHODS
from ..eval.assets import shipped_plans
from ..samplers import Plan
from ..samplers.files import read_json
from . import markdown

HEAD = """# Distillation, measured

Made by `python -m fewstep.scripts.tables` from the methods and from `docs/results`.

`fewstep distill METHOD` trains a student and leaves it as stock diffusers loads it, with a plan for each number of
steps. All methods run on the same loop; each is one file of `distill/methods/`, and `fewstep distill METHOD --help`
shows its options."""

METHODS_HEAD = """## Methods

*Data* is what a method is trained on: images (or samples of the teacher, `--teacher_samples`), pairs of noise and what
the teacher made of it (`--teacher_samples`), or prompts and labels alone. *Adapter*: whether it trains a LoRA where
`--lora_rank` says nothing; every other one does with `--lora_rank`."""

STUDENTS_HEAD = """## Students of `{demo}`

Against Fashion-MNIST's 10,000 *test* images, {n:,} images a row on seeds from {seed:,} on. Distances are `fd_fashion`,
lower is better, ± one standard error from a jackknife over blocks of seeds; differences are to the teacher in
{steps} steps, on the same seeds. Precision and recall are to training images. The trainings are short ones on one CPU
core: the tables say what a method is worth after minutes, not what it can do. Minutes are wall time of the updates
beside other jobs, up to three times what an idle core takes. A student that began with another one's weights says with
whose; its updates and minutes are its own."""

LARGE_HEAD = "The teacher and the best of them once more, {n:,} images each; `tscd` in half precision:"

SHIPPED_HEAD = """## Students that ship

Beside the demo's plans, weights in half precision: `fewstep bench --steps 1 4` shows them next to the teacher. The
evidence is from seeds on which nothing was chosen, against the *training* images."""

THROUGHPUT_HEAD = """## What an update costs

Seconds of an update of the student, beside the sum of the forward and backward passes that it needs, both measured in
one run: the rest is what the loop costs."""

NEEDS = {"data": "images", "pairs": "pairs", "conditions": "prompts, labels"}


def document(results: Path) -> str:
    """The text of docs/distill.md.

    Args:
        results: the folder of the files that the benchmarks wrote; of what has none there is nothing, or it says so.
    """
    sections = [HEAD, METHODS_HEAD, _methods()]
    for name in ("dit", "unet"):
        sections += _students(results, name)
    sections += [SHIPPED_HEAD, _shipped(), THROUGHPUT_HEAD, _throughput(results / "throughput.json")]
    return "\n\n".join(sections) + "\n"


def _methods() -> str:
    rows = [
        [
            f"`{name}`",
            text,
            NEEDS[METHODS[name].model_validate({"type": name}).needs],
            "yes" if METHODS[name].lora_rank else "",
        ]
        for name, text in method_lines()
    ]
    return markdown.table(["method", "", "data", "adapter"], rows)


def _students(results: Path, name: str) -> Iterator[str]:
    path, large = results / f"students-{name}.json", results / f"students-{name}-large.json"
    if not path.is_file():
        return
    found: Mapping[str, Any] = read_json(path)
    steps = found["teacher"]["plan"]["grid"]["steps"]
    yield STUDENTS_HEAD.format(demo=f"fashion-{name}", n=found["n"], seed=found["seed"], steps=steps)
    teacher = found["teacher"]["metrics"]["fd"]
    yield f"The teacher in {steps} steps: {markdown.number(teacher['value'], teacher['se'])}. Its students:"
    yield _by_steps(found["students"])
    if large.is_file():
        more = read_json(large)
        yield LARGE_HEAD.format(n=more["n"])
        yield _all_scores(more, steps)
    yield "All of it:"
    yield _all_scores(found, steps)
    yield "What they took:"
    head = ["student", "method", "began with", "updates", "batch", "data", "minutes", "memory", "trained parameters"]
    rows = [
        [
            f"`{name}`",
            f"`{student['method']['type']}`",
            f"`{Path(student['student']).parent.name}`" if student.get("student") else "",
            f"{student['updates']:,}",
            str(student["global_batch"]),
            student["data"],
            f"{student['seconds'] / 60:.0f}",
            f"{student['peak_bytes'] / 2**20:,.0f} MiB",
            f"{student['trained_parameters']['student']:,}",
        ]
        for name, student in found["students"].items()
    ]
    yield markdown.table(head, rows)
    yield "```\n" + "\n".join(student["command"] for student in found["students"].values()) + "\n```"


def _all_scores(found: Mapping[str, Any], steps: int) -> str:
    head = ["student", "steps", "fd_fashion", "difference", "accuracy", "precision", "recall"]
    rows = [["teacher", str(steps), *_scores(found["teacher"])]]
    for name, student in found["students"].items():
        rows += [[f"`{name}`", number, *_scores(row)] for number, row in student["rows"].items()]
    return markdown.table(head, rows)


def _by_steps(students: Mapping[str, Any]) -> str:
    """Distances alone, a column for each number of steps; the least of each is bold."""
    every = sorted({int(steps) for student in students.values() for steps in student["rows"]})
    distances = {
        name: {int(steps): row["metrics"]["fd"] for steps, row in student["rows"].items()}
        for name, student in students.items()
    }
    least = {steps: min(each[steps]["value"] for each in distances.values() if steps in each) for steps in every}
    rows = []
    for name, each in distances.items():
        cells = {steps: markdown.number(found["value"], found["se"]) for steps, found in each.items()}
        bold = {steps: f"**{text}**" if each[steps]["value"] == least[steps] else text for steps, text in cells.items()}
        rows.append([f"`{name}`", *(bold.get(steps, "") for steps in every)])
    return markdown.table(["student", *(f"{steps} step{'s' * (steps > 1)}" for steps in every)], rows)


def _scores(row: Mapping[str, Any]) -> list[str]:
    metrics = row["metrics"]
    value, se = row.get("difference", (None, None))
    difference = "" if value is None else markdown.number(value, se, sign="+")
    shares = [metrics.get(name, {}).get("value") for name in ("class_accuracy", "precision", "recall")]
    return [
        markdown.number(metrics["fd"]["value"], metrics["fd"]["se"]),
        difference,
        *("" if each is None else f"{each:.3f}" for each in shares),
    ]


def _shipped() -> str:
    rows, commands = [], []
    for path in shipped_plans("demo:fashion-dit"):
        plan = Plan.load(path)
        if plan.weights:
            scores = (f"{each.metric} {markdown.number(each.value, each.se or 0.0)}" for each in plan.evidence)
            rows.append([f"`{path.stem}`", str(plan.nominal_steps), "; ".join(scores)])
            commands.append(plan.evidence[0].command or "")
    return (
        markdown.table(["plan", "steps", "evidence"], rows) + "\n\n```\n" + "\n".join(dict.fromkeys(commands)) + "\n```"
    )


def _throughput(path: Path) -> str:
    if not path.is_file():
        return "Not measured."
    found = read_json(path)
    rows = [
        [
            f"`{name}`",
            f"{row['update_s']:.3f}",
            f"{row['passes_s']:.3f}",
            f"{row['update_s'] / row['passes_s']:.2f}",
            row["passes"],
        ]
        for name, row in found["rows"].items()
    ]
    table = markdown.table(["method", "update, s", "passes, s", "ratio", "passes of an update"], rows)
    return f"{table}\n\n`{found['command']}`, batch {found['batch']}, {found['device']}."

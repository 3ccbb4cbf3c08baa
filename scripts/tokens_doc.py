"""Makes docs/tokens.md: the decode loop, what its caches and recipes were measured at, and all of its policies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..samplers.files import read_json
from ..samplers.tokens import CACHES, RECIPES, DenoiserSpec, Recipe
from ..samplers.tokens.slots import SLOTS
from .bench.slim_runs import SLIM
from .markdown import number, table
from .tokens_picture import PICTURE, intervals, share_at

RESULTS = "docs/results"
CACHES_FILE = "tokens-caches.json"
BENCHES = f"{SLIM.removesuffix('.json')}*.json"
"One for each length of answers."
FITTED = "eval/demo/plans/tokens"
Found = Mapping[str, Any]
"What a benchmark wrote."

HEAD = """# Tokens: one decode loop

Made by `python -m fewstep.scripts.tables` from the policies, the recipes that ship, and `docs/results`.

A masked-diffusion model fills in masks. `decode` runs one loop over it: which block of masks is next, what the model
evaluates and what it takes from a cache, which tokens are committed, what is taken back, when there is no need to go
on. Each of these is a slot, each policy a small frozen class, and a `Recipe` says which policies fill the slots; it is
saved and loaded like a plan. Rows of a batch do not see each other, and rows that are done cost nothing.

```python
from fewstep.eval.tokens import load_token_models
from fewstep.samplers.tokens import RECIPES, Refresh, decode

models = load_token_models("demo:tokens")
recipe = RECIPES["fast-dllm"].replace(cache=Refresh(prompt_refresh=2))
decoded = decode(models.denoisers["masked"], [models.ids("sort dbca\\n")], 64, recipe)
print(models.text(decoded.answers[0]), decoded.nfe, decoded.token_forwards, decoded.exact)
```

`nfe` counts forward passes of a row, `token_forwards` the positions that were evaluated in them, which is what a cache
saves, and `tokens_per_forward` is new tokens by passes, as transformers counts them. `exact` says whether the tokens
are those of the same recipe without a cache; the loop finds that out in each step and takes no policy's word for it."""

BENCH_HEAD = """## Recipes on the tasks

Accuracy is the share of right answers, ± one standard error; costs are for each answer. *Work* is NFE times
token-forwards, as a part of what one token a step over the whole answer takes, as LLaDA decodes. `one-token-eot` is one
token a step too, in blocks, and decodes no padding: what a recipe gains beyond it comes from the recipe. A control has
as many tokens in every step as fit the network evaluations of the recipe that it controls."""

LENGTH_HEAD = """### {gen_length} masks

{n:,} questions a row. Tokens per second are those of batches of {batch_size} on {device} with {torch_threads} thread,
beside other work: they say little of other machines."""

AGREEMENT_HEAD = """## Caches along uncached trajectories

What no cache decodes is decoded again with each cache, the tokens and their order given, so that one wrong token does
not lead to others: {n:,} questions, {gen_length} masks in blocks of 32. The share of open positions whose likeliest
token is the one that no cache finds likeliest, in the answer up to its end. Of *certain* tasks (`copy`, `reverse`,
`sort`, `replace-index`) only one answer is right; of *dependent* ones (`replace-random`, `shuffle`, `latin-3`,
`latin-4`) several are, so that tokens decide about others. Cells are *certain / dependent*, and in brackets the
token-forwards as a part of those of no cache; standard errors are over questions. An interval of 32 steps is once a
block. `refresh prompt` and `refresh answer` are the cache `refresh` with an interval of one part, while the other is
evaluated where a block begins, or in every step; with one interval for both it is all but `dual`. `sub-block` has
trajectories of its own, in sub-blocks of 8."""

ACCURACY_HEAD = """## Caches that decode by themselves

{answers:,} questions a row, on which nothing was chosen; differences are to no cache, on the same questions, ± one
standard error, bold beyond two."""

POLICIES = {
    "one": "one token a step, the surest",
    "threshold": "every token of probability 0.9, or the surest",
    "random": "one token a step, in an order drawn beforehand",
}
PAPER = re.compile(r"\b(\d{4}\.\d{5})\b")
FULL = DenoiserSpec(mask_id=1, vocab_size=2)
BLOCK_CAUSAL = DenoiserSpec(mask_id=1, vocab_size=2, attention="block-causal", block_length=1)
EXACT_SETTINGS: tuple[dict[str, int], ...] = (
    {"refresh": 1},
    {"prompt_refresh": 1, "answer_refresh": 1},
    {"local_steps": 0},
)
"Settings under which every step evaluates everything, of caches that have these fields."


def document(results: Path, fitted: Path) -> str:
    """The text of docs/tokens.md.

    Args:
        results: the folder of the files that the benchmarks wrote; a section without its file is left out.
        fitted: the folder of the recipes that searches found.
    """
    caches = _read(results / CACHES_FILE)
    found = ((path.name, dict(read_json(path))) for path in results.glob(BENCHES))
    benches = dict(sorted(found, key=lambda pair: int(pair[1]["gen_length"])))
    lengths = [block for found in benches.values() for block in _bench(found)]
    sections = [
        HEAD,
        *([BENCH_HEAD] if benches else ()),
        *lengths,
        *(_caches(caches) if caches else ()),
        *_fitted(fitted),
        _catalogue(),
        _presets(),
    ]
    commands = _commands(benches, caches)
    return "\n\n".join([*sections, *commands]) + "\n"


def _read(path: Path) -> dict[str, Any] | None:
    return dict(read_json(path)) if path.is_file() else None


def _bench(found: Found) -> list[str]:
    """The tables of one length of answers."""
    rows = found["rows"]
    whole = next(row["nfe"] * row["token_forwards"] for row in rows if row["role"] == "reference")
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    first = [name for name in metrics if name.startswith(("worst", "mean"))]
    tasks = [name for name in metrics if name not in first]
    words = [name.replace("_", " ") for name in first]
    costs = ["NFE", "token-forwards", "work", "tokens per forward", "exact", "tokens/s"]
    cells = [
        [
            f"`{row['name']}`",
            row["role"],
            *(_pair(row["metrics"].get(name)) for name in first),
            f"{row['nfe']:.1f}",
            f"{row['token_forwards']:,.0f}",
            _part(row["nfe"] * row["token_forwards"], whole),
            f"{row['tokens_per_forward']:.2f}",
            "yes" if row["exact"] else "no",
            f"{row['tokens_per_s']:,.0f}",
            f"`{row['control']}`" if row["control"] else "",
        ]
        for row in rows
    ]
    blocks = [LENGTH_HEAD.format(**found), table(["recipe", "role", *words, *costs, "control"], cells)]
    if tasks:
        each = [[f"`{row['name']}`", *(_pair(row["metrics"].get(name)) for name in tasks)] for row in rows]
        blocks += ["Each metric:", table(["recipe", *(name.removeprefix("accuracy_") for name in tasks)], each)]
    return blocks


def _part(some: float, whole: float) -> str:
    """One number as a part of another."""
    return f"{some / whole:.2f}" if 10 * some > whole else f"1/{whole / some:,.0f}"


def _pair(found: Sequence[Any] | None) -> str:
    if found is None:
        return ""
    return number(found[0], found[1]) if found[1] is not None else f"{found[0]:.2f}"


def _caches(found: Found) -> list[str]:
    blocks = [AGREEMENT_HEAD.format(**found), f"![Agreement of caches]({PICTURE})"]
    for kind, head in (("agreement", ""), ("accuracy", ACCURACY_HEAD.format(**found))):
        blocks += [head] * bool(head)
        for (model, about), policy in product(found["models"].items(), POLICIES):
            rows = [row for row in found.get(kind, ()) if (row["model"], row["policy"]) == (model, policy)]
            if not rows:
                continue
            full = about["attention"] == "full"
            attention = "full attention" if full else f"block-causal attention, {about['block_length']} to a block"
            blocks.append(f"**`{model}` ({attention}), {POLICIES[policy]}:**")
            if kind == "agreement":
                blocks += _agreement(rows, details=full and policy == "one")
            else:
                blocks += [_accuracy(rows), *(_verdicts(rows) if full else ())]
    return blocks


def _agreement(rows: Sequence[Found], *, details: bool) -> list[str]:
    """Tables of one trajectory: by interval, the settings without one, and in detail divergences and tasks."""
    swept, blocks = [row for row in rows if row["interval"]], []
    every = intervals(swept)
    families = list(dict.fromkeys(row["family"] for row in swept))

    def by_interval(cell: Callable[[Found], str]) -> str:
        found = {(row["family"], row["interval"]): cell(row) for row in swept}
        cells = [[name, *(found.get((name, interval), "") for interval in every)] for name in families]
        return table(["steps between refreshes", *map(str, every)], cells)

    if swept:
        errors = [row["answer"][kind]["same"][1] for row in swept for kind in ("certain", "dependent")]
        shares = by_interval(
            lambda row: f"{_same(row, 'certain')} / {_same(row, 'dependent')} ({row['token_forwards']:.2f})"
        )
        blocks += [shares, f"Standard errors are at most {max(errors):.3f}."]
    if swept and details:
        blocks.append("Mean divergence from the uncached distribution on dependent tasks, in nats:")
        blocks.append(by_interval(lambda row: f"{row['answer']['dependent']['kl'][0]:.3f}"))
    rest = [row for row in rows if not row["interval"]]
    if rest:
        head = ["cache", "certain", "dependent", "divergence", "committed", "token-forwards", "claims exact", "exact"]
        blocks += [
            "Without an interval of steps; *committed* is the share at the position committed next, over all tasks:"
        ]
        blocks.append(table(head, [_single(row) for row in rest]))
    if swept and details:
        last = {name: max(intervals([row for row in swept if row["family"] == name])) for name in families}
        tasks = [name for name in rows[0]["answer"] if name not in ("total", "certain", "dependent")]
        cells = [
            [_name(row), *(_same(row, name) for name in (*tasks, "total")), f"{row['open']['same'][0]:.3f}"]
            for row in swept
            if row["interval"] == last[row["family"]]
        ]
        blocks += ["By task at the longest interval, and over everything that was open, what lies behind answers too:"]
        blocks.append(table(["cache", *tasks, "all", "all that was open"], cells))
    return blocks


def _same(row: Found, kind: str) -> str:
    return f"{share_at(row, kind):.3f}"


def _name(row: Found) -> str:
    return f"{row['family']} {row['setting']}".strip()


def _single(row: Found) -> list[str]:
    answer = row["answer"]
    return [
        _name(row),
        *(number(answer[kind]["same"][0], answer[kind]["same"][1], 3) for kind in ("certain", "dependent")),
        f"{answer['dependent']['kl'][0]:.3f}",
        f"{answer['total']['committed_same'][0]:.3f}",
        f"{row['token_forwards']:.2f}",
        "yes" if row["claims"] else "no",
        "yes" if row["exact"] else "no",
    ]


def _accuracy(rows: Sequence[Found]) -> str:
    tasks = list(rows[0]["tasks"])
    head = [
        "cache",
        "worst",
        "mean",
        "certain",
        "less no cache",
        "dependent",
        "less no cache",
        "token-forwards",
        "exact",
    ]
    cells = [
        [
            _name(row) + (" (sub-blocks)" if row["family"] == "none" and row["blocks"]["type"] == "nested" else ""),
            number(*row["tasks"][row["worst"]]) + f" `{row['worst']}`",
            number(*row["mean"]),
            number(*row["certain"]),
            _difference(row["less_uncached"].get("certain")),
            number(*row["dependent"]),
            _difference(row["less_uncached"].get("dependent")),
            f"{row['token_forwards']:,.0f}",
            "yes" if row["exact"] else "no",
            *(f"{row['tasks'][name][0]:.2f}" for name in tasks),
        ]
        for row in rows
    ]
    return table([*head, *tasks], cells)


def _difference(pair: Sequence[float] | None) -> str:
    if pair is None:
        return ""
    text = number(pair[0], pair[1], sign="+")
    return f"**{text}**" if abs(pair[0]) > 2 * pair[1] else text


def _verdicts(rows: Sequence[Found]) -> list[str]:
    """What the table says of caches that keep the prompt, and of those that do not."""
    found = []
    for frozen, said in ((True, "keep the prompt as a block's first steps left it"), (False, "renew the prompt")):
        chosen = [row for row in rows if row["frozen"] == frozen and not row["exact"] and row["less_uncached"]]
        if not chosen:
            continue
        losses = []
        for kind in ("certain", "dependent"):
            lost = [row for row in chosen if -row["less_uncached"][kind][0] > 2 * row["less_uncached"][kind][1]]
            worst = min(chosen, key=lambda row: row["less_uncached"][kind][0])
            most = f"at most {max(0.0, -worst['less_uncached'][kind][0]):.2f}, {_name(worst)}"
            losses.append(f"in {len(lost)} of {len(chosen)} rows on {kind} tasks ({most})")
        found.append(f"Caches that {said} lose beyond two standard errors {' and '.join(losses)}.")
    return found


def _fitted(folder: Path) -> list[str]:
    """The recipes of a folder that have evidence, and that."""
    blocks = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        recipe = Recipe.load(path)
        if not recipe.evidence:
            continue
        blocks.append(f"### `{path.stem}`\n\n{_slots(recipe)}")
        cells = [
            [
                each.metric,
                f"{each.value:.4g}" if each.se is None else number(each.value, each.se, 3),
                f"{each.n:,}",
                "" if each.seeds is None else f"{each.seeds[0]:,} to {each.seeds[1] - 1:,}",
                each.against or "",
            ]
            for each in recipe.evidence
        ]
        blocks.append(table(["measured", "", "n", "seeds", "against"], cells))
        commands = dict.fromkeys(each.command for each in recipe.evidence if each.command)
        if commands:
            blocks.append("```bash\n" + "\n".join(commands) + "\n```")
    if not blocks:
        return []
    return ["## Recipes that were fitted\n\nChosen on one half of the questions, reported on the other.", *blocks]


def _slots(recipe: Recipe) -> str:
    """The policies of a recipe in a line, with the settings that are not their defaults."""
    said = []
    for field in ("blocks", "unmask", "propose", "exit", "remask", "cache", "logits", "constraint", "scorer"):
        value = getattr(recipe, field)
        for policy in value if isinstance(value, tuple) else (value,):
            kind = getattr(policy, "type", "")
            changed = {k: v for k, v in policy.model_dump(mode="json", exclude_defaults=True).items() if k != "type"}
            if kind == "none" or not (kind or changed):
                continue
            settings = ", ".join(f"{name} {_value(value)}" for name, value in changed.items())
            said.append(f"{field} `{kind}`" * bool(kind) + field * (not kind) + f" ({settings})" * bool(settings))
    return "; ".join(said)


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _catalogue() -> str:
    blocks = ["## Policies"]
    for slot, (registry, kind) in SLOTS.items():
        names = [name for name in registry.names() if name != "none"]
        about = (kind.__doc__ or "").split("\n")[0]
        if registry is CACHES:
            blocks.append(CACHES_HEAD)
            rows = [[f"`{name}`", *_said(CACHES[name]), *_exactness(name)] for name in names]
            blocks.append(table(["cache", "", "papers", "full attention", "block-causal"], rows))
        else:
            blocks.append(f"**`{slot}`**: {about[0].lower()}{about[1:]}")
            blocks.append(
                table([registry.what, "", "papers"], [[f"`{name}`", *_said(registry[name])] for name in names])
            )
    return "\n\n".join(blocks)


CACHES_HEAD = """**`cache`**: what is not evaluated again. The last columns say whether a cache claims to be exact at
its defaults, on which attention, or else the settings under which it does."""


def _said(policy: type) -> list[str]:
    """The first line of a docstring without its papers' numbers, and links to these."""
    text = policy.__doc__ or ""
    return [text.split("\n")[0].replace("|", "\\|"), ", ".join(_links(PAPER.findall(text)))]


def _links(papers: Iterable[str]) -> list[str]:
    return [f"[{paper}](https://arxiv.org/abs/{paper})" for paper in dict.fromkeys(papers)]


def _exactness(name: str) -> list[str]:
    """What a cache claims, for both kinds of attention."""
    cache = CACHES[name]
    found = []
    for spec in (FULL, BLOCK_CAUSAL):
        if cache.model_validate({}).exactness(spec):
            found.append("exact")
            continue
        settings = next(
            (
                each
                for each in EXACT_SETTINGS
                if each.keys() <= cache.model_fields.keys() and cache.model_validate(each).exactness(spec)
            ),
            None,
        )
        said = settings and " and ".join(f"`{field}` {value}" for field, value in settings.items())
        found.append(f"exact with {said}" if said else "approximate")
    return found


def _presets() -> str:
    rows = [[f"`{name}`", _slots(RECIPES[name])] for name in RECIPES.names()]
    return "## Presets\n\n`decode(..., recipe=NAME)`, with the papers' defaults.\n\n" + table(["recipe", "slots"], rows)


def _commands(benches: Mapping[str, Found], caches: Found | None) -> list[str]:
    """The commands that measure all of it anew."""
    lines = []
    for name, bench in benches.items():
        lines += [bench["command"], f"python -m fewstep.scripts.bench.slim_runs OUT {RESULTS}/{name}"]
    if caches:
        flags = " ".join(f"--{name} {caches[name]}" for name in ("pipe", "n", "answers", "gen_length"))
        out = f"{RESULTS}/{CACHES_FILE}"
        lines.append(f"python -m fewstep.scripts.bench.token_caches --work work/tokens {flags} --out {out}")
    return ["## Commands\n\n```bash\n" + "\n".join(lines) + "\n```"] if lines else []

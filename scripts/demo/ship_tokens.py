"""Writes the trained token models into ``eval/demo/tokens``, in half precision, with cards that say what they score."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from fewstep.eval.tokens import TASKS, TokenModels, answers, causal_answers, task_questions
from fewstep.eval.tokens.accuracy import accuracy
from fewstep.samplers.files import read_json, write_json, write_text
from fewstep.samplers.tokens import (
    EosExit,
    Fixed,
    Quota,
    Recipe,
    TransformersCausal,
    TransformersDenoiser,
    load_causal,
    load_denoiser,
)
from fewstep.scripts.demo.ship_teachers import parameters
from fewstep.scripts.demo.token_data import VOCABULARY, new_tokenizer
from fewstep.scripts.demo.train_tokens import BLOCK, KINDS, TOKENS, save_model, spec_of
from fewstep.scripts.demo.trainer import read_header

SUMMARIES = {
    "masked": """A masked-diffusion model (MDLM, arXiv:2406.07524) with attention in both directions, whose outputs
predict the token after theirs""",
    "block": f"""A block-diffusion model (arXiv:2503.09573) with block-causal attention, {BLOCK} tokens a block
counted from the first of the answer""",
    "ar": "The autoregressive twin of the two diffusion models",
}

CARD = """# tokens/{kind}

{summary}:
a Llama of {count:,} parameters over {vocabulary} tokens, one for each character. `masked`, `block` and `ar` have one
shape, one tokenizer and one data set.

```python
from transformers import AutoTokenizer

from fewstep.samplers.tokens import {loader}

model = {loader}("eval/demo/tokens/{kind}")
tokenizer = AutoTokenizer.from_pretrained("eval/demo/tokens/{kind}")
```

* Prompts: `NAME ITEMS` and a newline, with NAME one of
  {tasks}; or `verse ` and the first words of a verse. `fewstep.eval.tokens` makes and judges them.
* Data: these tasks, generated without end, and the King James Bible (1611; its copyright has expired) as Debian's
  package `bible-kjv-text` has it, without every fiftieth verse.
* Training: {begun}{steps} steps of {tokens:,} tokens, AdamW, cosine decay from {lr}, averaged weights (decay {ema}),
  {minutes:.0f} minutes on a CPU shared with other work: `python -m fewstep.scripts.demo.train_tokens --kind {kind}`.
* Share of right answers to {n} questions of other seeds than the training's, the likeliest token each time{pace}:
  {scores}.
* Weights in half precision, computed in float32. Licence: Apache-2.0.
"""


FIRST_QUESTION = 10_000_000
"Seed of the first question of the scores."


def scores(kind: str, loaded: TransformersCausal | TransformersDenoiser, n: int) -> str:
    """The share of right answers of each task."""
    questions, room = task_questions(range(FIRST_QUESTION, FIRST_QUESTION + n)), max(t.most for t in TASKS.values()) + 1
    if isinstance(loaded, TransformersCausal):
        reader = TransformersDenoiser(loaded.model, spec_of("masked"))
        found = causal_answers(TokenModels(kind, new_tokenizer(), {kind: reader}, loaded), questions, room)
    else:
        length = room if loaded.spec.attention == "full" else None
        recipe = Recipe(blocks=Fixed(length=length), unmask=Quota(tokens=1), exit=EosExit())
        found = answers(TokenModels(kind, new_tokenizer(), {kind: loaded}, None), questions, recipe, room)
    shares = accuracy(found).tasks
    return ", ".join(f"{task} {shares[task].value:.2f}" for task in TASKS)


def card(
    kind: str, loaded: TransformersCausal | TransformersDenoiser, header: dict[str, str], start_step: int | None, n: int
) -> str:
    """The model card."""
    when = "" if start_step is None else f" after {start_step:,} of its steps"
    recipe = json.loads(header["recipe"])
    return CARD.format(
        kind=kind,
        summary=SUMMARIES[kind],
        count=parameters(loaded.model),
        n=n,
        pace="" if kind == "ar" else ", one a step",
        scores=scores(kind, loaded, n),
        vocabulary=VOCABULARY,
        loader="load_causal" if kind == "ar" else "load_denoiser",
        tasks=", ".join(f"`{name}`" for name in TASKS),
        begun="" if kind == "ar" else f"from the averaged weights of `ar`{when}, ",
        steps=header["step"],
        tokens=TOKENS,
        lr=recipe["lr"],
        ema=recipe["ema"],
        minutes=float(header["train_s"]) / 60,
    )


def ship(kind: str, work: Path, folder: Path, start_step: int | None = None, n: int = 640) -> None:
    """Copies a run's model into ``folder``, and writes its card.

    Args:
        kind: what was trained.
        work: folder of a run of train_tokens that has ended.
        folder: to write.
        start_step: of the autoregressive run whose weights this one began from; None for its last.
        n: questions that it is scored on.
    """
    read: Callable[[Path], TransformersCausal | TransformersDenoiser]
    read = load_causal if kind == "ar" else load_denoiser
    save_model(kind, folder, read(work / "model").model.half())
    (folder / "model.safetensors").chmod(0o644)
    config = folder / "config.json"
    write_json(config, {key: value for key, value in read_json(config).items() if key != "_name_or_path"})
    write_text(folder / "README.md", card(kind, read(folder), read_header(work), start_step, n))


def main() -> None:
    """Writes ``--out``/tokens/KIND."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--work", type=Path, required=True, help="run of train_tokens")
    parser.add_argument("--out", type=Path, required=True, help="such as eval/demo")
    parser.add_argument("--start_step", type=int, help="of the autoregressive run that this one began from")
    parser.add_argument("--n", type=int, default=640, help="questions that it is scored on")
    options = parser.parse_args()
    ship(options.kind, options.work, options.out / "tokens" / options.kind, options.start_step, options.n)


if __name__ == "__main__":
    main()

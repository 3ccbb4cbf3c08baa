"""Writes the trained token models into ``eval/demo/tokens``, in half precision, with a card."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fewstep.eval.tokens import TASKS
from fewstep.samplers.files import read_json, write_json, write_text
from fewstep.samplers.tokens import TransformersCausal, TransformersDenoiser, load_causal, load_denoiser
from fewstep.scripts.demo.ship_teachers import parameters
from fewstep.scripts.demo.token_data import VOCABULARY
from fewstep.scripts.demo.train_tokens import BLOCK, KINDS, TOKENS, save_model
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
* Weights in half precision, computed in float32. Licence: Apache-2.0.
"""


def card(kind: str, count: int, header: dict[str, str]) -> str:
    """The model card."""
    recipe = json.loads(header["recipe"])
    return CARD.format(
        kind=kind,
        summary=SUMMARIES[kind],
        count=count,
        vocabulary=VOCABULARY,
        loader="load_causal" if kind == "ar" else "load_denoiser",
        tasks=", ".join(f"`{name}`" for name in TASKS),
        begun="" if kind == "ar" else "from the weights of `ar`, ",
        steps=header["step"],
        tokens=TOKENS,
        lr=recipe["lr"],
        ema=recipe["ema"],
        minutes=float(header["train_s"]) / 60,
    )


def ship(kind: str, work: Path, folder: Path) -> None:
    """Copies a run's model into ``folder``, and writes its card.

    Args:
        kind: what was trained.
        work: folder of a run of train_tokens that has ended.
        folder: to write.
    """
    loaded: TransformersCausal | TransformersDenoiser
    loaded = load_causal(work / "model") if kind == "ar" else load_denoiser(work / "model")
    model = loaded.model.half()
    save_model(kind, folder, model)
    (folder / "model.safetensors").chmod(0o644)
    config = folder / "config.json"
    write_json(config, {key: value for key, value in read_json(config).items() if key != "_name_or_path"})
    write_text(folder / "README.md", card(kind, parameters(model), read_header(work)))


def main() -> None:
    """Writes ``--out``/tokens/KIND."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--work", type=Path, required=True, help="run of train_tokens")
    parser.add_argument("--out", type=Path, required=True, help="such as eval/demo")
    options = parser.parse_args()
    ship(options.kind, options.work, options.out / "tokens" / options.kind)


if __name__ == "__main__":
    main()

"""What the demo's token models learn: tasks with known answers, and the verses of the King James Bible.

Characters are the tokens. An item of a task is then one token, a text comes back as it was, an automaton over
characters is one over tokens, and the vocabulary depends on no text and leaves the parameters to the layers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from fewstep.eval.tokens import TASKS, Example

EOS, MASK, BOS, UNKNOWN = 0, 1, 2, 3
"Ids of the special tokens."
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
VOCABULARY = 4 + len(CHARACTERS)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: a fixed vocabulary of printable ASCII characters, the newline and four special tokens."""
    names = ["<eos>", "<mask>", "<bos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<eos>",
        mask_token="<mask>",
        bos_token="<bos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def read_verses(path: Path) -> list[str]:
    """The verses of the King James Bible, without their references.

    Args:
        path: what ``bible -f 'Ge1:1-Rev22:21'`` prints: one verse a line, after its reference.

    Raises:
        FileNotFoundError: when there is no such file, with how to make it.
        ValueError: when it is another text.
    """
    how = (
        "install Debian's packages bible-kjv and bible-kjv-text (apt-get install bible-kjv), run "
        "bible -f 'Ge1:1-Rev22:21' > kjv.txt, and give that file with --text"
    )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {how}")
    found = re.findall(r"^[A-Z0-9]\w*\d+:\d+ (.+)$", path.read_text(encoding="ascii", errors="replace"), re.MULTILINE)
    if not found:
        raise ValueError(f"{path} has no verses such as 'Ge1:1 In the beginning...'; {how}")
    return found


VERSE = "verse "
"How the prompt of a text begins; the first words of the verse follow."
HELD_OUT = 50
"Every fiftieth verse is kept for measuring."


def split_verses(verses: Sequence[str]) -> tuple[list[str], list[str]]:
    """The verses to train on, and those held out."""
    held = list(verses[::HELD_OUT])
    return [verse for number, verse in enumerate(verses) if number % HELD_OUT], held


def verse_example(verse: str, draw: random.Random) -> Example:
    """The first words of a verse as the prompt, up to 32 characters, and the rest as the answer."""
    ends = [0, *(match.end() for match in re.finditer(r" ", verse[:32]))]
    cut = draw.choice(ends)
    return Example(VERSE + verse[:cut], verse[cut:])


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one length: a prompt, its answer, and end tokens up to the length.

    Attributes:
        tokens: (R, L) int64.
        answer: (R,) int64, where the answers begin.
        end: (R,) int64, where their first end token is.
    """

    tokens: Tensor
    answer: Tensor
    end: Tensor


class Mixture:
    """Batches of tasks and verses.

    Args:
        tokenizer: turns them into tokens.
        verses: to learn.
    """

    def __init__(self, tokenizer: Any, verses: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._verses = sorted(verses, key=len)
        self._lengths = torch.tensor([len(verse) for verse in self._verses])

    def batch(self, rows: int, length: int, text_share: float, draw: random.Random) -> Batch:
        """Rows of ``length`` tokens, of which ``text_share`` are verses; what does not fit is not drawn."""
        fitting = int((self._lengths < length - len(VERSE)).sum())
        texts = int(rows * text_share) if fitting else 0
        chosen = [verse_example(self._verses[draw.randrange(fitting)], draw) for _ in range(texts)]
        chosen += [TASKS[draw.choice(tuple(TASKS))].example(draw, length) for _ in range(rows - texts)]
        return self.pack(chosen, length)

    def pack(self, chosen: Sequence[Example], length: int) -> Batch:
        """Examples as rows of ``length`` tokens."""
        ids = self._tokenizer([example.prompt + example.answer for example in chosen]).input_ids
        tokens = torch.full((len(chosen), length), EOS)
        for row, written in enumerate(ids):
            tokens[row, : len(written)] = torch.tensor(written)
        return Batch(
            tokens=tokens,
            answer=torch.tensor([len(example.prompt) for example in chosen]),
            end=torch.tensor([len(written) for written in ids]),
        )

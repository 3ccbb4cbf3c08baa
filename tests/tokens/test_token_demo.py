"""The demo's token models: what they learn, how they are trained, and the folders that hold them."""

import json
import math
import random
import sys

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fewstep.eval.tokens import TASKS, task_questions
from fewstep.samplers import InputError
from fewstep.samplers.tokens import (
    DenoiserSpec,
    Quota,
    Recipe,
    TransformersDenoiser,
    decode,
    load_causal,
    load_denoiser,
    save_denoiser,
    vocabulary_of,
)
from fewstep.scripts.demo import ship_tokens, train_tokens
from fewstep.scripts.demo.token_data import (
    BOS,
    CHARACTERS,
    EOS,
    MASK,
    VOCABULARY,
    Mixture,
    new_tokenizer,
    read_verses,
    split_verses,
    verse_example,
)

VERSES = "Ge1:3 And God said, Let there be light.\n1Ki2:4 So it was.\nRev22:21 Amen, and (again) 'amen'; yea?\n"
NEW_MODEL = train_tokens.new_model
KINDS = pytest.mark.parametrize("kind", train_tokens.KINDS)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "kjv.txt"
    path.write_text(VERSES)
    return path


@pytest.fixture
def mixture(text):
    return Mixture(new_tokenizer(), read_verses(text))


def tiny():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NEW_MODEL(width=32, layers=1).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_tokenizer_gives_each_character_one_token_and_the_text_back(tmp_path):
    tokenizer = new_tokenizer()
    assert len(tokenizer) == VOCABULARY
    for text in (
        CHARACTERS,
        "sort dcab\n",
        ' {"a": [1, 2]}  \n\n ',
        *(question.prompt for question in task_questions(range(20))),
    ):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
    assert [tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.bos_token_id] == [EOS, MASK, BOS]
    assert vocabulary_of(tokenizer) == [None] * 4 + list(CHARACTERS)
    tokenizer.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded("sort\n").input_ids == tokenizer("sort\n").input_ids


def test_verses_lose_their_references_and_one_in_fifty(text, tmp_path):
    verses = read_verses(text)
    assert verses == ["And God said, Let there be light.", "So it was.", "Amen, and (again) 'amen'; yea?"]
    kept, held = split_verses([str(number) for number in range(200)])
    assert held == ["0", "50", "100", "150"]
    assert sorted(kept + held, key=int) == [str(number) for number in range(200)]
    cut = {verse_example(verses[0], random.Random(seed)).prompt for seed in range(50)}
    assert {"verse ", "verse And ", "verse And God said, "} <= cut
    with pytest.raises(FileNotFoundError, match="install Debian's packages bible-kjv and bible-kjv-text"):
        read_verses(tmp_path / "absent.txt")
    (tmp_path / "other.txt").write_text("no verses\n")
    with pytest.raises(ValueError, match="has no verses such as"):
        read_verses(tmp_path / "other.txt")


def test_batches_are_prompt_answer_and_ends(mixture):
    tokenizer = new_tokenizer()
    batch = mixture.batch(40, 64, 0.5, random.Random(0))
    verses = 0
    for row, start, end in zip(batch.tokens, batch.answer.tolist(), batch.end.tolist(), strict=True):
        prompt, answer = tokenizer.decode(row[:start]), tokenizer.decode(row[start:end])
        assert (row[end:] == EOS).all()
        assert end < 64
        verses += prompt.startswith("verse ")
        assert prompt.startswith("verse ") or TASKS[prompt.split()[0]].right(prompt, answer)
    assert verses == 20
    longest = max(train_tokens.LENGTHS)
    assert longest - max(len(question.prompt) for question in task_questions(range(400))) >= 256


def test_times_are_one_in_each_of_even_spans():
    for shape in ((7, 1), (3, 5)):
        time = train_tokens.times(shape, generator())
        assert time.shape == shape
        assert (time > 0).all()
        assert sorted((time * time.numel()).ceil().flatten().tolist()) == list(range(1, time.numel() + 1))


@pytest.mark.parametrize("kind", ["masked", "block"])
def test_of_a_model_that_knows_nothing_a_loss_is_the_logarithm_of_the_vocabulary(kind, mixture):
    model = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    batch = mixture.batch(16, 40, 0.2, random.Random(0))
    for seed in range(20):
        loss = train_tokens.LOSSES[kind](model, batch, generator(seed))
        assert loss.item() == pytest.approx(math.log(VOCABULARY), rel=1e-5)


def test_masked_loss_is_that_of_the_positions_that_decoding_reads(mixture):
    """Of the denoiser that the loop asks, which knows that outputs predict the token after them."""
    model, batch = tiny(), mixture.batch(6, 40, 0.3, random.Random(1))
    seen, hidden = train_tokens.noised(batch, train_tokens.times((6, 1), generator(3)), generator(4))
    denoiser, weight = TransformersDenoiser(model, train_tokens.spec_of("masked")), train_tokens.weights(batch)
    read = []

    def watch(state):
        read.append(state.raw.log_softmax(1)[state.masked[state.at]])

    decode(denoiser, seen, 0, Recipe(unmask=Quota(tokens=40)), watch=watch)
    expected = -(read[0].gather(1, batch.tokens[hidden][:, None])[:, 0] * weight[hidden]).sum() / weight[hidden].sum()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tokens, "noised", lambda *_: (seen, hidden))
        loss = train_tokens.masked_loss(model, batch, generator())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_block_loss_is_that_of_the_attention_that_decodes(mixture, monkeypatch):
    """With all answers masked: block by block, from the true blocks before."""
    monkeypatch.setattr(train_tokens, "times", lambda shape, _: torch.ones(shape))
    model, spec = tiny(), train_tokens.spec_of("block")
    batch = mixture.batch(6, 40, 0.3, random.Random(1))
    weight, total = train_tokens.weights(batch), 0.0
    with torch.no_grad():
        loss = train_tokens.block_loss(model, batch, generator())
        for row, start, own in zip(batch.tokens, batch.answer.tolist(), weight, strict=True):
            blocks = spec.blocks(torch.arange(40)[None], torch.zeros(1, 1, dtype=torch.long), start)[0]
            for block in range(int(blocks.max()) + 1):
                here = blocks == block
                seen = torch.where(blocks >= block, MASK, row)
                attend = (blocks[None, :] <= blocks[:, None])[None, None]
                scores = model(input_ids=seen[None], attention_mask=attend).logits[0, here].log_softmax(1)
                total -= float((scores.gather(1, row[here][:, None])[:, 0] * own[here]).sum())
    assert loss.item() == pytest.approx(total / float(weight.sum()), rel=1e-5)


def test_causal_loss_is_that_of_transformers(mixture, monkeypatch):
    monkeypatch.setattr(train_tokens, "PADDING_WEIGHT", 0.0)
    model, batch = tiny(), mixture.batch(6, 40, 0.3, random.Random(1))
    ids = torch.cat([torch.full((6, 1), BOS), batch.tokens], 1)
    columns = torch.arange(40)
    counted = (columns >= batch.answer[:, None]) & (columns <= batch.end[:, None])
    labels = torch.nn.functional.pad(torch.where(counted, batch.tokens, -100), (1, 0), value=-100)
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(train_tokens.causal_loss(model, batch, generator()), expected)


@pytest.fixture
def trained(text, tmp_path, monkeypatch):
    """Two steps of a tiny model of some kind, by the script; the folder of the run."""

    def run(kind):
        monkeypatch.setattr(train_tokens, "new_model", tiny)
        monkeypatch.setattr(train_tokens, "TOKENS", 400)
        arguments = ["--kind", kind, "--work", tmp_path / kind, "--text", text, "--steps", "2"]
        if kind != "ar":
            train_tokens.save_model("ar", tmp_path / "twin", tiny())
            arguments += ["--start", tmp_path / "twin"]
        monkeypatch.setattr(sys, "argv", ["train_tokens", *map(str, arguments)])
        threads = torch.get_num_threads()
        train_tokens.main()
        torch.set_num_threads(threads)
        return tmp_path / kind

    return run


@KINDS
def test_two_steps_are_trained_shipped_and_loaded(kind, trained, tmp_path, monkeypatch):
    work = trained(kind)
    arguments = ["--kind", kind, "--work", work, "--out", tmp_path / "demo", "--n", "8"]
    monkeypatch.setattr(sys, "argv", ["ship_tokens", *map(str, arguments)])
    ship_tokens.main()
    folder = tmp_path / "demo" / "tokens" / kind
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".md"}
    card = (folder / "README.md").read_text()
    assert "2 steps of" in card
    assert f"--kind {kind}" in card
    assert "copy 0.00, reverse 0.00, sort 0.00" in card
    prompts = AutoTokenizer.from_pretrained(folder)(["sort dcab\n", "copy ba\n"]).input_ids
    if kind == "ar":
        causal = load_causal(folder)
        assert (causal.vocab_size, causal.bos_id, causal.keeps_kv) == (VOCABULARY, BOS, True)
        drafter = TransformersDenoiser(tiny(), train_tokens.spec_of("masked"))
        scored = decode(drafter, prompts, 4, "specdiff", resources={"ar": causal})
        assert (scored.scorer_nfe > 0).all()
    else:
        denoiser = load_denoiser(folder)
        assert denoiser.spec == train_tokens.spec_of(kind)
        assert next(denoiser.model.parameters()).dtype == torch.float32
        assert not torch.equal(denoiser.model.lm_head.weight, tiny().lm_head.weight)
        scored = decode(denoiser, prompts, 16, "llada")
        again = decode(load_denoiser(work / "model"), prompts, 16, "llada")
        assert torch.equal(scored.tokens, again.tokens)
    assert (scored.tokens != MASK).all()


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_are_something_else_are_refused(tmp_path):
    def saved(kind):
        train_tokens.save_model(kind, tmp_path / kind, tiny())
        return tmp_path / kind

    with pytest.raises(InputError, match=r"nowhere is not a folder; give one that save_denoiser or save_causal wrote"):
        load_denoiser(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds an autoregressive model; read it with load_causal"):
        load_denoiser(saved("ar"))
    with pytest.raises(InputError, match="holds a denoiser; read it with load_denoiser"):
        load_causal(saved("masked"))
    folder = saved("block")
    spec = json.loads((folder / "fewstep.json").read_text())
    assert spec["denoiser"]["block_length"] == train_tokens.BLOCK
    for change, words in (
        ({"denoiser": spec["denoiser"] | {"mask_id": -1}}, "mask_id -1 and eos_ids"),
        ({"denoiser": spec["denoiser"] | {"shift": 1}}, "denoiser.shift"),
        ({"denoiser": spec["denoiser"] | {"vocab_size": 500}}, "embeds 100 tokens, and fewstep.json speaks of 500"),
        ({"denoiser": None}, "describes one model, as 'denoiser' or as 'causal'"),
        ({"fewstep_model": 2}, "has model version 2; this fewstep reads version 1"),
    ):
        rewrite(folder / "fewstep.json", **change)
        with pytest.raises(InputError, match=words):
            load_denoiser(folder)
        rewrite(folder / "fewstep.json", **spec)
    for change, words in (
        ({"auto_map": {"AutoModel": "x.Y"}}, "is a model with code of its own, which is not run"),
        ({"architectures": ["Nothing"]}, "architecture 'Nothing', which transformers does not have"),
        ({"architectures": ["pipeline"]}, "architecture 'pipeline', which transformers does not have"),
        ({"num_hidden_layers": 2}, r"lack model\.layers\.1\.\S+ and 8 others"),
    ):
        config = saved("block") / "config.json"
        rewrite(config, **change)
        with pytest.raises(InputError, match=words):
            load_denoiser(folder)
    saved("block")
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot read the weights in"):
        load_denoiser(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot read the weights in"):
        load_denoiser(folder)


def test_denoisers_of_any_spec_come_back(tmp_path):
    spec = DenoiserSpec(mask_id=99, vocab_size=99, eos_ids=(3, 5), logit_shift=1, position_base=1)
    save_denoiser(tmp_path, tiny(), spec)
    loaded = load_denoiser(tmp_path, dtype=torch.float64)
    assert loaded.spec == spec
    assert next(loaded.model.parameters()).dtype == torch.float64
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded.model(input_ids=ids).logits.float(), tiny()(input_ids=ids).logits)

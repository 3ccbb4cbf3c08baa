from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

from fewstep.eval.clipscore import ClipScore
from fewstep.samplers.errors import InputError

LENGTH = 12
WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "shoe", "shirt", "bag", "of", "the"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def tiny_model(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "max_position_embeddings": LENGTH, "eos_token_id": 2, "bos_token_id": 1}
    config = CLIPConfig(
        text_config=tower | text | {"pad_token_id": 0},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    return CLIPModel(config).eval()


def tiny_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def score(seed: int = 0) -> ClipScore:
    return ClipScore(tiny_model(seed), tiny_tokenizer(), tiny_processor())


def images(n: int = 8, channels: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, channels, 32, 32), generator=g, dtype=torch.uint8)


PROMPTS = ["a red shoe", "blue", "the bag of a shirt", "a", "red red red bag", "shoe", "blue shirt of the bag", "red"]


@pytest.mark.parametrize("seed", [0, 4])
def test_is_the_cosine_in_the_models_own_logits(seed: int) -> None:
    """CLIP's forward multiplies the same cosine with exp(logit_scale)."""
    ours, x = score(seed), images()
    pixels = tiny_processor()(images=list(x), return_tensors="pt")["pixel_values"]
    tokens = tiny_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = ours.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
    cosine = output.logits_per_image.diagonal() / ours.model.logit_scale.exp()
    expected = (100 * cosine).clamp(min=0).double().detach()
    assert expected.max() > 0
    torch.testing.assert_close(ours.per_image(x, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_negative_cosines_count_as_zero_each() -> None:
    """torchmetrics clamps the mean; the paper clamps each image."""
    single = [score(seed).per_image(images(), PROMPTS) for seed in range(6)]
    assert any((s == 0).any() and (s > 0).any() for s in single)
    assert all((s >= 0).all() for s in single)


def test_padding_and_batching_change_nothing() -> None:
    ours, x = score(), images()
    alone = torch.cat([ours.per_image(x[i : i + 1], PROMPTS[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(ours.per_image(x, PROMPTS), alone, rtol=1e-4, atol=1e-4)


def test_long_prompts_are_cut() -> None:
    ours = score()
    long = " ".join(["a red shoe"] * 20)
    cut = " ".join(["a red shoe"] * 4).rsplit(" ", 2)[0]  # 10 words, and start and end make 12
    torch.testing.assert_close(ours.per_image(images(1), [long]), ours.per_image(images(1), [cut]))


def test_mean_has_its_error() -> None:
    ours, x = score(), images()
    values = ours.per_image(x, PROMPTS)
    estimate = ours(x, PROMPTS)
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.se == pytest.approx(values.std().item() / 8**0.5)
    assert estimate.n == 8


def test_folder_round_trip(tmp_path: Path) -> None:
    ours = score()
    ours.model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="lacks a tokenizer or image processor; save CLIPProcessor there"):
        ClipScore.from_folder(tmp_path)
    ours.tokenizer.save_pretrained(tmp_path)
    ours.image_processor.save_pretrained(tmp_path)
    again = ClipScore.from_folder(tmp_path)
    torch.testing.assert_close(again.per_image(images(), PROMPTS), ours.per_image(images(), PROMPTS))


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="clipscore needs a local transformers folder"):
        ClipScore.from_folder(tmp_path / "none")
    with pytest.raises(InputError, match="one prompt for each image; got 7 for 8"):
        score().per_image(images(), PROMPTS[:7])
    with pytest.raises(InputError, match="only uint8 images are scored"):
        score().per_image(images().float(), PROMPTS)

"""The card tells what is, and its programs run as they stand."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from method_cases import method_of
from test_export import export, trained
from tiny import tiny_dit, tiny_sd3, tiny_stable_diffusion
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from fewstep.distill import deploy
from fewstep.distill.export import origin
from fewstep.distill.hub import push_to_hub, refuse_logged_token
from fewstep.distill.loop_options import LoopOptions
from fewstep.distill.lora import LoraSetting
from fewstep.distill.model_card import Training, write_card
from fewstep.distill.stock import stock_sampling
from fewstep.eval.conditions import Conditions
from fewstep.samplers import Evidence, Process, attach
from fewstep.samplers.errors import InputError

LORA = LoraSetting(2, 3.0)
METHOD = method_of("lcm")
WORDS = ("<pad>", "<end>", "<unk>", "a", "shoe")


def sd_with_text():
    """A tiny Stable Diffusion that reads prompts."""
    pipe = tiny_stable_diffusion()
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=8
    )
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, eos_token_id=1, pad_token_id=0, bos_token_id=0,
    )  # fmt: skip
    parts = pipe.components | {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(config).eval()}
    full = type(pipe)(**parts, requires_safety_checker=False)
    full.set_progress_bar_config(disable=True)
    return full


CASES = {
    "dit": (tiny_dit, "transformer", Conditions("labels", (3, 4)), {}),
    "stable-diffusion": (sd_with_text, "unet", Conditions("prompts", ("a shoe",)), {"height": 16, "width": 16}),
}


def card_of(case, lora, tmp_path, steps=(4, 1), dtype=torch.float32, method=METHOD, **changes):
    """The text of a card in ``student``, of a teacher in ``teacher``; its export, and the teams that made it."""
    build, component, conditions, kwargs = CASES[case]
    build().save_pretrained(tmp_path / "teacher")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "teacher", dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    base = origin(pipe)
    team = trained(pipe, component, lora, method=method)
    made = export(pipe, component, team, tmp_path / "student", steps, method, base)
    options = LoopOptions(output_dir=tmp_path, max_train_steps=20, train_batch_size=4, gradient_accumulation_steps=2)
    facts = {"base": "teacher", "updates": 12, "processes": 3, "guidance": 2.5, "trainable": 1234}
    facts |= {"conditions": conditions, "call_kwargs": kwargs, "method": method, "options": options}
    path = write_card(pipe, made, Training(**facts | changes))
    return path.read_text(), made, pipe, team


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_programs(case, text, made, pipe, team):
    """Runs the programs of a card and compares what they make with the student of the team."""
    _, component, conditions, kwargs = CASES[case]
    bare = next(iter(made.plans.values())).model_copy(update={"weights": (), "tuned_for": None})
    with team.roles.use("student", grad=False, frozen=True) as network:
        setattr(pipe, component, network)
        with attach(pipe, bare):
            torch.manual_seed(0)
            wanted = pipe(**conditions.inputs([0]), **kwargs).images[0]
    programs = blocks(text)
    assert ["fewstep" in program for program in programs] == [True, False]
    for program in programs:
        seeded = re.sub("^( *)image = ", r"\1torch.manual_seed(0)\n\g<0>", program, flags=re.MULTILINE)
        names = {"torch": torch}
        with warnings.catch_warnings(action="error", category=UserWarning):
            exec(seeded, names)
        difference = np.asarray(names["image"], dtype=float) - np.asarray(wanted, dtype=float)
        assert abs(difference).max() <= 1


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("case", CASES)
def test_the_programs_of_the_card_sample_as_the_student_does(case, lora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_programs(case, *card_of(case, lora, tmp_path))


@pytest.mark.parametrize(("name", "steps"), [("guided-lora", 3), ("tcd", 4), ("instaflow", 1), ("reflow", 2)])
def test_other_schedulers_and_grids_have_programs_too(name, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_programs("dit", *card_of("dit", LORA, tmp_path, (steps,), method=method_of(name)))


def test_programs_of_a_pipeline_in_half_precision(tmp_path, monkeypatch):
    text, *_ = card_of("dit", None, tmp_path, dtype=torch.bfloat16)
    monkeypatch.chdir(tmp_path)
    for program in blocks(text):
        names = {}
        exec(program, names)
        assert names["pipe"].transformer.dtype == torch.bfloat16
        assert names["image"].size == (8, 8)


def test_the_card_says_what_was_done_and_nothing_else(tmp_path):
    command = "fewstep distill lcm --hub_token hf_secret --max_train_steps 20"
    text, *_ = card_of("dit", LORA, tmp_path, base="someone/teacher", command=command, precision="bf16")
    front = yaml.safe_load(text.split("---")[1])
    assert front == {
        "base_model": "someone/teacher",
        "library_name": "diffusers",
        "tags": ["fewstep", "distillation", "few-step", "lcm", "lora"],
    }
    assert "Updates: 12" in text
    assert "Batch: 24 samples (3 x 4 x 2" in text
    assert "Guidance of the teacher where the method says none: 2.5" in text
    assert "There are plans for 1 step too." in text
    assert "Method `lcm`: Latent consistency models (arXiv:2310.04378 algorithm 1)" in text
    assert "Mixed precision: bf16" in text
    assert "| 4 | LCMScheduler (timestep_scaling=10.0) | 999, 799, 499, 299 | off | `plan.json` |" in text
    assert "| 1 | LCMScheduler (timestep_scaling=10.0) | 999 | off | `plan-1.json` |" in text
    assert "| `timestep_scaling` | `10.0` |" in text
    assert "hf_secret" not in text
    assert "Measured" not in text
    assert "Data:" not in text
    assert "None" not in text.partition("Its hyper-parameters")[0]


def test_measured_numbers_come_from_the_evidence_of_the_plans(tmp_path):
    text, made, pipe, _ = card_of("dit", LORA, tmp_path)
    evidence = Evidence(metric="fd_fashion", value=3.25, se=0.125, n=1000, command="fewstep bench --n 1000")
    measured = {4: made.plans[4].model_copy(update={"evidence": (evidence,)}), 1: made.plans[1]}
    options = LoopOptions(output_dir=tmp_path, max_train_steps=2)
    training = Training("eval", METHOD, options, 2, 1, 1.0, 5, CASES["dit"][2])
    text = write_card(pipe, replace(made, plans=measured), training).read_text()
    assert "| 4 | fd_fashion | 3.25 ± 0.12 | 1,000 |  |" in text
    assert "```shell\nfewstep bench --n 1000\n```" in text
    assert "base_model" not in text  # a folder, not a repository


def test_a_further_student_has_no_programs(tmp_path):
    _, made, pipe, _ = card_of("dit", LORA, tmp_path)
    options = LoopOptions(output_dir=tmp_path, max_train_steps=2)
    training = Training("teacher", METHOD, options, 2, 1, 1.0, 5, CASES["dit"][2])
    text = write_card(pipe, replace(made, plans={}, role="forward_student"), training).read_text()
    assert "distilled by `lcm`, the forward_student beside the one that is sampled." in text
    assert not blocks(text)
    assert "## Steps" not in text


@pytest.mark.parametrize("build", [tiny_dit, tiny_stable_diffusion, tiny_sd3])
def test_diffusers_alone_takes_consistency_steps_everywhere(build):
    pipe = build()
    process = Process.from_scheduler(pipe.scheduler)
    for steps in (1, 3, 4):
        assert stock_sampling(pipe, METHOD.plan(process, steps)) is not None


def test_options_of_the_step_are_told_by_the_call_or_fixed():
    process = Process.from_scheduler(tiny_dit().scheduler)
    plan = deploy.trajectory_plan(process, (999.0, 499.0), 0.2)
    assert stock_sampling(tiny_stable_diffusion(), plan).arguments == ("num_inference_steps=2", "eta=0.2")
    fixed = stock_sampling(tiny_dit(), plan)
    assert fixed.imports == ("from functools import partial",)
    assert fixed.setup[-1] == "pipe.scheduler.step = partial(pipe.scheduler.step, eta=0.2)"


def test_steps_that_diffusers_cannot_take_are_not_claimed(tmp_path):
    pipe = tiny_dit()
    process = Process.from_scheduler(pipe.scheduler)
    even = stock_sampling(pipe, deploy.landing_plan(process, (999.0, 749.0, 499.0, 249.0)))
    assert even.setup == (
        "pipe.scheduler = DDIMScheduler.from_config("
        "pipe.scheduler.config, set_alpha_to_one=True, timestep_spacing='trailing')",
    )
    assert even.arguments == ("num_inference_steps=4",)
    assert stock_sampling(pipe, deploy.landing_plan(process, (999.0, 700.0, 500.0))) is None


def test_a_token_is_kept_out_of_logs():
    refuse_logged_token("hf_secret", "tensorboard")
    refuse_logged_token(None, "wandb")
    for trackers in ("wandb", "all", "tensorboard,wandb"):
        with pytest.raises(InputError, match=f"--hub_token would be logged by --report_to {trackers}; log in"):
            refuse_logged_token("hf_secret", trackers)


def test_only_students_are_uploaded(tmp_path):
    with pytest.raises(InputError, match=r"holds no plan\.json; give the folder of an exported student"):
        push_to_hub(tmp_path, "someone/student")


def test_an_upload_leaves_checkpoints_and_caches_here(tmp_path, monkeypatch):
    sent = ["README.md", "plan.json", "plan-1.json", "unet/config.json", "unet/model-1.safetensors", "losses.png"]
    sent += ["pytorch_lora_weights.safetensors", "forward/adapter_config.json", "validation/step-000500.png"]
    kept = ["checkpoint-5/roles.safetensors", "log.jsonl", "cache/latents/0.safetensors", ".export-1/unet/config.json"]
    for name in sent + kept:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    asked = {}

    def upload(self, *, folder_path, allow_patterns, ignore_patterns, **others):
        names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        asked["sent"] = filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, private, exist_ok: RepoUrl(f"https://hf.co/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert push_to_hub(tmp_path, "someone/student") == "https://hf.co/someone/student"
    assert sorted(asked["sent"]) == sorted(sent)


@pytest.mark.network
def test_the_hub_refuses_an_unknown_token(tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="someone/student cannot be uploaded: "):
        push_to_hub(tmp_path, "someone/student", token="hf_none")

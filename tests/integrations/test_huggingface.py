from __future__ import annotations

import copy
import json
import logging
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from castwise.errors import SettingsError, StepError, UnmatchedRuleError
from castwise.integrations.huggingface import CastwiseCallback, put_policy
from castwise.loss_scale import DynamicScale, StaticScale
from castwise.numerics.census import observe
from castwise.policy import Policy, preset
from castwise.training.step import Run, prepare

VOCABULARY, LENGTH = 37, 11
TOKENS = (torch.arange(24 * LENGTH) ** 2 % VOCABULARY).reshape(24, LENGTH)
SIZES = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Any:
    """Accelerate keeps its state in the process; each test gets its own."""
    torch.manual_seed(0)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def gpt2(**settings: Any) -> Any:
    """A tiny GPT-2 with random weights and a tied head; nothing is downloaded."""
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=10, n_positions=16, **dropouts, **SIZES, **settings
    )
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


def llama(**settings: Any) -> Any:
    """A tiny Llama with random weights and rotary positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        hidden_size=12,
        intermediate_size=14,
        max_position_embeddings=16,
        **SIZES,
        **settings,
    )
    config.loss_type = "ForCausalLM"
    return LlamaForCausalLM(config)


class StopAfter(TrainerCallback):
    """Stops a Trainer after a step."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop."""
        del args
        control.should_training_stop |= state.global_step >= self.last


MODELS = pytest.mark.parametrize("make", [gpt2, llama])


def with_mlp(name: str) -> Policy:
    """A preset, with every feed-forward block as an fp32 island."""
    return preset(name).with_rule(
        type="*MLP", precision="p=fp32,c=fp32", because="a test"
    )


def trainer_of(
    model: Any, callback: Any, folder: Path, *, rows: int = 24, **settings: Any
) -> Trainer:
    """A quiet Trainer on the CPU over 24 rows in order."""
    quiet = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }
    data = [{"input_ids": row, "labels": row} for row in TOKENS[:rows]]
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **(quiet | settings)),
        train_dataset=data,
        callbacks=[] if callback is None else [callback],
    )
    trainer.model_accepts_loss_kwargs = False  # the mean, as the model itself takes it
    return trainer


def by_hand(model: Any, policy: Policy, **settings: Any) -> tuple[Run, list[Any]]:
    """The run that the callback has to equal: prepare and run.step over one epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = prepare(model, optimizer, policy, **settings)
    outcomes = []
    for rows in TOKENS.split(3):
        with run.step() as step:
            step.backward(model(input_ids=rows, labels=rows).loss)
        outcomes.append(step.outcome)
    run.remove()
    return run, outcomes


def assert_close(ours: nn.Module, theirs: nn.Module, **within: float) -> None:
    """Equal weights; bit by bit without `within`."""
    within = within or {"rtol": 0, "atol": 0}
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, **within)


@MODELS
def test_a_trainer_steps_as_run_step_does_bit_by_bit(make: Any, tmp_path: Path) -> None:
    """bf16 with fp32 islands; the logged losses are those of run.step as well."""
    model, reference = make(), make()
    callback = CastwiseCallback(with_mlp("bf16-mixed"))
    trainer = trainer_of(model, callback, tmp_path)
    trainer.train()
    _, outcomes = by_hand(reference, with_mlp("bf16-mixed"))
    assert_close(model, reference)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx([each.loss for each in outcomes], rel=1e-5)
    assert callback.coverage().startswith("2 modules in fp32 inside bf16: ")
    plain = make()
    trainer_of(plain, None, tmp_path).train()
    with pytest.raises(AssertionError, match="not equal"):
        assert_close(model, plain)


@MODELS
def test_a_loss_scale_inside_the_model_is_one_outside(
    make: Any, tmp_path: Path
) -> None:
    """fp16 on a CPU computes in fp16; skips, scale and weights are those of a run."""
    scale = {"initial": 2.0**24, "interval": 2}
    model, reference = make(), make()
    callback = CastwiseCallback(with_mlp("16-mixed"), loss_scale=DynamicScale(**scale))
    trainer_of(model, callback, tmp_path).train()
    run, _ = by_hand(reference, with_mlp("16-mixed"), loss_scale=DynamicScale(**scale))
    assert callback.bordered is not None
    assert callback.bordered.num_skipped == run.num_skipped > 0
    assert callback.bordered.loss_scale.state_dict() == run.loss_scale.state_dict()
    assert_close(model, reference, rtol=1e-5, atol=1e-7)


@MODELS
@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_products_run_low_and_islands_do_not(make: Any, name: str) -> None:
    """What really ran is counted below autocast, forward and backward."""
    model = make()
    bordered = put_policy(model, with_mlp(name))
    low = "fp16" if name == "16-mixed" else "bf16"

    def step() -> None:
        model(input_ids=TOKENS[:3], labels=TOKENS[:3]).loss.backward()

    census = observe(step)
    shares = census.product_shares("forward")
    assert set(shares) == {low, "fp32"}
    assert 0.1 < shares["fp32"] < 0.9
    backward = {*census.formats_of("mm", "backward")}
    assert backward == {low, "fp32"}
    bordered.remove()
    assert set(observe(step).product_shares()) == {"fp32"}


@MODELS
def test_one_policy_file_serves_both_models(make: Any, tmp_path: Path) -> None:
    """A rule by type finds the blocks of GPT-2 and of Llama alike."""
    with_mlp("bf16-mixed").save(tmp_path / "policy.yaml")
    model = make()
    bordered = put_policy(model, tmp_path / "policy.yaml")
    num_blocks = model.config.num_hidden_layers
    assert bordered.coverage().startswith(f"{num_blocks} module")
    assert " in fp32 inside bf16: " in bordered.coverage()
    model(input_ids=TOKENS[:3], labels=TOKENS[:3]).loss.backward()
    bordered.remove()


def test_the_head_stays_tied_and_rotary_tables_stay_fp32() -> None:
    """Also where weights are held in bf16."""
    model = gpt2()
    put_policy(model, "bf16-true")
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype is torch.bfloat16
    model = llama()
    put_policy(model, "bf16-true")
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32
    assert model.model.embed_tokens.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("name", "logits", "loss"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.float32),
        ("16-mixed", torch.float32, torch.float32),
        ("32-true", torch.float32, torch.float32),
    ],
)
def test_outputs_leave_as_they_are_computed_or_the_report_says_so(
    name: str, logits: torch.dtype, loss: torch.dtype
) -> None:
    """Accelerate's own mixed precision makes every output fp32 and says nothing."""
    model = gpt2()
    bordered = put_policy(model, name)
    outputs = model(input_ids=TOKENS[:3], labels=TOKENS[:3])
    assert outputs.logits.dtype is logits
    assert outputs.loss.dtype is loss
    said = "fp16 outputs leave the model in fp32" in " ".join(bordered.report)
    assert said is (name == "16-mixed")
    with torch.no_grad():
        low = model(input_ids=TOKENS[:3]).logits.dtype
    assert low is (torch.float16 if name == "16-mixed" else logits)


def test_a_loss_of_ones_own_gets_scaled_gradients_too() -> None:
    """The scale enters before a gradient is rounded to fp16."""
    errors = []
    for scale in (None, StaticScale(1.0)):
        model, reference = gpt2(), gpt2()
        put_policy(model, "16-mixed", loss_scale=scale)
        for each in (model, reference):
            (each(input_ids=TOKENS[:3]).logits.pow(2).mean() * 1e-3).backward()
        ours, theirs = (
            nn.utils.parameters_to_vector([w.grad for w in each.parameters()])
            for each in (model, reference)
        )
        errors.append(float((ours - theirs).norm() / theirs.norm()))
    assert errors[0] < 5e-3
    assert errors[1] > 5e-2, "without a scale most digits are lost"


def test_a_gradient_that_is_not_finite_is_kept_from_the_optimizer(
    tmp_path: Path,
) -> None:
    """Even though the Trainer's clipping makes NaN of every gradient first."""
    model, kept = gpt2(), []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step == 3:
            kept.append(copy.deepcopy(model.state_dict()))
            return gradient * math.inf
        return gradient

    model.transformer.h[1].ln_2.bias.register_hook(poison)
    callback = CastwiseCallback("bf16-mixed")
    trainer = trainer_of(model, callback, tmp_path, max_grad_norm=1.0)
    trainer.add_callback(StopAfter(4))
    trainer.train()
    assert callback.bordered is not None
    assert callback.bordered.num_skipped == 1
    assert "transformer.h.1.ln_2.bias" in str(callback.bordered.last_finding)
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[0][key])


def test_accumulation_and_clipping_see_true_gradients(tmp_path: Path) -> None:
    """Under a loss scale they are those of fp32 within the format's rounding."""
    norms = {}
    for name in ("16-mixed", "32-true"):
        trainer = trainer_of(
            gpt2(),
            CastwiseCallback(name),
            tmp_path,
            gradient_accumulation_steps=2,
            max_grad_norm=0.5,
        )
        trainer.train()
        history = trainer.state.log_history
        norms[name] = [each["grad_norm"] for each in history if "grad_norm" in each]
    assert len(norms["16-mixed"]) == 4
    assert norms["16-mixed"] == pytest.approx(norms["32-true"], rel=5e-3)


def test_gradient_checkpointing_recomputes_under_the_policy(tmp_path: Path) -> None:
    """Recompute runs in backward, when the model's forward has ended."""
    models = []
    for settings in ({}, {"activation_checkpointing": True}):
        model = llama()
        callback = CastwiseCallback(with_mlp("bf16-mixed"))
        trainer_of(model, callback, tmp_path, rows=6, **settings).train()
        models.append(model)
    assert_close(*models)


def test_32_true_does_nothing(tmp_path: Path) -> None:
    """Bit by bit the Trainer's own result, and no island anywhere."""
    model, plain = gpt2(), gpt2()
    trainer_of(model, CastwiseCallback("32-true"), tmp_path, rows=6).train()
    trainer_of(plain, None, tmp_path, rows=6).train()
    assert_close(model, plain)
    assert list(map(type, model.modules())) == list(map(type, plain.modules()))


def test_a_run_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    """It is plain JSON in trainer_state.json, under the callback's name."""
    scale = {"initial": 2.0**24, "interval": 2}
    whole, half, resumed = gpt2(), gpt2(), gpt2()
    first = CastwiseCallback("16-mixed", loss_scale=DynamicScale(**scale))
    trainer_of(whole, first, tmp_path / "whole").train()

    stopped = trainer_of(
        half,
        CastwiseCallback("16-mixed", loss_scale=DynamicScale(**scale)),
        tmp_path / "half",
        save_strategy="steps",
        save_steps=4,
    )
    stopped.add_callback(StopAfter(4))
    stopped.train()
    folder = tmp_path / "half" / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["CastwiseCallback"]["attributes"]["run"]
    assert kept["loss_scale"]["kind"] == "dynamic"

    second = CastwiseCallback("16-mixed")
    trainer_of(resumed, second, tmp_path / "half").train(
        resume_from_checkpoint=str(folder)
    )
    assert first.bordered is not None
    assert second.bordered is not None
    assert second.bordered.state_dict() == first.bordered.state_dict()
    assert_close(resumed, whole)


def test_saved_models_have_no_trace(tmp_path: Path) -> None:
    """Saving, loading, generating and copying work while the policy is on."""
    model = gpt2()
    fresh = gpt2()
    bordered = put_policy(model, with_mlp("bf16-mixed"))
    model.eval()
    made = model.generate(TOKENS[:2, :5], max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 9)
    model.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert type(loaded) is GPT2LMHeadModel
    assert_close(loaded, fresh)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"]
    twin = copy.deepcopy(model)
    assert twin(input_ids=TOKENS[:3]).logits.dtype is torch.bfloat16
    bordered.remove()
    assert list(map(type, model.modules())) == list(map(type, fresh.modules()))
    assert vars(model).keys() - {"generation_config"} == vars(fresh).keys() - {
        "generation_config"
    }
    assert not any(weight._backward_hooks for weight in model.parameters())


def test_a_second_callback_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """A notebook cell may be run again."""
    model = gpt2()
    trainer_of(model, CastwiseCallback("bf16-true"), tmp_path)
    second = CastwiseCallback(with_mlp("bf16-mixed"))
    trainer_of(model, second, tmp_path)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert len(model.lm_head.weight._backward_hooks) == 1
    second.remove()
    assert type(model) is GPT2LMHeadModel
    assert second.coverage() == "on no model yet"


def test_phases_switch_between_steps() -> None:
    """The same policy file, keyed by phase."""
    model = gpt2()
    policy = preset("bf16-mixed").with_phase_precision("warmup", "c=fp32,o=fp32")
    bordered = put_policy(model, policy)
    bordered.phase = "warmup"
    assert model(input_ids=TOKENS[:3]).logits.dtype is torch.float32
    bordered.phase = "full"
    assert model(input_ids=TOKENS[:3]).logits.dtype is torch.bfloat16


# --- plain Accelerate


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_a_loop_of_accelerate_steps_as_run_step_does(name: str) -> None:
    """With clipping by the accelerator, and its checkpoints."""
    model, reference = gpt2(), gpt2()
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bordered = put_policy(model, with_mlp(name), optimizer, accelerator=accelerator)
    accelerator.register_for_checkpointing(bordered)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    for rows in TOKENS.split(3):
        accelerator.backward(prepared(input_ids=rows, labels=rows).loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 0.5)
        wrapped.step()
        wrapped.zero_grad()
    by_hand(reference, with_mlp(name), clip_norm=0.5)
    assert bordered.num_skipped == 0
    assert_close(model, reference, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_an_accelerator_with_a_precision_of_its_own_is_refused(asked: str) -> None:
    """Two masters would cast twice; on a CPU its fp16 would be fp32 in silence."""
    accelerator = Accelerator(cpu=True, mixed_precision=asked)
    with pytest.raises(SettingsError, match=f"one master, and Accelerator has {asked}"):
        put_policy(gpt2(), "bf16-mixed", accelerator=accelerator)


def test_training_arguments_with_a_precision_of_their_own_are_refused(
    tmp_path: Path,
) -> None:
    """The message says what to leave out, and why."""
    with pytest.raises(SettingsError, match=r"has bf16=True beside the policy: .*fp32"):
        trainer_of(gpt2(), CastwiseCallback("bf16-mixed"), tmp_path, bf16=True)


def test_fp16_on_a_cpu_says_that_it_is_slow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is fp16 all the same; the coverage is one line of information."""
    with caplog.at_level(logging.INFO, logger="castwise"):
        put_policy(gpt2(), with_mlp("16-mixed"))
    levels = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert levels[0] == (
        "INFO",
        (
            "castwise 16-mixed on cpu: 2 modules in fp32 inside fp16: "
            "transformer.h.0.mlp, transformer.h.1.mlp"
        ),
    )
    assert levels[1][0] == "WARNING"
    assert levels[1][1].startswith("fp16 products run on the cpu, slowly")


def test_a_rule_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    """Before anything trains, and the model is as it was."""
    model = gpt2()
    policy = preset("bf16-mixed").with_rule(module="transfomer.*", precision="fp32")
    with pytest.raises(UnmatchedRuleError, match="transfomer"):
        trainer_of(model, CastwiseCallback(policy), tmp_path)
    assert list(map(type, model.modules())) == list(map(type, gpt2().modules()))


def test_a_gradient_that_came_another_way_is_refused_under_a_scale() -> None:
    """As those of sharded weights do: the loss scale would still be in it."""
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    put_policy(model, "16-mixed", optimizer)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    with pytest.raises(StepError, match=r"'transformer\.wte\.weight' did not come by"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_steps_as_in_eager_mode() -> None:
    """The border stays eager, and the model inside is compiled."""
    eager, compiled = llama(), llama()
    step = torch.compile(compiled, backend="aot_eager")
    for model, call in ((eager, eager), (compiled, step)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        put_policy(model, with_mlp("bf16-mixed"), optimizer)
        for rows in TOKENS[:12].split(3):
            loss = call(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_close(compiled, eager, rtol=2e-2, atol=2e-3)


def test_without_the_packages_the_extra_is_named() -> None:
    """And the message says how to get them."""
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'accelerate' else real(n, *a)\n"
        "import castwise.errors\n"
        "try: import castwise.integrations.huggingface\n"
        "except castwise.errors.MissingExtraError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "needs the package accelerate" in done.stdout
    assert "pip install 'castwise[huggingface]'" in done.stdout


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may paste every block on Hugging Face, in order, into one session."""
    monkeypatch.chdir(tmp_path)
    with_mlp("bf16-mixed").save("policy.yaml")
    rows = [{"input_ids": row, "labels": row} for row in TOKENS[:6]]
    arguments = trainer_of(gpt2(), None, tmp_path).args
    names = {"make_model": gpt2, "data": rows, "arguments": arguments}
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = page.partition("## Hugging Face")[2]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)  # noqa: S102 -- our own page

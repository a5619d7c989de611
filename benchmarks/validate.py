"""What a validation says of four models, what it finds, and what it costs.

    python benchmarks/validate.py
    python benchmarks/validate.py --write docs/accepted/validate.json

Five tables:

    clean     GPT-2, Llama, ViT and a conv net, small, randomly initialised, under
              three presets: errors beside those of fp32, and the cost in steps; a step
              is a forward and a backward of the model in fp32 on the same batch
    recipes   the recipes of castwise under bf16-mixed, without and with the island that
              each of them declares (`examples/recipe_targets.py`)
    costs     what each tool that gathers evidence costs on one GPT-2, in such steps
    planted   faults in GPT-2, which it must find, and the same model without one,
              which it must pass; and what other ways of comparing say:
                  assert_close   torch.testing.assert_close, outputs with those of fp32
                  cosine         of outputs with those of fp32, at least 0.999
                  dynamo         torch._dynamo.utils.same, outputs and gradients with
                                 fp32 and float64; tolerance 1e-3 for fp32, else 1e-2
    stories   two failures that were blamed on low precision, diagnosed
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import same
from torch.nn import functional

import castwise as cw
from castwise.islands import apply_policy, module_facts
from castwise.numerics.diagnose import diagnose
from castwise.numerics.validate import Validation, validate
from castwise.policy import Policy, preset
from castwise.region import Region

PRESETS = ("bf16-mixed", "16-mixed", "bf16-true")
EXAMPLES = Path(__file__).parents[1] / "examples"
STORIES = EXAMPLES / "failure_stories.py"
ISLANDS = {"kenken": None, "resolvent_lm": "*.mixing", "soliton_lm": "*propagation"}
Made = tuple[nn.Module, list[tuple[Any, ...]], Callable[..., Any]]


class Logits(nn.Module):
    """A model of transformers that returns its logits alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of token ids or of images."""
        logits: torch.Tensor = self.inner(x).logits
        return logits


def token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the next token."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def tokens(inner: nn.Module) -> Made:
    """A language model with batches of 2 sequences of 63 tokens."""
    ids = [torch.randint(512, (2, 63)) for _ in range(2)]
    return Logits(inner), [(each, each) for each in ids], token_loss


def gpt2(num_layers: int = 3) -> Made:
    """GPT-2 of width 128, with its dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel  # noqa: PLC0415 -- an extra

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=512, n_positions=64, n_embd=128, n_layer=num_layers, n_head=4,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return tokens(GPT2LMHeadModel(config).train())


def llama() -> Made:
    """Llama of width 128, with grouped keys."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 -- an extra

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        use_cache=False,
    )  # fmt: skip
    return tokens(LlamaForCausalLM(config).train())


def vit() -> Made:
    """ViT of width 128 on images of 32 x 32."""
    from transformers import (  # noqa: PLC0415 -- an extra
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=512, image_size=32, patch_size=4, num_labels=10,
    )  # fmt: skip
    batches = [(torch.randn(2, 3, 32, 32), torch.randint(10, (2,))) for _ in range(2)]
    model = Logits(ViTForImageClassification(config).train())
    return model, batches, functional.cross_entropy


class Residual(nn.Module):
    """Two convolutions with batch norms around a skip."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.activation = activation()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            activation(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the body makes."""
        out: torch.Tensor = self.activation(x + self.body(x))
        return out


def conv_net(activation: type[nn.Module] = nn.ReLU) -> Made:
    """A residual conv net of three stages on images of 32 x 32."""
    torch.manual_seed(0)
    stages: list[nn.Module] = []
    for before, width in ((3, 16), (16, 32), (32, 64)):
        stages += [
            nn.Conv2d(before, width, 3, 2, 1),
            nn.BatchNorm2d(width),
            activation(),
        ]
        stages += [Residual(width, activation), Residual(width, activation)]
    model = nn.Sequential(
        *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]
    return model, batches, functional.cross_entropy


def smooth_conv_net() -> Made:
    """The same without a kink: SiLU instead of ReLU."""
    return conv_net(nn.SiLU)


def step_time(made: Made, repeats: int = 9) -> float:
    """Median CPU seconds of a forward and backward in fp32."""
    model, batches, loss_fn = made
    copied, times = copy.deepcopy(model), []
    *inputs, target = batches[0]
    inputs = [
        each.clone().requires_grad_()  # a model may have no weights
        if isinstance(each, torch.Tensor) and each.is_floating_point()
        else each
        for each in inputs
    ]
    for number in range(repeats + 2):
        begin = time.process_time()
        loss_fn(copied(*inputs), target).backward()
        if number >= 2:
            times.append(time.process_time() - begin)
    return statistics.median(times)


def clean_table() -> list[dict[str, Any]]:
    """Validate the models under three presets, and time it."""
    return [
        _row(build.__name__, build(), name, preset(name))
        for build in (gpt2, llama, vit, conv_net, smooth_conv_net)
        for name in PRESETS
    ]


def recipe_table() -> list[dict[str, Any]]:
    """Validate the recipes, without and with their islands."""
    rows = []
    targets = _module(EXAMPLES / "recipe_targets.py")
    plain = preset("bf16-mixed")
    for recipe, island in ISLANDS.items():
        policies = {"bf16-mixed": plain}
        if island:
            held = plain.with_rule(module=island, precision="fp32")
            policies[f"bf16-mixed, {island} in fp32"] = held
        for name, policy in policies.items():
            made = getattr(targets, recipe)()[:3]
            rows.append(_row(recipe, made, name, policy))
    return rows


def _row(model: str, made: Made, name: str, policy: Policy) -> dict[str, Any]:
    """Validate one model under one policy."""
    step = step_time(made)
    found, spent = _validated(made, policy)
    first = made[0], made[1][:1], made[2]
    _, one = _validated(first, policy)
    _, without = _validated(first, policy, operators=False)
    worst = max(found.operators, key=lambda each: each.error)
    row = {
        "model": model,
        "policy": name,
        "holds": found.holds,
        **{
            each.name: [each.measures.relative, each.floor.relative, each.limit]
            for each in found.results
        },
        "loss drift": found.loss_drift,
        "modules": len(found.modules),
        "modules off": [e.module for e in found.modules if e.state != "holds"],
        "worst operator": str(worst),
        "lifted": len(found.lifted),
        "step ms": 1e3 * step,
        "steps for the first batch": one / step,
        "the same without operators": without / step,
        "steps for each further batch": (spent - one) / step / (len(made[1]) - 1),
    }
    print(json.dumps(row), flush=True)
    return row


def _validated(
    made: Made, policy: Policy, *, operators: bool = True
) -> tuple[Validation, float]:
    begin = time.process_time()
    found = validate(*made, policy, operators=operators)
    return found, time.process_time() - begin


def cost_table() -> list[dict[str, Any]]:
    """What each tool costs on GPT-2 with two batches, in steps."""
    made = gpt2()
    model, batches, loss_fn = made
    policy = preset("bf16-mixed")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    budget = cw.Budget(gradient=1e-2)
    tools: dict[str, Callable[[], Any]] = {
        "lint": lambda: cw.lint(model, policy, optimizer, batches, loss_fn),
        "contract": lambda: cw.contract(*made, policy),
        "validate": lambda: validate(*made, policy),
        "validate, operators=False": lambda: validate(*made, policy, operators=False),
        "diagnose": lambda: diagnose(*made, policy, optimizer=optimizer),
        "search": lambda: cw.search(*made, budget, formats=("bf16", "fp32")),
    }
    for tool in tools.values():
        tool()  # what is compiled once is no cost of a model
    step = step_time(made)
    rows = []
    for name, tool in tools.items():
        begin = time.process_time()
        tool()
        spent = time.process_time() - begin
        rows.append({"tool": name, "steps": spent / step, "step ms": 1e3 * step})
        print(json.dumps(rows[-1]), flush=True)
    return rows


class TurnsGradient(torch.autograd.Function):
    """Passes values on and turns the gradient round."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
        """Pass it on."""
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Send back the opposite."""
        return -gradient


FAULTS: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor] | None]] = {
    "none, fp32": ("32-true", "", None),
    "none, bf16": ("bf16-mixed", "", None),
    "head scaled by 1 + 1e-3, fp32": ("32-true", "inner.lm_head", lambda y: y * 1.001),
    "mlp zero, bf16": ("bf16-mixed", "inner.transformer.h.0.mlp", lambda y: y * 0),
    "features permuted, bf16": (
        "bf16-mixed", "inner.transformer.h.1.mlp", lambda y: y.roll(1, -1),
    ),
    "gradient turned, bf16": (
        "bf16-mixed", "inner.transformer.h.1.mlp", TurnsGradient.apply,
    ),
    "gradient cut off, bf16": (
        "bf16-mixed", "inner.transformer.h.1.mlp", lambda y: y.detach(),
    ),
    "gradient scaled by 1.2, bf16": (
        "bf16-mixed", "inner.transformer.h.0", lambda y: y + 0.2 * (y - y.detach()),
    ),
    "norm cancels, bf16": (
        "bf16-mixed", "inner.transformer.ln_f", lambda y: (y.bfloat16() + 64) - 64,
    ),
}  # fmt: skip


def planted_table() -> list[dict[str, Any]]:
    """Plant faults in GPT-2 without dropout; ask everybody."""
    model, batches, loss_fn = gpt2(2)
    model.eval()
    rows = []
    for name, (policy, place, fault) in FAULTS.items():
        candidate = copy.deepcopy(model)
        if fault is not None:
            candidate.get_submodule(place).register_forward_hook(
                lambda _, __, y, fault=fault: fault(y)
            )
        found = validate(candidate, batches, loss_fn, preset(policy), reference=model)
        rows.append(
            {
                "fault": name,
                "castwise": "passes" if found.holds else "fails",
                **_others(candidate, model, batches[0], policy),
                "output error": found.results[0].measures.relative,
                "gradient error": found.results[1].measures.relative,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _others(
    candidate: nn.Module, model: nn.Module, batch: tuple[Any, Any], policy: str
) -> dict[str, str]:
    """What other comparisons say, of outputs or of outputs and gradients."""
    fp32 = _values(copy.deepcopy(model), batch)
    fp64 = _values(copy.deepcopy(model).double(), batch)
    chosen = preset(policy)
    applied = apply_policy(candidate, chosen.bind(module_facts(candidate)), "cpu")
    with Region.of(chosen, "full", (applied,)).entered("cpu"):
        out = candidate(batch[0])
    loss = token_loss(out, batch[1])
    weights = list(candidate.parameters())
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    pairs = zip(found, weights, strict=True)
    got = [out.detach().float()]
    got += [torch.zeros_like(w) if g is None else g.float() for g, w in pairs]
    applied.remove()

    def close() -> bool:
        try:
            torch.testing.assert_close(got[0].to(out.dtype), fp32[0].to(out.dtype))
        except AssertionError:
            return False
        return True

    cosine = functional.cosine_similarity(got[0].flatten(), fp32[0].flatten(), dim=0)
    tol = 1e-3 if policy == "32-true" else 1e-2
    verdicts = {
        "assert_close": close(),
        "cosine": bool(cosine >= 0.999),
        "dynamo": same(fp32, got, fp64, tol=tol),
    }
    return {name: "passes" if held else "fails" for name, held in verdicts.items()}


def _values(model: nn.Module, batch: tuple[Any, Any]) -> list[torch.Tensor]:
    """The output and the gradients of all weights."""
    out = model(batch[0])
    gradients = torch.autograd.grad(token_loss(out, batch[1]), list(model.parameters()))
    return [out.detach(), *gradients]


def story_table() -> list[dict[str, Any]]:
    """Diagnose the two failures, and tell what it took."""
    stories = _module(STORIES)
    models = {n: stories.unitary_steps(n)[0] for n in (3, 8, 50)}
    rows = []
    for name, made, settings in (
        (
            "unitary_steps",
            stories.unitary_steps(),
            {"limit": 1e-2, "iterations": models},
        ),
        ("determinants", stories.determinants(), {}),
        ("determinants_of_a_long_chain", stories.determinants_of_a_long_chain(), {}),
    ):
        policy = preset("bf16-mixed" if name == "unitary_steps" else "32-true")
        step = step_time(made, 3)
        begin = time.process_time()
        found = diagnose(*made, policy, **settings)
        spent = time.process_time() - begin
        rows.append({"story": name, "steps": spent / step, **found.record()})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _module(path: Path) -> Any:
    """Import a file of the examples."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def main() -> None:
    """Run the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tables = {
        "clean": clean_table,
        "recipes": recipe_table,
        "costs": cost_table,
        "planted": planted_table,
        "stories": story_table,
    }
    parser.add_argument("--tables", nargs="+", choices=tables, default=list(tables))
    parser.add_argument("--write", type=Path, help="where the figures go, as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: tables[name]() for name in arguments.tables}
    if arguments.write:
        machine = f"torch {torch.__version__}, {platform.machine()}, 1 thread"
        text = json.dumps({"machine": machine, **found}, indent=1)
        arguments.write.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""castwise against torch.autocast, Lightning, Accelerate and paddle.amp, in one record.

    python benchmarks/peers.py                          # features, crashes, costs
    python benchmarks/peers.py --only features --no-write

Everything is measured in one process on the machine at hand, on one thread, except the
compiled steps and the operator sweep, which are processes of their own. Paddle is not
installed: its column quotes its documentation and is marked so. The record is written
to docs/accepted/peers.json; docs/peers.md quotes it, and a test compares the two.

Step times are CPU seconds of the process, in turns, the reference beside each
candidate in every turn: what else runs on the machine then slows both. The ratio is
that of medians; the quartiles are of the ratios of turns. glibc is told to keep freed
blocks, as benchmarks/autocast.py explains; what it costs when it does not is there.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import re
import sys
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from autocast import keep_blocks, processor
from peer_costs import PARTS
from peer_features import (
    Answer,
    Feature,
    answer,
    buffers,
    compiled,
    custom_function,
    distributed,
    floor,
    island,
    named,
    narrow_island,
    operator,
    phases,
    proof,
    recipe,
    recomputed,
    sharded,
    stages,
    stale,
    switch,
    table,
    wide_island,
)
from peer_page import tables
from peer_tools import TOOLS

HERE = Path(__file__).parent
RECORD = HERE.parent / "docs" / "accepted" / "peers.json"
PAGE = HERE.parent / "docs" / "peers.md"


def paddle(verdict: Any, figure: str) -> Answer:
    """An answer from documentation."""
    return Answer(verdict=verdict, figure=figure)


UNSAID = paddle("no", "not documented")

FEATURES = (
    Feature(
        title="one operator table, the same on a CPU as on CUDA",
        probe=table,
        test="tests/test_autocast.py::test_pytorchs_list_for_cuda_holds_on_a_cpu",
        paddle=paddle("yes", "lists of levels O1 and OD [auto_cast]"),
    ),
    Feature(
        title="an operator's format changed from Python, without C++",
        probe=operator,
        test="tests/test_autocast.py::test_a_user_changes_the_table",
        paddle=paddle("yes", "custom_white_list, custom_black_list [auto_cast]"),
    ),
    Feature(
        title="modules chosen by name, and a typing error is an error",
        probe=named,
        test="tests/policy/test_bound.py::test_a_rule_that_names_no_module_is_an_error",
        paddle=paddle("partly", "excluded_layers: instances and types [decorate]"),
    ),
    Feature(
        title="an fp32 island in bf16, model unedited",
        probe=island,
        test=(
            "tests/islands/test_islands.py::"
            "test_an_island_computes_in_its_format_and_hands_out_what_the_policy_says"
        ),
        paddle=paddle("partly", "excluded_layers keeps weights in fp32 [decorate]"),
    ),
    Feature(
        title="an fp64 island in bf16, model unedited",
        probe=wide_island,
        test=(
            "tests/islands/test_islands.py::"
            "test_fp64_islands_work_with_wide_and_with_narrow_weights"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="an fp8 island on hardware without fp8",
        probe=narrow_island,
        test=(
            "tests/islands/test_fp8.py::"
            "test_an_island_in_fp8_covers_what_is_inside_and_nothing_else"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="a weight changed in place inside the region is cast again",
        probe=stale,
        test=(
            "tests/issues/test_stale_weight_cast.py::"
            "test_a_weight_changed_in_place_is_cast_again"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="fp32 products of an island stay IEEE under a global switch",
        probe=switch,
        test=(
            "tests/islands/test_products.py::"
            "test_products_are_ieee_inside_and_fast_outside_in_forward_and_backward"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="rotary tables survive weights in bf16",
        probe=buffers,
        test="tests/issues/test_gpt_neox_1003.py::test_angles_keep_their_digits",
        paddle=UNSAID,
    ),
    Feature(
        title="custom functions with setup_context (pytorch#132388)",
        probe=custom_function,
        test=(
            "tests/issues/test_pytorch_132388.py::"
            "test_an_island_gives_a_custom_function_its_format"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="precision by phase, also compiled",
        probe=phases,
        test=(
            "tests/training/test_compiled_step.py::"
            "test_phases_compile_once_each_forward_and_backward"
        ),
        paddle=paddle("partly", "enable= of a context, by hand [auto_cast]"),
    ),
    Feature(
        title="backward in another format than forward",
        probe=stages,
        test=(
            "tests/islands/test_own_backward.py::"
            "test_the_backward_runs_in_its_own_format_and_the_forward_stays_bit_for_bit"
        ),
        paddle=paddle("partly", "master_grad: gradients end in fp32 [decorate]"),
    ),
    Feature(
        title="all settings in one file that reads back",
        probe=recipe,
        test="tests/policy/test_document.py::test_every_policy_comes_back_from_its_text",
        paddle=UNSAID,
    ),
    Feature(
        title="a compiled island has the eager gradients (pytorch#179804)",
        probe=compiled,
        test=(
            "tests/issues/test_pytorch_179804.py::"
            "test_compiled_gradients_are_those_of_eager_code"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="recompute outside of the region keeps the formats",
        probe=recomputed,
        test=(
            "tests/test_autocast.py::"
            "test_recompute_outside_of_the_region_runs_in_the_same_formats"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="DistributedDataParallel",
        probe=distributed,
        test=(
            "tests/distributed/test_replication.py::"
            "test_two_processes_compute_what_one_would"
        ),
        paddle=paddle("yes", "paddle.DataParallel, beside amp"),
    ),
    Feature(
        title="FSDP2: an fp32 island in a sharded bf16 model",
        probe=sharded,
        test=(
            "tests/distributed/test_sharding.py::"
            "test_two_processes_compute_what_one_would"
        ),
        paddle=UNSAID,
    ),
    Feature(
        title="a run that proves each operator's format",
        probe=proof,
        test=(
            "tests/numerics/contract/test_proof.py::"
            "test_autocast_switched_off_inside_is_a_breach"
        ),
        paddle=paddle("partly", "counts operators by format, no verdict [debugging]"),
    ),
    Feature(
        title="the loss scale stops at a floor and says why",
        probe=floor,
        test=(
            "tests/issues/test_pytorch_99640.py::"
            "test_a_scale_that_cannot_help_stops_the_run_at_its_floor"
        ),
        paddle=UNSAID,
    ),
)


def features() -> list[dict[str, Any]]:
    """Ask every tool for every feature."""
    tools = [make() for make in TOOLS.values()]
    rows = []
    for feature in FEATURES:
        answers = {tool.name: asdict(answer(feature, tool)) for tool in tools}
        answers["paddle.amp"] = asdict(feature.paddle)
        rows.append(
            {"feature": feature.title, "test": feature.test, "answers": answers}
        )
        print(feature.title)
        for name, found in answers.items():
            print(f"    {name:<16}{found['verdict']:<8}{found['figure']}")
    return rows


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    names = ("torch", "lightning", "accelerate")
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in names},
        },
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def write_page(record: dict[str, Any]) -> None:
    """Put the tables of the record into the page, between their marks."""
    text = PAGE.read_text()
    for name, table_text in tables(record).items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(marks, rf"\1{table_text}\2", text, flags=re.DOTALL)
    PAGE.write_text(text)


def main() -> int:
    """Measure, print, and write record and page."""
    parts = {"features": lambda _: features(), **PARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(parts), choices=parts)
    parser.add_argument("--turns", type=int, default=41)
    parser.add_argument("--write", action="store_true", help="record and page")
    settings = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_blocks()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in settings.only:
        record[name] = {**machine(), "rows": parts[name](settings.turns)}
        if name != "features":
            print(json.dumps(record[name], indent=1))
    if settings.write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        write_page(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import castwise.policy.presets as presets_room
from castwise.formats import FORMATS
from castwise.policy import PHASES, STAGES, Policy, Precision, json_schema
from castwise.policy.document import POLICY_KEYS, RULE_KEYS
from castwise.policy.keys import STORAGES
from castwise.policy.ops import CATEGORIES

PRESET_FILES = sorted(Path(presets_room.__file__).parent.glob("*.yaml"))
BEGIN = "castwise: 1\ndefault: fp32\n"


def allows(schema: dict[str, Any], value: object) -> bool:
    """Check a value against the keywords that our schema uses, and no other."""
    kinds = {"object": dict, "array": list, "string": str}
    checks = {
        "type": lambda kind: isinstance(value, kinds[kind]),
        "const": lambda const: value == const,
        "enum": lambda choices: value in choices,
        "pattern": lambda text: re.search(text, str(value)) is not None,
        "required": lambda keys: isinstance(value, dict) and set(keys) <= set(value),
        "oneOf": lambda options: sum(allows(each, value) for each in options) == 1,
        "not": lambda refused: not allows(refused, value),
        "items": lambda item: (
            isinstance(value, list) and all(allows(item, each) for each in value)
        ),
        "properties": lambda known: (
            isinstance(value, dict)
            and all(
                allows(known[key], each) for key, each in value.items() if key in known
            )
        ),
        "additionalProperties": lambda _no: (
            isinstance(value, dict) and set(value) <= set(schema["properties"])
        ),
    }
    about = {"$schema", "title", "description"}
    return all(checks[key](part) for key, part in schema.items() if key not in about)


def test_the_schema_is_json_and_lists_what_the_tables_list() -> None:
    """Keys, phases, stages and categories come from the tables that the reader uses."""
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(POLICY_KEYS)
    rule = schema["properties"]["rules"]["items"]["properties"]
    assert set(rule) == set(RULE_KEYS)
    assert rule["phase"]["enum"] == list(PHASES)
    assert rule["stage"]["enum"] == list(STAGES)
    assert rule["category"]["enum"] == list(CATEGORIES)
    assert rule["storage"]["enum"] == schema["properties"]["storage"]["enum"]
    assert rule["storage"]["enum"] == list(STORAGES)
    assert all(each["description"] for each in rule.values())


@pytest.mark.parametrize("path", PRESET_FILES, ids=lambda path: path.stem)
def test_the_schema_allows_every_preset(path: Path) -> None:
    """What the reader reads, an editor does not mark."""
    assert allows(json_schema(), yaml.safe_load(path.read_text()))


def test_the_schema_allows_what_policies_write() -> None:
    """A policy built in Python and written out passes the editor's check."""
    policy = (
        Policy()
        .with_default("p=fp32,c=tf32,o=bf16,r=fp32")
        .with_rule(module="a", type="B", stage="backward", precision="c=fp64")
        .with_rule(op="softmax", category="widest", because="measured")
        .with_rule(module="b", storage="split8")
        .with_rule(module="c", precision="p=bf16", storage="master")
        .with_phase_precision("predict", "as_is")
        .with_storage("kahan")
        .with_loss_scale("static:8")
    )
    assert allows(json_schema(), yaml.safe_load(policy.to_yaml()))


@pytest.mark.parametrize(
    "text",
    [
        "default: fp32\n",
        "castwise: 2\ndefault: fp32\n",
        "castwise: 1\ndefault: float32\n",
        BEGIN + "rulse: []\n",
        BEGIN + "loss_scale: static\n",
        BEGIN + "rules: [{module: a}]\n",
        BEGIN + "rules: [{modul: a, precision: fp32}]\n",
        BEGIN + "rules: [{phase: eval, precision: fp32}]\n",
        BEGIN + "rules: [{op: exp, precision: c=fp32, category: low}]\n",
        BEGIN + "storage: splt\n",
        BEGIN + "rules: [{module: a, storage: none}]\n",
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    """An editor marks the mistakes that do not need the model to be seen."""
    assert not allows(json_schema(), yaml.safe_load(text))


@pytest.mark.parametrize("name", FORMATS)
def test_the_pattern_of_precisions_follows_the_table_of_formats(name: str) -> None:
    """Each format is allowed alone and as a part, long keys and spaces too."""
    default = json_schema()["properties"]["default"]
    for text in (name, f"c={name}", f" compute = {name} , o=fp32"):
        assert allows(default, text)
    for text in (f"{name}x", f"c={name},", f"x={name}", f"{name},c={name}"):
        assert not allows(default, text)
    assert allows(default, str(Precision(compute=name)))

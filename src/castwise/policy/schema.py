"""The policy file as a JSON schema, so that an editor completes and checks it.

Generated from the tables of formats, phases, stages and keys; nothing is listed here.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from castwise.formats import FORMATS
from castwise.policy.document import POLICY_KEYS, RULE_KEYS, VERSION
from castwise.policy.keys import EMULATIONS, PHASES, STAGES, STORAGES
from castwise.policy.ops import Category
from castwise.policy.precision import AS_IS, SHORT_KEYS
from castwise.policy.silences import CHECKS, SILENCE_KEYS


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a policy file.

    It is as strict as a schema can be: what depends on two keys at once, or on the
    model, is left to the reader of the file.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "castwise policy",
        **_mapping(
            POLICY_KEYS,
            {
                "castwise": {"const": VERSION},
                "default": _precision(),
                "loss_scale": {
                    "type": "string",
                    "pattern": r"^(none|dynamic|static:.+)$",
                },
                "storage": {"enum": list(STORAGES)},
                "emulation": {"enum": list(EMULATIONS)},
                "rules": {"type": "array", "items": _rule()},
                "silences": {
                    "type": "array",
                    "items": _mapping(SILENCE_KEYS, {"check": {"enum": list(CHECKS)}})
                    | {"required": ["check", "because"]},
                },
            },
        ),
        "required": ["castwise", "default"],
    }


def _rule() -> dict[str, Any]:
    return _mapping(
        RULE_KEYS,
        {
            "stage": {"enum": list(STAGES)},
            "phase": {"enum": list(PHASES)},
            "precision": _precision(),
            "category": {"enum": list(get_args(Category))},
            "storage": {"enum": list(STORAGES)},
        },
    ) | {
        "oneOf": [  # storage stands beside a precision, or alone
            {"required": ["precision"]},
            {"required": ["category"]},
            {"required": ["storage"], "not": {"required": ["precision"]}},
        ]
    }


def _mapping(keys: Any, special: dict[str, Any]) -> dict[str, Any]:
    properties = {
        key: {"description": meaning, **special.get(key, {"type": "string"})}
        for key, meaning in keys.items()
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _precision() -> dict[str, Any]:
    names = "|".join(map(re.escape, FORMATS))
    keys = "|".join(word for pair in SHORT_KEYS.items() for word in pair)
    part = rf"\s*({keys})\s*=\s*({names})\s*"
    return {"type": "string", "pattern": rf"^\s*({AS_IS}|{names}|{part}(,{part})*)\s*$"}

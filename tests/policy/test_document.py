from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from castwise.errors import CastwiseError, PolicyError, RuleError, StorageError
from castwise.formats import FORMATS
from castwise.policy import (
    PHASES,
    STAGES,
    ModuleFacts,
    Policy,
    Precision,
    Rule,
    Silence,
)
from castwise.policy.document import MAX_BYTES, RULE_KEYS
from castwise.policy.ops import CATEGORIES
from castwise.policy.silences import CHECKS, SILENCE_KEYS

VISION = """\
castwise: 1
default: p=fp32,c=bf16,o=bf16,r=fp32
rules:
  - module: "*.propagator"
    precision: fp32                    # an island
    because: residual 1e-7 in fp32, 5e-4 in bf16
  - op: softmax
    precision: c=fp32
  - module: "solver.*"
    stage: backward
    precision: fp64
  - phase: predict
    precision: c=bf16
"""
BEGIN = "castwise: 1\ndefault: fp32\n"


def test_the_policy_of_the_vision_reads_as_it_is_meant() -> None:
    """Every key of the file lands in its field, and every rule knows its line."""
    policy = Policy.parse(VISION, where="policy.yaml")
    assert policy.default == Precision.parse("p=fp32,c=bf16,o=bf16,r=fp32")
    island, softmax, solver, predict = policy.rules
    assert island.because == "residual 1e-7 in fp32, 5e-4 in bf16"
    assert (softmax.op, softmax.precision.compute) == ("softmax", "fp32")
    assert (solver.module, solver.stage, solver.value) == (
        "solver.*",
        "backward",
        "fp64",
    )
    assert (predict.phase, predict.value) == ("predict", "c=bf16")
    lines = [rule.where.removeprefix("policy.yaml:") for rule in policy.rules]
    assert lines == ["4", "7", "9", "12"]


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 1, "is empty; begin with castwise: 1"),
        ("# only a comment\n", 1, "is empty"),
        ("fp32\n", 1, "needs keys and values, got 'fp32'"),
        ("- fp32\n", 1, "needs keys and values, got a list"),
        ("default: fp32\n", 1, "key castwise is missing; begin with castwise: 1"),
        ("castwise: 1\n", 1, "key default is missing"),
        ("castwise: 2\ndefault: fp32\n", 1, "need castwise: 1, got '2'"),
        ("castwise: one\ndefault: fp32\n", 1, "reads version 1 only"),
        ("castwise: 1\ndefault: fp3\n", 2, "write fp32"),
        ("castwise: 1\ndefault: [fp32]\n", 2, "need a text, got a list"),
        ("castwise: 1\ndefault:\n", 2, "need a text, got nothing"),
        (BEGIN + "rulse: []\n", 3, "unknown key 'rulse' (did you mean rules?)"),
        (BEGIN + "default: bf16\n", 3, "stands here and at f.yaml:2; keep one"),
        (BEGIN + "rules: none\n", 3, "rules need a list, got 'none'"),
        (BEGIN + "name: ' '\n", 3, "name needs one line of printable text"),
        (BEGIN + "loss_scale: static\n", 3, "static:<number above 0>"),
        (BEGIN + "loss_scale: static:0\n", 3, "static:<number above 0>"),
        (BEGIN + "rules:\n- fp32\n", 4, "a rule needs keys and values"),
        (BEGIN + "rules:\n- module: a\n", 4, "the rule says no precision"),
        (BEGIN + "rules:\n- precision: fp32\n", 4, "at least one key"),
        (
            BEGIN + "rules:\n- modul: a\n  precision: fp32\n",
            4,
            "(did you mean module?)",
        ),
        (
            BEGIN + "rules:\n- module: a\n\n  precision: c=fp8\n",
            6,
            "write fp8_e4m3",
        ),
        (
            BEGIN + "rules:\n- phase: eval\n  precision: fp32\n",
            4,
            "one of warmup, full, predict, correct",
        ),
        (
            BEGIN + "rules:\n- module: re:(\n  precision: fp32\n",
            4,
            "no regular expression",
        ),
        (
            BEGIN + "rules:\n- op: exp\n  precision: c=fp32\n  category: low\n",
            4,
            "got both",
        ),
        (BEGIN + "rules:\n\t- module: a\n", 4, "indent with spaces"),
        (BEGIN + "rules:\n- module: *.norm\n", 4, "quote a text that begins with"),
        (BEGIN + "rules: &x\n- module: a\n", 3, "anchors and aliases are refused"),
        (BEGIN + "rules: *x\n", 3, "anchors and aliases are refused"),
        (BEGIN + "name: a: b\n", 3, "quote a text that contains a colon"),
        (BEGIN + "name: !!python/name:os.system x\n", 3, "is refused; leave it out"),
        (BEGIN + "? [a, b]\n: c\n", 3, "need a text, got a list"),
        (BEGIN + "<<: {name: x}\n", 3, "unknown key '<<'"),
        (BEGIN + "---\n" + BEGIN, 3, "another document"),
        (BEGIN + "name: \x00\n", 3, "U+0000"),
        (BEGIN + 'name: "\\uD800"\n', 3, "name needs one line of printable text"),
        (BEGIN + "rules: " + "[" * 50_000, 3, "nested deeper than 8"),
        (BEGIN + "rules: " + "{a: " * 50_000, 3, "nested deeper than 8"),
        (BEGIN + "rules: [", 3, "no valid YAML"),
        (BEGIN + "name: 'open\n", 4, "no valid YAML"),
        ("%YAML 9.9\n---\n" + BEGIN, 1, "no valid YAML"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_line_and_remedy(
    text: str, line: int, says: str
) -> None:
    """Malformed or impossible: the message starts with the place of the mistake."""
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, where="f.yaml")
    message = str(caught.value)
    assert message.startswith(f"f.yaml:{line}: "), message
    assert says in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_rule_that_matches_nothing_names_its_line() -> None:
    """The file is right and the model another: the line is still known."""
    policy = Policy.parse(VISION, where="policy.yaml")
    facts = [ModuleFacts(fqn="a.propagator"), ModuleFacts(fqn="solve.x")]
    with pytest.raises(RuleError, match=r"^policy\.yaml:9: .* \(did you mean solve\.x"):
        policy.bind(facts)


def test_a_file_goes_through_disk_unchanged(tmp_path: Path) -> None:
    """Saved and loaded is equal; the rules now name the file."""
    path = tmp_path / "policy.yaml"
    policy = Policy.parse(VISION)
    policy.save(path)
    loaded = Policy.load(path)
    assert loaded == policy
    assert loaded.where == str(path)
    assert loaded.rules[0].where == f"{path}:5"
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary stays
    policy.with_loss_scale("dynamic").save(path)  # replaces
    assert Policy.load(path).loss_scale == "dynamic"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    """What an editor on another system writes is a policy too."""
    path = tmp_path / "policy.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VISION.replace("\n", "\r\n").encode())
    loaded = Policy.load(path)
    assert loaded == Policy.parse(VISION)
    assert loaded.rules[3].where == f"{path}:12"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"castwise: 1\ndefault: \xff\n", ":2: need UTF-8 text, got byte 0xff"),
        (VISION.encode("utf-16"), "need UTF-8 text, got byte 0xff"),
        (b"#" * (MAX_BYTES + 1), "need a policy of at most"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    """The line of the first bad byte is named; a huge file is not even read."""
    path = tmp_path / "policy.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError) as caught:
        Policy.load(path)
    assert str(caught.value).startswith(str(path))
    assert says in str(caught.value)


def test_what_cannot_be_read_or_written_is_a_storage_error(tmp_path: Path) -> None:
    """Missing file, folder, impossible name, missing parent: one sentence each."""
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        Policy.load(tmp_path / "missing.yaml")
    with pytest.raises(StorageError, match="got a folder"):
        Policy.load(tmp_path)
    with pytest.raises(StorageError, match="cannot be read"):
        Policy.load("a\0b")
    with pytest.raises(StorageError, match="cannot be read"):
        Policy.load("x" * 5000)
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        Policy().save(tmp_path / "missing" / "policy.yaml")
    with pytest.raises(StorageError, match="cannot be written"):
        Policy().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_predicate_cannot_be_written() -> None:
    """Python in a policy stays in Python; the error offers what a file can say."""
    policy = Policy().with_rule(predicate=lambda _: True, precision="fp32")
    with pytest.raises(RuleError, match="use module or type instead"):
        policy.to_yaml()


STORABLE = [name for name, fmt in FORMATS.items() if fmt.storable]
WORDS = st.text(min_size=1, max_size=20).filter(
    lambda text: text.isprintable() and " ".join(text.split()) == text
)
PRECISIONS = st.builds(
    Precision,
    param=st.none() | st.sampled_from(STORABLE),
    compute=st.none() | st.sampled_from(list(FORMATS)),
    output=st.none() | st.sampled_from(STORABLE),
    reduce=st.none() | st.sampled_from(STORABLE),
)
MODULE_RULES = st.fixed_dictionaries(
    {"because": st.just("") | WORDS, "precision": PRECISIONS},
    optional={
        "module": WORDS,
        "type": WORDS,
        "stage": st.sampled_from(STAGES),
        "phase": st.sampled_from(PHASES),
    },
)
OP_RULES = st.fixed_dictionaries(
    {"because": st.just("") | WORDS, "op": WORDS},
    optional={
        "phase": st.sampled_from(PHASES),
        "category": st.sampled_from(CATEGORIES),
    },
)


SILENCES = st.builds(
    Silence, check=st.sampled_from(list(CHECKS)), at=st.none() | WORDS, because=WORDS
)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    """Any policy that can be written; what contradicts itself is drawn again."""
    drawn = draw(st.lists(MODULE_RULES | OP_RULES, max_size=4))
    rules: list[Rule] = []
    for keys in drawn:
        try:
            rules.append(Rule(**keys))
            Policy(rules=tuple(rules))
        except RuleError:
            rules = [rule for rule in rules if rule is not rules[-1]]
    scales = st.sampled_from(["none", "dynamic", "static:1024", "static:0.5"])
    return Policy(
        name=draw(WORDS),
        default=draw(PRECISIONS),
        rules=tuple(rules),
        loss_scale=draw(st.none() | scales),
        silences=tuple(draw(st.lists(SILENCES, max_size=2))),
    )


@settings(max_examples=400, deadline=None)
@given(policy=policies())
def test_every_policy_comes_back_from_its_text(policy: Policy) -> None:
    """Whatever the words, YAML gives back an equal policy."""
    assert Policy.parse(policy.to_yaml()) == policy


def test_every_field_comes_back_when_it_is_off_its_default() -> None:
    """No field of Policy or Rule is forgotten by the file: each is walked."""
    given: dict[str, Any] = {
        "module": "a.*",
        "type": "Norm",
        "op": "softmax",
        "stage": "backward",
        "phase": "predict",
        "precision": Precision.parse("c=fp16,o=bf16,r=fp64"),
        "category": "widest",
        "storage": "kahan",
        "because": "measured",
    }
    apart = {"op", "category", "storage"}
    on_module = {key: given[key] for key in given if key not in apart}
    on_op = {key: given[key] for key in ("op", "phase", "category", "because")}
    weights = {"module": "b", "precision": Precision.parse("p=bf16")}
    stored = {"module": "c", "storage": "kahan"}
    policy = Policy(
        name="all",
        default=Precision(param="bf16", compute="tf32", output="fp16", reduce="fp64"),
        rules=(Rule(**on_module), Rule(**on_op), Rule(**weights), Rule(**stored)),
        loss_scale="static:8",
        storage="stochastic",
        emulation="refused",
        silences=(
            Silence(check="low-loss", because="ten steps"),
            Silence(check="lost-update", at="*.norm", because="it stays at 1"),
        ),
        where="f.yaml",
    )
    back = Policy.parse(policy.to_yaml(), where="f.yaml")
    for field in dataclasses.fields(Policy):
        assert getattr(policy, field.name) != getattr(Policy(), field.name), field.name
        assert getattr(back, field.name) == getattr(policy, field.name)
    for field in dataclasses.fields(Rule):
        if field.name in {"predicate", "where"}:  # Python only; set by the reader
            assert field.name not in RULE_KEYS
            continue
        assert field.name in RULE_KEYS
        values = [getattr(rule, field.name) for rule in back.rules]
        assert any(value == given[field.name] for value in values), field.name
    for field in dataclasses.fields(Precision):
        assert getattr(policy.default, field.name) is not None
    for field in dataclasses.fields(Silence):
        if field.name == "where":
            continue
        assert field.name in SILENCE_KEYS
        assert any(getattr(each, field.name) for each in back.silences), field.name


@pytest.mark.parametrize(
    ("silence", "told"),
    [
        ("{check: lost-update}", "says no because"),
        ("{because: it is so}", "says no check"),
        ("{check: lost-updates, because: why}", "did you mean lost-update"),
        ("{check: low-loss, because: why, at: {a: b}}", "need a text"),
        ("{check: low-loss, because: why, place: a}", "unknown key 'place'"),
        ("low-loss", "a silence needs keys and values"),
    ],
)
def test_a_silence_without_check_or_reason_is_refused_with_its_line(
    silence: str, told: str
) -> None:
    """A finding is never accepted without a word, nor by a word that finds nothing."""
    text = f"castwise: 1\ndefault: bf16\nsilences:\n  - {silence}\n"
    with pytest.raises(PolicyError, match=told) as error:
        Policy.parse(text, where="p.yaml")
    assert str(error.value).startswith("p.yaml:4: ")


def test_silences_are_a_list() -> None:
    """One silence is a list of one."""
    with pytest.raises(PolicyError, match=r"p.yaml:3: silences need a list, got 'all'"):
        Policy.parse("castwise: 1\ndefault: bf16\nsilences: all\n", where="p.yaml")


def test_a_silence_built_in_python_is_checked_alike() -> None:
    """It knows the line that built it, and changes nothing that runs."""
    policy = Policy().with_silence("low-loss", at="loss", because="tiny")
    (silence,) = policy.silences
    assert silence.key == "low-loss@loss"
    assert silence.where.startswith("test_document.py:")
    with pytest.raises(RuleError, match="needs a reason"):
        Policy().with_silence("low-loss", because="")
    with pytest.raises(RuleError, match="one line of printable text"):
        Policy().with_silence("low-loss", because="two\nlines")
    with pytest.raises(RuleError, match="at is empty"):
        Policy().with_silence("low-loss", at="", because="why")


TOKENS = st.sampled_from(
    [
        *"-:?[]{}&*!|>%@`#,'\"\n\t ~",
        "castwise: 1\n",
        "default: bf16\n",
        "rules:\n",
        "- ",
        "  ",
        *(f"{key}: " for key in RULE_KEYS),
        *FORMATS,
        *PHASES,
        "re:",
        "<<",
        "---\n",
        "\\",
        "\x85",
        "é",
    ]
)
TEXTS = st.text(max_size=60) | st.lists(TOKENS, max_size=30).map("".join)


@st.composite
def damaged_policies(draw: st.DrawFn) -> str:
    """A good policy with a piece of it cut out and something else in its place."""
    start = draw(st.integers(0, len(VISION)))
    stop = draw(st.integers(start, min(len(VISION), start + 30)))
    middle = draw(st.lists(TOKENS, max_size=4).map("".join))
    return VISION[:start] + middle + VISION[stop:]


@settings(max_examples=1500, deadline=None)
@given(text=TEXTS | damaged_policies())
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever the text: a policy that comes back, or one sentence with its place."""
    try:
        policy = Policy.parse(text, where="f.yaml")
    except CastwiseError as error:
        assert str(error).startswith("f.yaml:")  # noqa: PT017 -- both outcomes count
        assert "\n" not in str(error)  # noqa: PT017 -- both outcomes count
    else:
        assert Policy.parse(policy.to_yaml()) == policy


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=80))
def test_no_bytes_break_the_reader(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file of any bytes is refused inside the tree of errors."""
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(raw)
    with pytest.raises(CastwiseError, match=r"bytes\.yaml"):
        Policy.load(path)


@settings(max_examples=200, deadline=None)
@given(policy=policies(), fqns=st.lists(WORDS, max_size=5))
def test_any_policy_answers_for_any_model_or_says_why_not(
    policy: Policy, fqns: list[str]
) -> None:
    """Binding, explaining and the operator table stay inside the tree of errors."""
    facts = [ModuleFacts(fqn=fqn, types=(fqn,)) for fqn in fqns]
    for phase in PHASES:
        try:
            policy.operator_table(phase)
        except PolicyError:
            continue
    try:
        bound = policy.bind(facts)
    except PolicyError:
        return
    for each in facts:
        assert each.fqn in bound.explain(each.fqn)
        assert bound.precision_of(each.fqn, stage="update", phase="correct").is_full

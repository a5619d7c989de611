"""The precision of one module: four formats and their one-line text form.

    p=fp32,c=bf16,o=bf16,r=fp32
    |      |      |      +-- reduce:  gradients while they are summed over ranks
    |      |      +--------- output:  what the module hands to the next one
    |      +---------------- compute: what its operators run in
    +----------------------- param:   what its weights are held in

A field that is left out is as in the surroundings of the module. One format alone means
all four. `as_is` leaves all four out. A precision prints as it parses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from castwise.errors import FormatError, PrecisionTextError
from castwise.formats import parse_format
from castwise.wording import shown

AS_IS = "as_is"
"""The text of a precision that leaves every field as in the surroundings."""

SHORT_KEYS = {"p": "param", "c": "compute", "o": "output", "r": "reduce"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """The formats of one module; `None` means as in its surroundings."""

    param: str | None = None
    """What the weights are held in."""

    compute: str | None = None
    """What the operators run in."""

    output: str | None = None
    """What the module hands to the next one."""

    reduce: str | None = None
    """What gradients are summed over ranks in."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name = getattr(self, field.name)
            if name is None:
                continue
            fmt = parse_format(name)
            if not fmt.storable and field.name != "compute":
                raise FormatError(
                    f"need a format that a tensor can be held in for {field.name}; got "
                    f"{name}, which exists only inside matrix units; write "
                    f"p=fp32,c={name},o=fp32,r=fp32"
                )

    @classmethod
    def parse(cls, text: str) -> Precision:
        """Read `p=fp32,c=bf16,o=bf16,r=fp32`, a part of it, `fp32`, or `as_is`.

        Raises:
            PrecisionTextError: The text is none of these; the message gives the remedy.
        """
        if text.strip() == AS_IS:
            return cls()
        pairs: dict[str, str] = {}
        try:
            if "=" not in text:
                name = parse_format(text).name
                pairs = dict.fromkeys(SHORT_KEYS.values(), name)
            else:
                for part in text.split(","):
                    _read_part(part, pairs)
            return cls(**pairs)
        except FormatError as error:
            raise PrecisionTextError(
                f"in the precision {shown(text)}: {error}"
            ) from None

    @property
    def is_full(self) -> bool:
        """Whether no field is left to the surroundings."""
        return None not in self._values()

    @property
    def is_uniform(self) -> bool:
        """Whether all four fields are one format, as `fp32` alone writes it."""
        return self.is_full and len(set(self._values())) == 1

    def over(self, surroundings: Precision) -> Precision:
        """Return this precision with its open fields filled from `surroundings`."""
        if self.is_full:
            return self
        if not any(self._values()):
            return surroundings
        return Precision(
            param=self.param or surroundings.param,
            compute=self.compute or surroundings.compute,
            output=self.output or surroundings.output,
            reduce=self.reduce or surroundings.reduce,
        )

    def _values(self) -> tuple[str | None, ...]:
        return self.param, self.compute, self.output, self.reduce

    def __str__(self) -> str:
        if self.is_uniform:
            return str(self.param)
        parts = [
            f"{short}={getattr(self, name)}"
            for short, name in SHORT_KEYS.items()
            if getattr(self, name) is not None
        ]
        return ",".join(parts) if parts else AS_IS


SURROUNDINGS = Precision()
"""Every field as in the surroundings; written `as_is`."""

FP32 = Precision(param="fp32", compute="fp32", output="fp32", reduce="fp32")
"""What a policy's default fills its open fields from."""


def _read_part(part: str, pairs: dict[str, str]) -> None:
    """Read one `c=bf16` into `pairs`."""
    key, _, name = (piece.strip() for piece in part.partition("="))
    field = SHORT_KEYS.get(key, key)
    if field not in SHORT_KEYS.values():
        keys = ", ".join(f"{short} ({long})" for short, long in SHORT_KEYS.items())
        raise PrecisionTextError(
            f"need parts such as c=bf16 with the keys {keys}; got {shown(part)}"
        )
    if field in pairs:
        raise PrecisionTextError(
            f"need each key once; got {field} twice, {pairs[field]} and {shown(name)}"
        )
    pairs[field] = parse_format(name).name

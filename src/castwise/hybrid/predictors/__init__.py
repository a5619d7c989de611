"""Ways to predict where the weights go, behind the seam of `castwise.hybrid.predictor`.

    null.py               nothing happens: the control
    window_line.py        a line through the last window; the default
    adam_hold.py          the optimizer's momentum, held
    outer_nesterov.py     Nesterov momentum on windows (SNOO)
    residual_minimum.py   the combination of iterates with the least residual (RNA)
    dynamic_modes.py      the linear map of the iterates, run on (DMD)

`windowed.py` is what the windowed ones share, `iterates.py` those that combine several
iterates, and `backtest.py` is their confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from castwise.errors import SettingsError
from castwise.hybrid.predictor import Predictor
from castwise.hybrid.predictors.adam_hold import AdamHold as AdamHold
from castwise.hybrid.predictors.dynamic_modes import DynamicModes as DynamicModes
from castwise.hybrid.predictors.null import NullPredictor as NullPredictor
from castwise.hybrid.predictors.outer_nesterov import OuterNesterov as OuterNesterov
from castwise.hybrid.predictors.residual_minimum import (
    ResidualMinimum as ResidualMinimum,
)
from castwise.hybrid.predictors.window_line import WindowLine as WindowLine
from castwise.wording import did_you_mean, shown

PREDICTORS: Mapping[str, type[Predictor]] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            WindowLine,
            AdamHold,
            OuterNesterov,
            ResidualMinimum,
            DynamicModes,
            NullPredictor,
        )
    }
)
"""Every predictor by its name."""


def make_predictor(
    name: str, options: Mapping[str, float], *, window: int
) -> Predictor:
    """Return the predictor of a name.

    Args:
        name: One of `PREDICTORS`.
        options: Its own settings, by name.
        window: Steps of a window, unless the options say otherwise.

    Raises:
        SettingsError: There is no such predictor, or it has no such setting.
    """
    if name not in PREDICTORS:
        raise SettingsError(
            f"need a predictor out of {', '.join(PREDICTORS)}, got {shown(name)}"
            f"{did_you_mean(name, PREDICTORS)}"
        )
    try:
        return PREDICTORS[name](**{"window": window, **options})
    except TypeError as error:
        raise SettingsError(
            f"the predictor {name} cannot be built from {dict(options)}: {error}"
        ) from None

"""Which format each tensor shall have: says, never does, and imports no torch."""

from castwise.policy.bound import BoundPolicy as BoundPolicy
from castwise.policy.keys import PHASES as PHASES
from castwise.policy.keys import PHASES_WITH_BACKWARD as PHASES_WITH_BACKWARD
from castwise.policy.keys import STAGES as STAGES
from castwise.policy.keys import ModuleFacts as ModuleFacts
from castwise.policy.keys import Rule as Rule
from castwise.policy.ops import DEFAULT_TABLE as DEFAULT_TABLE
from castwise.policy.ops import OperatorTable as OperatorTable
from castwise.policy.precision import Precision as Precision
from castwise.policy.presets import PRESETS as PRESETS
from castwise.policy.presets import preset as preset
from castwise.policy.rules import Policy as Policy
from castwise.policy.schema import json_schema as json_schema
from castwise.policy.silences import Silence as Silence

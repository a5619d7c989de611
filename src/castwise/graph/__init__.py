"""A policy resolved on captured graphs: a format for every value, and every cast."""

from castwise.graph.compiled import CompiledModel as CompiledModel
from castwise.graph.compiled import compile as compile  # noqa: A004 -- as in torch.compile
from castwise.graph.gradient_records import GradientFlow as GradientFlow
from castwise.graph.gradients import gradient_flow as gradient_flow
from castwise.graph.measure import Measured as Measured
from castwise.graph.measure import measure as measure
from castwise.graph.plan import Plan as Plan

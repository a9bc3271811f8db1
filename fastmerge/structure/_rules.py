"""The rules of the tracer, complete: importing this module registers all of them in RULES."""

from . import _rules_arithmetic, _rules_views
from ._rule import RULES, Context, Rule, Value

__all__ = ["RULES", "Context", "Rule", "Value", "_rules_arithmetic", "_rules_views"]

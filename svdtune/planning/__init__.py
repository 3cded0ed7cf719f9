"""Ranks, parameters and memory of an adapter, from a checkpoint whose model is never built."""

from svdtune.planning.anatomy import anatomy
from svdtune.planning.chart import by_depth, draw_chart
from svdtune.planning.costs import Costs
from svdtune.planning.levers import cheapest, devices_needed, fits, least
from svdtune.planning.memory import Setting, estimate, initialisation_bytes
from svdtune.planning.plan import Plan, plan
from svdtune.planning.rank_table import parse_budget

__all__ = [
    "Costs",
    "Plan",
    "Setting",
    "anatomy",
    "by_depth",
    "cheapest",
    "devices_needed",
    "draw_chart",
    "estimate",
    "fits",
    "initialisation_bytes",
    "least",
    "parse_budget",
    "plan",
]

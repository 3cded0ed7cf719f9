"""Ranks, parameters and memory of an adapter, from a checkpoint whose model is never built."""

from svdtune.planning.anatomy import Anatomy, anatomy
from svdtune.planning.chart import by_depth, draw_chart
from svdtune.planning.costs import RANKED, Costs
from svdtune.planning.levers import Choice, cheapest, devices_needed, fits, least
from svdtune.planning.memory import Memory, Setting, estimate, initialisation_bytes
from svdtune.planning.plan import Plan, plan
from svdtune.planning.rank_table import RankTable, parse_budget

__all__ = [
    "RANKED",
    "Anatomy",
    "Choice",
    "Costs",
    "Memory",
    "Plan",
    "RankTable",
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

"""Ranks, parameters and memory of an adapter, from a checkpoint whose model is never built."""

from svdtune.planning.chart import by_depth, draw
from svdtune.planning.checkpoint import Checkpoint, open_checkpoint
from svdtune.planning.memory import Memory, estimate
from svdtune.planning.methods import Method, method
from svdtune.planning.plan import Layer, Plan, make_plan
from svdtune.planning.solve import RankTable, parse_budget
from svdtune.planning.targets import resolve_targets

__all__ = [
    "Checkpoint",
    "Layer",
    "Memory",
    "Method",
    "Plan",
    "RankTable",
    "by_depth",
    "draw",
    "estimate",
    "make_plan",
    "method",
    "open_checkpoint",
    "parse_budget",
    "resolve_targets",
]

"""Metrics of generated text against several references: the E2E challenge's five."""

from svdtune.evaluation.nlg.e2e import e2e_metrics
from svdtune.evaluation.nlg.java import require_java

__all__ = ["e2e_metrics", "require_java"]

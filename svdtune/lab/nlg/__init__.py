"""Metrics of generated text against several references: the E2E challenge's five."""

from svdtune.lab.nlg.e2e import bleu_and_nist, e2e_metrics
from svdtune.lab.nlg.java import require_java

__all__ = ["bleu_and_nist", "e2e_metrics", "require_java"]

"""The laboratory's verbs; importing it makes them known by name."""

from svdtune.cli import VERBS

VERBS.add("study", "svdtune.lab.cli.studies")

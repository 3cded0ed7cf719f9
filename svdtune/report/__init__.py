"""The report: one self-contained page about some runs, figures for papers, and their numbers as
CSV."""

from svdtune.report.figures import figures, write_figures
from svdtune.report.gather import gather
from svdtune.report.numbers import all_numbers, as_csv
from svdtune.report.render import render
from svdtune.report.summary import add_analysis

__all__ = ["add_analysis", "all_numbers", "as_csv", "figures", "gather", "render", "write_figures"]

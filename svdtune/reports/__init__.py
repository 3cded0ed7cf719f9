"""The report: one self-contained page about some runs, figures for papers, and their numbers as
CSV."""

from svdtune.reports.figures import figures, write_figures
from svdtune.reports.files import render, report
from svdtune.reports.gather import gather, of_base
from svdtune.reports.numbers import all_numbers

__all__ = [
    "all_numbers",
    "figures",
    "gather",
    "of_base",
    "render",
    "report",
    "write_figures",
]

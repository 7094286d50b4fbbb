"""Reproductions: the figures and tables of the four papers, one file for each, at a scale that fits two cores."""

from __future__ import annotations

from dropscope.reproduce.entry import Claim as Claim
from dropscope.reproduce.entry import Entry as Entry
from dropscope.reproduce.entry import Findings as Findings
from dropscope.reproduce.entry import Scale as Scale

# The modules that hold an ENTRY, in the order in which they are listed and run.
MODULES: tuple[str, ...] = (
    "a_fig1",
    "a_gradient",
    "a_trajectory",
    "a_alignment",
    "a_exact",
    "a_transformer",
    "b_minima",
    "c_fig1",
    "c_fig2",
    "c_fig8",
    "c_table1",
    "c_fig13",
    "c_fig14",
    "d_fig1",
    "d_fig2",
    "d_fig3",
    "d_fig4",
    "d_fig5",
)

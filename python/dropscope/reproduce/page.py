"""The page of claims: what each paper says, what was measured here, and whether it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dropscope import _files
from dropscope.reproduce.entry import Claim, Verdict
from dropscope.reproduce.runner import FOLDER, Record

PAPERS = {
    "A": "Stochastic modified equations and dynamics of dropout algorithm (arXiv:2305.15850)",
    "B": "On the variance principle: flatness of the solution and noise structure of dropout (arXiv:2111.01022)",
    "C": "Implicit regularization of dropout (arXiv:2207.05952)",
    "D": "The implicit and explicit regularization effects of dropout (arXiv:2002.12915)",
}
MARKS: dict[Verdict, str] = {"reproduced": "✓ reproduced", "partly": "~ partly", "not reproduced": "✗ not reproduced"}


def write(records: Sequence[Record], out: Path) -> Path:
    """Write ``papers.md`` under ``out``: one table of claims, then each entry with its setting and figure."""
    lines = ["# The four papers, computed", "", *_lead(records), "", *_table(records)]
    for letter, title in PAPERS.items():
        chosen = [record for record in records if record.paper == letter]
        if chosen:
            lines += ["", f"## {letter}: {title}"]
        for record in chosen:
            lines += ["", *_section(record)]
    return _files.write_text(out / "papers.md", "\n".join(lines) + "\n")


def _lead(records: Sequence[Record]) -> list[str]:
    verdicts = Counter(claim.verdict for record in records for claim in record.claims)
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in MARKS if verdicts[verdict])
    minutes = sum(record.seconds for record in records) / 60
    return [
        f"Written by `dropscope reproduce`. {sum(verdicts.values())} claims: {counts}. "
        f"All entries together took {minutes:.0f} minutes on {_machine(records)}.",
        "",
        "A verdict is computed from the numbers by the rule in the entry's code. Each number can be computed again by "
        "the command beside it, and lies with everything its figure shows in `papers/NAME.json`. In A, B and C, p is "
        "the probability to keep a unit; in D, q is the probability to drop it. Errors are standard errors over "
        "repeats. Sizes, rates and lengths are ours where the papers' do not fit; where several were tried, the "
        "setting under the entry says so.",
    ]


def _machine(records: Sequence[Record]) -> str:
    machines = {f"{r.provenance['threads']} thread(s), {r.provenance['torch']}" for r in records}
    return " and ".join(sorted(f"torch with {machine}" for machine in machines)) or "this machine"


def _table(records: Sequence[Record]) -> list[str]:
    head = ["| | claim | paper | measured here | verdict | command |", "|---|---|---|---|---|---|"]
    return head + [
        f"| {record.place} | {_cell(claim.text)} | {_cell(claim.paper)} | {_cell(claim.ours)} | "
        f"{MARKS[claim.verdict]} | `{record.provenance['command']}` |"
        for record in records
        for claim in record.claims
    ]


def _section(record: Record) -> list[str]:
    lines = [
        f"### {record.place}: {record.title}",
        "",
        record.setting,
        "",
        f"![{record.title}]({FOLDER}/{record.name}.png)",
    ]
    notes = [_note(claim) for claim in record.claims if claim.why]
    return lines + (["", *notes] if notes else []) + ["", f"`{record.provenance['command']}`: {record.seconds:.0f} s."]


def _note(claim: Claim) -> str:
    return f"- *{claim.text}* {MARKS[claim.verdict]}. {claim.why}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

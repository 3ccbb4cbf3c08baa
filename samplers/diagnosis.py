"""What `doctor` found: a report that prints as a table."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Verdict = Literal["runs", "note", "refused"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: a part of the plan such as ``caches: gate``, or what else was looked at.
        verdict: ``runs``; ``note`` where the user should know something; ``refused`` where it would fail, do nothing,
            or be wrong.
        text: what was found, and the mend.
    """

    subject: str
    verdict: Verdict
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What a pipeline makes of a plan. Prints as a table.

    Attributes:
        pipeline: class name of the pipeline.
        plan: name of the plan, if it has one.
        findings: in the order in which they were made.
    """

    pipeline: str
    plan: str | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is refused."""
        return all(finding.verdict != "refused" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __rich__(self) -> Table:
        title = f"{self.pipeline}, {self.plan}" if self.plan else self.pipeline
        table = Table(title=title, title_justify="left")
        for heading in ("", "verdict", "what was found"):
            table.add_column(heading, overflow="fold")
        colours = {"runs": "green", "note": "yellow", "refused": "red"}
        for finding in self.findings:
            verdict = Text(finding.verdict, style=colours[finding.verdict])
            table.add_row(Text(finding.subject), verdict, Text(finding.text))
        return table

    def __str__(self) -> str:
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

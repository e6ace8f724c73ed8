"""A verdict that is not `equivalent`, in plain words: the place, the figures, the likely cause, how to see it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from equivalence.verdict import CheckReport, PortReport

LISTED = 5
"""How many leaves or caveats are named before the rest are only counted."""


def figure(value: float | None, digits: int = 2) -> str:
    """A figure of a report for a reader; a dash where it does not apply.

    >>> figure(3.17e-16), figure(None), figure(0.0), figure(1.28)
    ('3.2e-16', '–', '0', '1.3')
    """
    return "–" if value is None else f"{value:.{digits}g}"


def explain(target: str, report: PortReport, check: str | None = None) -> str:
    """Why `report`, or one `check` of it, is divergent or inconclusive. Several lines of plain text.

    The first line names target, port, check and the first module that differs; then follow, as far as they are
    known: the figures of the worst leaf, the cause and its fix, what could not be judged, the caveats, and the
    command that shows it again.

    >>> from equivalence.verdict import Divergence
    >>> loss = CheckReport("loss", "divergent", gap=4.7e-4, expected_gap=3e-16, resolution=1e-15, worst="eval.loss")
    >>> print(explain("gpt2", PortReport("nnx", "divergent", (loss,), divergence=Divergence("loss", "head"))))
    gpt2/nnx · loss · divergent, first at head
      gap 0.00047, expected 3e-16, resolution 1e-15 · worst at eval.loss
    """
    failed = [item for item in report.checks if item.verdict != "equivalent"]
    chosen = next((item for item in failed if item.name == check), None)
    if check is None:
        chosen = _decisive(report, failed)
    lines = [_headline(target, report, check, chosen)]
    if chosen is not None:
        lines += _figures(chosen)
    lines += _cause(report, chosen)
    lines += _unjudged(report)
    others = [f"{item.name} ({item.verdict})" for item in failed if item is not chosen]
    if others:
        lines.append(f"also: {', '.join(others)}")
    lines += shortened([f"caveat: {caveat_line(item.summary, item.module, item.check)}" for item in report.caveats])
    if report.reproduce:
        lines.append(f"reproduce: {report.reproduce}")
    return "\n  ".join(lines)


def caveat_line(summary: str, module: str | None, check: str | None) -> str:
    """A caveat in one line, led by where it was seen.

    >>> caveat_line("inert: no input moves it", "attn.key", None)
    'attn.key: inert: no input moves it'
    """
    place = " · ".join(part for part in (check, module) if part)
    return f"{place}: {summary}" if place else summary


def float64_line(report: PortReport) -> str:
    """How the float64 runs of each side were made, where they are not simply the code as it is; else nothing.

    >>> float64_line(PortReport("nnx", "equivalent", (), float64={"reference": "lifted", "port": "native"}))
    'float64: reference lifted, port native'
    """
    if set(report.float64.values()) == {"native"}:
        return ""
    return f"float64: {', '.join(f'{side} {made}' for side, made in report.float64.items())}"


def shortened(lines: Sequence[str]) -> list[str]:
    """The first few lines, and a count of the rest.

    >>> shortened([str(n) for n in range(7)])
    ['0', '1', '2', '3', '4', '… and 2 more']
    """
    rest = len(lines) - LISTED
    return [*lines[:LISTED], *([f"… and {rest} more"] if rest > 0 else [])]


def _decisive(report: PortReport, failed: Sequence[CheckReport]) -> CheckReport | None:
    """The check that the divergence names, else the first of the worst verdict."""
    if report.divergence is not None:
        for item in failed:
            if item.name == report.divergence.check:
                return item
    return next((item for item in failed if item.verdict == report.verdict), failed[0] if failed else None)


def _headline(target: str, report: PortReport, check: str | None, chosen: CheckReport | None) -> str:
    parts = [f"{target}/{report.port}"]
    name = chosen.name if chosen is not None else check
    if name:
        parts.append(name)
    verdict = chosen.verdict if chosen is not None else report.verdict
    divergence = report.divergence
    if divergence is not None and divergence.module and name == divergence.check:
        place = divergence.module
        if divergence.port_module and divergence.port_module != place:
            place += f" ({report.port}: {divergence.port_module})"
        verdict_at = f"{verdict}, first at {place}"
    else:
        verdict_at = verdict
    return " · ".join([*parts, verdict_at])


def _figures(check: CheckReport) -> Iterator[str]:
    figures = []
    if check.gap is not None:
        figures.append(f"gap {figure(check.gap)}, expected {figure(check.expected_gap)}")
    if check.resolution is not None:
        figures.append(f"resolution {figure(check.resolution)}")
    if check.precision is not None and check.precision > 100:
        figures.append(f"precision {figure(check.precision)}")
    line = ", ".join(figures)
    if check.worst:
        line = f"{line} · worst at {check.worst}" if line else f"worst at {check.worst}"
    if line:
        yield line
    if check.message:
        yield from check.message.splitlines()


def _cause(report: PortReport, chosen: CheckReport | None) -> Iterator[str]:
    divergence = report.divergence
    if divergence is None or divergence.cause is None or chosen is None or chosen.verdict != "divergent":
        return
    cause = divergence.cause
    yield f"cause ({'confirmed' if cause.confirmed else 'not confirmed'}): {cause.summary}"
    if cause.fix:
        yield f"fix: {cause.fix}"


def _unjudged(report: PortReport) -> Iterator[str]:
    if report.coverage.uncovered:
        uncovered = shortened(report.coverage.uncovered)
        yield f"not judged ({1 - report.coverage.parameters:.1%} of the parameters): {', '.join(uncovered)}"

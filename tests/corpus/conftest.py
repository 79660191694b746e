"""Shows at the end of a run how many recorded exchanges agreed, or that there were none to compare with."""

import pytest

LINE = "corpus"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Reports carry the lines, since with several workers the tests run in other processes than this hook.
    reports = [report for kind in ("passed", "failed", "skipped") for report in terminalreporter.getreports(kind)]
    lines = [text for report in reports for name, text in report.user_properties if name == LINE]
    if lines:
        terminalreporter.section("recorded provider exchanges")
        for text in sorted(set(lines)):
            terminalreporter.line(str(text))

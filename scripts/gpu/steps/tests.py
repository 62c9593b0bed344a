"""
The repository's GPU tests (`pytest -m gpu`), counted as they end. A small run only collects them.

    python scripts/gpu/steps/tests.py --data DATA --results RESULTS [--small] [--seconds 60]
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
from shared import ROOT, Record, arguments

WORKERS = 4  # compiling kernels takes most of the time


class Recorder:
    """A pytest plugin that records every outcome immediately."""

    def __init__(self, record: Record):
        self.record = record

    def pytest_collection_finish(self, session) -> None:
        self.record.data["collected"] = len(session.items)
        self.record.save()

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.note("errors", report)

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.note("failed" if report.when == "call" else "errors", report)
        elif report.skipped:
            self.note("skipped", report)
        elif report.when == "call":
            self.note("passed", report)

    def note(self, outcome: str, report) -> None:
        """Count an outcome, and record name and reason unless the test passed."""
        data = self.record.data
        data[outcome] += 1
        data["test_seconds"][report.nodeid] = round(getattr(report, "duration", 0.0), 2)
        if outcome != "passed":
            data["details"].append({"test": report.nodeid, "outcome": outcome, "reason": reason_of(report)})
        self.record.save()


def reason_of(report) -> str:
    """First line of the error, or why the test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[-1])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:300] if lines else ""


def files_with_gpu_tests() -> list[str]:
    """The files to collect; others need packages that a bare machine lacks."""
    return sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8"))


def main() -> None:
    options = arguments(__doc__)
    record = Record("tests", options)
    record.data |= {"collected": 0, "passed": 0, "failed": 0, "errors": 0, "skipped": 0, "details": [], "test_seconds": {}}
    record.save()
    words = ["-m", "gpu", "-p", "no:cacheprovider", "-q", "--continue-on-collection-errors", "--tb=short"]
    if options.small:
        words.append("--collect-only")
    elif importlib.util.find_spec("xdist"):
        words += ["-n", str(WORKERS)]
    # this folder's modules must not hide others, nor the repository's folders, such as evaluate/, libraries of their names
    with contextlib.suppress(ValueError):
        sys.path.remove(str(Path(__file__).resolve().parent))
    os.chdir(ROOT)
    code = pytest.main([*words, "--rootdir", str(ROOT), *files_with_gpu_tests()], plugins=[Recorder(record)])
    counts = sum(record.data[outcome] for outcome in ("passed", "failed", "errors", "skipped"))
    record.finish(exit_code=int(code), collected=max(record.data["collected"], counts))  # with xdist the workers collect
    if int(code) not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with code {int(code)}; its log says why")


if __name__ == "__main__":
    main()

"""The table of docs/versions.md is that of the result files, and what the code claims to be tested with is in it."""

import sys
import tomllib
from pathlib import Path

import pytest

from dijiang.modeling.transformers_compat import TESTED_TRANSFORMERS, minor_version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import test_versions

    return test_versions


def test_table_is_that_of_the_results(versions):
    page = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    assert versions.draw(page, versions.read_results()) == page


def test_oldest_and_newest_tested_versions_passed(versions):
    results = {x["name"]: x for x in versions.read_results()}
    assert all(not x["failed"] and x["passed"] and x["readme"]["same_without_cache"] for x in results.values())
    for name, tested in zip(("oldest", "newest"), TESTED_TRANSFORMERS, strict=True):
        assert minor_version(results[name]["versions"]["transformers"]) == minor_version(tested)
        assert results[name]["tests"] == "model, conversion, package"
    bounds = dict(line.split("==") for line in versions.lower_bounds(PYPROJECT))
    assert {name: results["oldest"]["versions"][name].split("+")[0] for name in ("torch", "transformers")} == {
        name: bounds[name] + ".0" * (3 - len(bounds[name].split("."))) for name in ("torch", "transformers")
    }


def test_every_dependency_has_a_lower_bound(versions):
    bounds = versions.lower_bounds(PYPROJECT)
    assert {"scipy", "peft", "deepspeed", "datasets"} <= {line.split("==")[0] for line in bounds}
    broken = {
        "project": {"dependencies": ["torch>=2.7", "scipy"], "optional-dependencies": {name: [] for name in versions.EXTRAS}}
    }
    with pytest.raises(SystemExit, match="gives 'scipy' no lower bound"):
        versions.lower_bounds(broken)


def test_pinned_transformers_is_the_newest_tested():
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert minor_version(pins["transformers"]) == minor_version(TESTED_TRANSFORMERS[1])


def test_other_pythons_run_where_they_are_installed(versions, monkeypatch, capsys):
    monkeypatch.setattr(versions.shutil, "which", {"python3.12": "/opt/python3.12"}.get)
    assert versions.installed_pythons(None) == [sys.executable]
    assert versions.installed_pythons(["3.12", "3.99"]) == ["/opt/python3.12"]
    assert "python3.99 is not installed" in capsys.readouterr().out
    assert versions.result_name("oldest", sys.executable) == "oldest"
    assert versions.result_name("oldest", "/opt/python3.12") == "oldest-python3.12"
    (result,) = [result for result in versions.read_results() if result["name"] == "oldest"]
    assert "| oldest |" in versions.table([result | {"name": "oldest-python3.12"}])

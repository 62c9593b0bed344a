"""
Make a folder from which this checkout can be imported, without pip: what to do where setuptools is too old to install it.

    python scripts/gpu/link_checkout.py FOLDER    # then PYTHONPATH=FOLDER
"""

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link(folder: Path) -> None:
    """Fill a new `folder` with links to the packages that pyproject.toml names, and the name and version of the whole."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name, version = project["project"]["name"], project["project"]["version"]
    shutil.rmtree(folder, ignore_errors=True)
    for package, place in sorted(project["tool"]["setuptools"]["package-dir"].items()):
        target = folder.joinpath(*package.split("."))
        target.mkdir(parents=True)
        for entry in (ROOT / place).iterdir():
            if entry.name != "__pycache__":
                (target / entry.name).symlink_to(entry)
    facts = folder / f"{name}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


if __name__ == "__main__":
    link(Path(sys.argv[1]))

"""
Make a folder from which this checkout can be imported as `dijiang`, by links and without pip.

    python scripts/link_checkout.py FOLDER    # then PYTHONPATH=FOLDER

The type checker, editors and the documentation read the rooms through such a folder, since they know nothing of the
package-dir of setuptools. A machine whose setuptools is too old to install the checkout runs it from there.
"""

import shutil
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def link(folder: Path) -> None:
    """Fill a new `folder` with links to the packages that pyproject.toml names, and with the project's name and version."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    name, version = pyproject["project"]["name"], pyproject["project"]["version"]
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / name
    package.mkdir(parents=True)
    for entry in (ROOT / name).iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for module, room in pyproject["tool"]["setuptools"]["package-dir"].items():
        if module != name:
            folder.joinpath(*module.split(".")).symlink_to(ROOT / room, target_is_directory=True)
    metadata = folder / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")


if __name__ == "__main__":
    link(Path(sys.argv[1]))

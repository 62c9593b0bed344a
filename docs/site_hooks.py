"""What the site needs of the repository besides the pages: the rooms as one package, and the files that pages link to."""

import re
import shutil
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("modeling", "convert", "train", "evaluate", "compress")
SHOWN_AS_THEY_ARE = (".json", ".png", ".txt")  # browsers would save the others to disk instead
REPOSITORY_LINK = re.compile(r"\]\(\.\./([^)#]+)\)")

package = tempfile.TemporaryDirectory(prefix="dijiang-docs-")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config):
    """Lay the rooms out as `dijiang` is imported: mkdocstrings reads files, and knows nothing of setuptools' package-dir."""
    laid_out = Path(package.name, "dijiang")
    ignore = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(ROOT / "dijiang", laid_out, dirs_exist_ok=True, ignore=ignore)
    for room in ROOMS:
        shutil.copytree(ROOT / room, laid_out / room, dirs_exist_ok=True, ignore=ignore)
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [package.name]
    return config


def on_page_markdown(markdown, page, config, files):
    """Put the files of the repository that a page links to beside the pages, under repository/."""

    def shown(match: re.Match) -> str:
        path = match[1]
        if not (ROOT / path).is_file():
            raise PluginError(f"{page.file.src_uri} links to ../{path}, which is no file of the repository")
        place = f"repository/{path}"
        if Path(path).suffix not in SHOWN_AS_THEY_ARE:
            place += ".txt"
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
        return f"]({place})"

    return REPOSITORY_LINK.sub(shown, markdown)


def on_shutdown():
    package.cleanup()

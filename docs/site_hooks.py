"""Hooks of the site's build: lay the rooms out as one package for mkdocstrings, and add the files that pages link to."""

import re
import runpy
import tempfile
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
SHOWN_AS_THEY_ARE = (".json", ".png", ".txt")  # browsers would save the others to disk instead
REPOSITORY_LINK = re.compile(r"\]\(\.\./([^)#]+)\)")
PAGES_OF_THE_ROOT = ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")

package = tempfile.TemporaryDirectory(prefix="dijiang-docs-")


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config):
    """Link the rooms as `dijiang` is imported: mkdocstrings reads files, and knows nothing of setuptools' package-dir."""
    runpy.run_path(str(ROOT / "scripts" / "link_checkout.py"))["link"](Path(package.name))
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [package.name]
    return config


def on_files(files, config):
    """Add the pages that hosts of repositories expect at the root, with their links seen from docs/."""
    for name in PAGES_OF_THE_ROOT:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda match: f"]({relative_to_docs(match[1])})", text)
        files.append(File.generated(config, name.lower(), content=text))
    return files


def relative_to_docs(path: str) -> str:
    """A link of a page at the root as a page in docs/ would write it."""
    if path in PAGES_OF_THE_ROOT:
        return path.lower()
    return path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"


def on_page_markdown(markdown, page, config, files):
    """Add the files of the repository that a page links to to the site, under repository/."""

    def shown(match: re.Match) -> str:
        path = match[1]
        if path in PAGES_OF_THE_ROOT:
            return f"]({path.lower()})"
        if not (ROOT / path).is_file():
            raise PluginError(f"{page.file.src_uri} links to ../{path}, which is no file of the repository")
        copy = f"repository/{path}"
        if Path(path).suffix not in SHOWN_AS_THEY_ARE:
            copy += ".txt"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
        return f"]({copy})"

    return REPOSITORY_LINK.sub(shown, markdown)


def on_shutdown():
    package.cleanup()

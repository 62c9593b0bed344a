"""Packages of the corpus: a list with pinned versions and hashes, downloads into a cache, and the pages inside."""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import prose

DEFAULT_PATTERNS = ("*.html", "*.html.gz", "*.xhtml", "*.htm")
MAX_CHARACTERS = 9_000_000  # read of a package without a held-out source
UNPINNED = "-"
LANGUAGES = (
    "af|ar|ast|be|bg|bn|bs|ca|cs|da|de|el|eo|es|et|eu|fa|fi|fr|ga|gl|gu|he|hi|hr|hu|hy|ia|is|it|ja|ka|kk|km|kn|ko|lt|lv|mk|ml|mr|ms|"
    "nb|nds|ne|nl|nn|oc|pa|pl|pt|ro|ru|si|sk|sl|sq|sr|sv|ta|te|tg|th|tr|ug|uk|uz|vi|zh|zh-cn|en_GB|german|french|spanish"
)
OTHER_LANGUAGE = re.compile(
    rf"/(?:{LANGUAGES})(?:[-_@][A-Za-z]+)?/|[._](?:{LANGUAGES})(?:[-_][A-Z]+)?\.(?:html|txt|xhtml|page)(?:\.gz)?$"
)
NO_PAGE = re.compile(
    r"/(copyright|changelog[^/]*|NEWS[^/]*|LICEN[CS]E[^/]*|COPYING[^/]*|genindex[^/]*|search\.html|_sources/.*|lintian/.*|"
    r"allclasses[^/]*|index-all\.html|[^/]*-members\.html|class-use/.*|src/.*)$"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """
    A line of the list.

    Attributes:
        kind: deb or wheel.
        name: of the package.
        version: to download; `-` if none is pinned yet.
        sha256: of the package's file; `-` if none is pinned yet.
        held: name of the held-out source that its pages are kept back for, one in ten; empty if all are for training.
        patterns: file names inside, with wildcards.
    """

    kind: str
    name: str
    version: str
    sha256: str
    held: str
    patterns: tuple[str, ...]

    def line(self) -> str:
        patterns = "" if self.patterns == DEFAULT_PATTERNS else ",".join(self.patterns)
        return "\t".join([self.kind, self.name, self.version, self.sha256, self.held or UNPINNED, patterns]).rstrip("\t")


def read_list(path: Path) -> list[Package]:
    """
    The packages in a list.

    Raises:
        ValueError: if a line does not hold what it should.
    """
    packages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) not in (5, 6) or fields[0] not in ("deb", "wheel"):
            raise ValueError(
                f"{path.name}, line {number}: expected kind (deb or wheel), name, version, sha256, held and perhaps patterns, "
                f"with tabs between them; found {line!r}"
            )
        kind, name, version, sha256, held = fields[:5]
        patterns = tuple(fields[5].split(",")) if len(fields) == 6 else DEFAULT_PATTERNS
        held = "" if held == UNPINNED else held
        packages.append(Package(kind=kind, name=name, version=version, sha256=sha256, held=held, patterns=patterns))
    return packages


def write_list(path: Path, packages: list[Package]) -> None:
    """Write the list again, with its comments at the top."""
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    path.write_text("\n".join([*comments, *(package.line() for package in packages)]) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, cache: Path) -> Path:
    """
    The package's file in the cache folder, downloaded if it is not there yet.

    Raises:
        ValueError: if that version is not offered any more, or the file is another one than was pinned.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name}_*.deb" if package.kind == "deb" else f"{package.name.replace('-', '_')}-*.whl"
    before = set(cache.glob(pattern))
    for path in sorted(before):
        if package.sha256 in (file_sha256(path), UNPINNED):
            return path
    done = subprocess.run(download_command(package), cwd=cache, capture_output=True, text=True)
    new = sorted(set(cache.glob(pattern)) - before)
    if done.returncode or not new:
        what = package.name if package.version == UNPINNED else f"{package.name} {package.version}"
        raise ValueError(
            f"{what} cannot be downloaded; if that version is no longer offered, replace version and hash in the list by - "
            f"and run make_corpus.py pin ({(done.stderr.strip().splitlines() or ['no message'])[-1]})"
        )
    path, found = new[-1], file_sha256(new[-1])
    if package.sha256 not in (found, UNPINNED):
        path.unlink()
        raise ValueError(f"{path.name} has SHA-256 {found[:16]}..., and the list says {package.sha256[:16]}...; pin it again")
    return path


def download_command(package: Package) -> list[str]:
    version = "" if package.version == UNPINNED else package.version
    if package.kind == "deb":
        return ["apt-get", "download", f"{package.name}={version}" if version else package.name]
    wanted = f"{package.name}=={version}" if version else package.name
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", wanted]


def pinned(package: Package, cache: Path) -> Package:
    """The package with version and hash of the file that was downloaded, if the list does not give them."""
    path = fetch(package, cache)
    if package.kind == "deb":
        shown = subprocess.run(["dpkg-deb", "--field", path, "Version"], capture_output=True, text=True, check=True)
        version = shown.stdout.strip()
    else:
        version = path.name.split("-")[1]
    return replace(package, version=version, sha256=file_sha256(path))


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a package; of a link the content is empty."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, archive.read(name)
        return
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member).read()
            elif member.issym() and member.name.endswith("/copyright"):
                yield member.name.removeprefix("./"), f"see {member.linkname}".encode()


def is_page(name: str, patterns: tuple[str, ...]) -> bool:
    wanted = any(fnmatchcase(name, pattern) for pattern in patterns)
    return wanted and not NO_PAGE.search(f"/{name}") and not OTHER_LANGUAGE.search(f"/{name}")


def reader_name(name: str) -> str:
    """Suffix that chooses the reader of a file; fortunes have none, and dictionaries and numbered info files have others."""
    if "/games/fortunes/" in name:
        return ".fortunes" if "." not in PurePosixPath(name).name else ""
    if name.endswith(".dict.dz"):
        return ".txt"
    if "/share/info/" in name:
        return ".info"
    if re.search(r"/man\d/[^/]*\.\d\w*\.gz$", name):
        return ".1"
    return prose.suffix(name)


def read_package(package: Package, path: Path) -> tuple[list[tuple[str, str]], str]:
    """
    Pages of a package's file, by path and text, and the text of its licence.

    Pages are taken in the order of a hash of their path until they have `MAX_CHARACTERS`, then given by path.
    """
    files, licence = {}, ""
    for name, content in members(path):
        if PurePosixPath(name).name == "copyright" and name.endswith(f"{package.name}/copyright"):
            licence = content.decode("utf-8", errors="replace")
        elif name.endswith(".dist-info/METADATA"):
            licence = content.decode("utf-8", errors="replace")
        if is_page(name, package.patterns):
            files[name] = content
    found, characters = [], 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        reader = prose.READERS.get(reader_name(name))
        if reader is None:
            continue
        text = reader(prose.decoded(files[name], name))
        if len(text) > prose.MIN_PAGE:
            found.append((name, text))
            characters += len(text)
        if characters > MAX_CHARACTERS and not package.held:
            break
    return sorted(found), licence


def pages(package: Package, cache: Path) -> tuple[list[tuple[str, str]], str]:
    """`read_package`, kept in the cache folder until the package, its patterns or the readers change."""
    path = fetch(package, cache)
    code = b"".join(Path(module).read_bytes() for module in (__file__, prose.__file__))
    key = hashlib.sha256(code + json.dumps([package.sha256, package.patterns, package.held]).encode()).hexdigest()[:24]
    kept = cache / "pages" / f"{package.name}-{key}.json"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(read_package(package, path)), encoding="utf-8")
        temporary.rename(kept)
    found, licence = json.loads(kept.read_text(encoding="utf-8"))
    return [(name, text) for name, text in found], licence

"""Packages of the corpus: a list with pinned versions and hashes, downloads into a cache, their pages and licenses."""

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

from dijiang.common.outputs import write_text_whole

DEFAULT_PATTERNS = ("*.html", "*.html.gz", "*.xhtml", "*.htm")
MAX_CHARACTERS = 9_000_000  # read from a package without a held-out source
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


LICENSE_FIELD = re.compile(r"^License(?:-Expression)?:[ \t]*(\S[^\n]*)", re.MULTILINE)
LICENSE_CLASSIFIER = re.compile(r"^Classifier: License :: OSI Approved :: ([^\n]*)", re.MULTILINE)
LICENSE_PHRASES = {  # of copyright files that do not name the license in a field
    "GFDL": r"GNU\s+Free\s+Documentation\s+Licen[sc]e|GNU FDL",
    "GPL": r"GNU\s+General\s+Public\s+Licen[sc]e",
    "LGPL": r"GNU\s+(Lesser|Library)\s+General\s+Public",
    "Apache": r"Apache\s+(Software\s+)?Licen[sc]e",
    "MIT": r"Permission is hereby granted, free of\s+charge",
    "BSD": r"Redistribution and use in source and binary",
    "CC-BY-SA": r"Creative Commons Attribution-?\s*Share",
    "CC-BY": r"Creative Commons Attribution(?!-?\s*Share)",
    "Artistic": r"Artistic\s+Licen[sc]e",
    "PostgreSQL": r"Permission to use, copy, modify, and distribute this software and its documentation for any purpose,",
    "public domain": r"public\s+domain",
    "permissive": r"[Pp]ermission (to use, copy|is (hereby )?granted)",
}
MOST_NAMES = 4  # of licenses


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """
    A line of the list.

    Attributes:
        kind: deb or wheel.
        name: of the package.
        version: to download; `-` if none is pinned yet.
        sha256: of the package's file; `-` if none is pinned yet.
        held: name of the held-out source that one in ten of its pages goes to; empty if all are for training.
        patterns: file names to read, with wildcards.
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
    """The packages in a list; ValueError if a line is malformed."""
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
    """Replace the list, keeping its comments at the top."""
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    path.write_text("\n".join([*comments, *(package.line() for package in packages)]) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, cache: Path) -> Path:
    """
    The package's file in the cache folder, downloaded if it is missing.

    Raises:
        ValueError: if that version is no longer offered, or the file does not have the pinned hash.
    """
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{package.name}_*.deb" if package.kind == "deb" else f"{package.name.replace('-', '_')}-*.whl"
    before = set(cache.glob(pattern))
    for path in sorted(before):
        if package.sha256 in (file_sha256(path), UNPINNED):
            return path
    process = subprocess.run(download_command(package), cwd=cache, capture_output=True, text=True)
    new = sorted(set(cache.glob(pattern)) - before)
    if process.returncode or not new:
        what = package.name if package.version == UNPINNED else f"{package.name} {package.version}"
        raise ValueError(
            f"{what} cannot be downloaded; if that version is no longer offered, replace version and hash in the list by - "
            f"and run make_corpus.py pin ({(process.stderr.strip().splitlines() or ['no message'])[-1]})"
        )
    path = new[-1]
    sha256 = file_sha256(path)
    if package.sha256 not in (sha256, UNPINNED):
        path.unlink()
        raise ValueError(f"{path.name} has SHA-256 {sha256[:16]}..., and the list says {package.sha256[:16]}...; pin it again")
    return path


def download_command(package: Package) -> list[str]:
    version = "" if package.version == UNPINNED else package.version
    if package.kind == "deb":
        return ["apt-get", "download", f"{package.name}={version}" if version else package.name]
    wanted = f"{package.name}=={version}" if version else package.name
    return [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", wanted]


def pinned(package: Package, cache: Path) -> Package:
    """The package with version and hash of the downloaded file, if the list leaves them open."""
    path = fetch(package, cache)
    if package.kind == "deb":
        shown = subprocess.run(["dpkg-deb", "--field", path, "Version"], capture_output=True, text=True, check=True)
        version = shown.stdout.strip()
    else:
        version = path.name.split("-")[1]
    return replace(package, version=version, sha256=file_sha256(path))


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a package, and of links to a copyright file."""
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
    """Suffix that selects the reader; dictionaries, manual pages and numbered info files have others, fortunes none."""
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
    Pages of a package's file, as path and text in the order of their paths, and the text of its license.

    If the pages have more than `MAX_CHARACTERS`, a hash of their paths decides which ones are taken.
    """
    files = {}
    license_text = ""
    for name, content in members(path):
        if name.endswith((f"{package.name}/copyright", ".dist-info/METADATA")):
            license_text = content.decode("utf-8", errors="replace")
        if is_page(name, package.patterns):
            files[name] = content
    texts = []
    characters = 0
    for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()):
        reader = prose.READERS.get(reader_name(name))
        if reader is None:
            continue
        text = reader(prose.decoded(files[name], name))
        if len(text) > prose.MIN_PAGE:
            texts.append((name, text))
            characters += len(text)
        if characters > MAX_CHARACTERS and not package.held:
            break
    return sorted(texts), license_text


def pages(package: Package, cache: Path) -> tuple[list[tuple[str, str]], str]:
    """`read_package`, cached until the package, its patterns or the readers change."""
    path = fetch(package, cache)
    code = b"".join(Path(module).read_bytes() for module in (__file__, prose.__file__))
    key = hashlib.sha256(code + json.dumps([package.sha256, package.patterns, package.held]).encode()).hexdigest()[:24]
    cached = cache / "pages" / f"{package.name}-{key}.json"
    if not cached.is_file():
        cached.parent.mkdir(exist_ok=True)
        write_text_whole(cached, json.dumps(read_package(package, path)))
    texts, license_text = json.loads(cached.read_text(encoding="utf-8"))
    return [(name, text) for name, text in texts], license_text


def license_names(text: str) -> str:
    """The licenses that a copyright file or a wheel's metadata names, the first few of them."""
    names = dict.fromkeys(match.strip().rstrip(".") for match in LICENSE_FIELD.findall(text))  # without repetition, in order
    names |= dict.fromkeys(LICENSE_CLASSIFIER.findall(text))
    if not names:
        names = dict.fromkeys(name for name, phrase in LICENSE_PHRASES.items() if re.search(phrase, text))
    shown = list(names)[:MOST_NAMES] + (["others"] if len(names) > MOST_NAMES else [])
    return ", ".join(shown) or "see the package"

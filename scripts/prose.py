"""Readers that return the running text of a page of documentation, one paragraph per line; the choice of held-out pages."""

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import PurePosixPath

MIN_PARAGRAPH, MIN_PAGE = 80, 500  # characters; shorter ones are mostly headings, menus and stubs
HELD_OUT_ONE_IN = 10
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
MARKUP = re.compile(r"[*_#>\\]")
BLANK_LINE = re.compile(r"\n[ \t]*\n")


def held_out(name: str) -> bool:
    """Whether the SHA-256 of a name chooses its text for the held-out tenth."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


class Prose(HTMLParser):
    """Parser that collects the paragraphs of an HTML page."""

    no_prose = {"script", "style", "nav", "pre", "head", "table"}
    paragraph_tags = {"p", "li", "h1", "h2", "h3", "dd", "dt", "div", "section"}

    def __init__(self):
        super().__init__()
        self.paragraphs = []
        self.current = []
        self.depth_without_prose = 0

    def handle_starttag(self, tag, attrs):
        self.depth_without_prose += tag in self.no_prose
        if tag in self.paragraph_tags:
            self.end_paragraph()

    def handle_endtag(self, tag):
        if tag in self.no_prose:
            self.depth_without_prose = max(0, self.depth_without_prose - 1)
        if tag in self.paragraph_tags:
            self.end_paragraph()

    def handle_data(self, data):
        if not self.depth_without_prose:
            self.current.append(data)

    def end_paragraph(self):
        text = " ".join("".join(self.current).split())
        self.current = []
        if len(text) >= MIN_PARAGRAPH:
            self.paragraphs.append(text)


class XmlProse(Prose):
    """Parser that collects the paragraphs of a page of DocBook or Mallard."""

    no_prose = {"screen", "programlisting", "code", "table", "informaltable", "info", "synopsis"}
    paragraph_tags = {"p", "para", "simpara", "title", "item", "listitem", "section", "sect1", "sect2", "sect3", "term"}

    def handle_startendtag(self, tag, attrs):
        """Ignore an empty element, which opens nothing."""


def from_html(text: str) -> str:
    return markup_paragraphs(Prose(), text)


def from_xml(text: str) -> str:
    return markup_paragraphs(XmlProse(), text)


def markup_paragraphs(parser: Prose, text: str) -> str:
    parser.feed(text)
    parser.end_paragraph()
    return "\n".join(parser.paragraphs)


def from_markdown(text: str) -> str:
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", LINK.sub(r"\1", text)))
    return "\n".join(MARKUP.sub("", part).strip() for part in paragraphs if len(part) >= MIN_PARAGRAPH)


POD_FORMAT = re.compile(r"[BCIFLSXE]<+\s*([^<>]*?)\s*>+")
POD_LINK = re.compile(r"L<([^<>|]*)\|[^<>]*>")
POD_COMMAND = re.compile(r"=\w+[^\S\n]*")


def from_pod(text: str) -> str:
    """Perl's documentation format: indented paragraphs are code, commands start with an equals sign."""
    paragraphs = []
    in_pod = not text.lstrip().startswith(("package ", "#!", "use "))
    for part in BLANK_LINE.split(text):
        command = POD_COMMAND.match(part)
        if command:
            in_pod = not part.startswith("=cut")
        if not in_pod or command or part.startswith((" ", "\t")):
            continue
        part = POD_LINK.sub(r"\1", part)
        for _ in range(3):  # formats nest
            part = POD_FORMAT.sub(r"\1", part)
        paragraphs.append(part)
    return joined(paragraphs)


ROFF_BREAK = {"PP", "P", "LP", "TP", "IP", "HP", "SH", "SS", "RS", "RE", "TH", "sp", "br", "TQ"}
ROFF_LITERAL = {"nf": "fi", "EX": "EE", "TS": "TE", "de": "."}
ROFF_FONTS = {"B", "I", "BR", "RB", "BI", "IB", "IR", "RI", "SM"}
ROFF_ESCAPES = [
    (re.compile(r'\\".*'), ""),
    (re.compile(r"\\f(\(..|\[\w*\]|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\(aq|\\\(oq|\\\(cq"), "'"),
    (re.compile(r"\\\(lq|\\\(rq|\\\(dq"), '"'),
    (re.compile(r"\\\(e[mn]|\\-"), "-"),
    (re.compile(r"\\\(..|\\\[[^\]]*\]|\\\*\(..|\\\*.|\\[&|^/,%:c]"), ""),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(.)"), r"\1"),
]
ROFF_ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')


def from_roff(text: str) -> str:
    """Manual page in the macros of man(7)."""
    paragraphs = []
    current = []
    literal_end = None
    for line in text.split("\n"):
        macro = line[1:].split(maxsplit=1) if line[:1] in ".'" else None
        name = macro[0] if macro else ""
        if literal_end is not None:
            literal_end = None if name == literal_end else literal_end
        elif name in ROFF_LITERAL:
            literal_end = ROFF_LITERAL[name]
        elif name in ROFF_FONTS:
            words = ["".join(pair) for pair in ROFF_ARGUMENT.findall(macro[1])] if len(macro) > 1 else []
            current.append(("" if len(name) == 2 and name != "SM" else " ").join(words))
        elif macro is None and line.strip() and not line.startswith((" ", "\t")):
            current.append(line)
        if name in ROFF_BREAK or not line.strip():
            paragraphs.append("\n".join(current))
            current = []
    paragraphs.append("\n".join(current))
    for pattern, replacement in ROFF_ESCAPES:
        paragraphs = [pattern.sub(replacement, part) for part in paragraphs]
    return joined(paragraphs)


CODE_INDENT = 4


def from_text(text: str) -> str:
    """Plain text: a paragraph whose every line is indented more than the text around it is code or a drawing."""
    parts = [part.expandtabs().split("\n") for part in BLANK_LINE.split(text.replace("\r\n", "\n"))]
    indents = [min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0) for lines in parts]
    usual = sorted(indents)[len(indents) // 2] if indents else 0
    wanted = (lines for lines, indent in zip(parts, indents, strict=True) if indent < usual + CODE_INDENT)
    return joined("\n".join(lines) for lines in wanted)


INFO_MENU = re.compile(r"^\* [^\n]*:(:|\s)", re.MULTILINE)
INFO_HEADER = re.compile(r"^File: [^\n]*\n")
INFO_NOTE = re.compile(r"\*[Nn]ote ([^:]*)::?")


def from_info(text: str) -> str:
    """GNU info: nodes start with a unit separator and a header line; menus are left out."""
    nodes = (INFO_HEADER.sub("", node.lstrip("\n")) for node in text.split("\x1f")[1:])
    parts = (part for node in nodes for part in BLANK_LINE.split(node))
    wanted = (part for part in parts if not INFO_MENU.search(part) and not part.startswith(" " * (CODE_INDENT + 1)))
    return joined(INFO_NOTE.sub(r"\1", part) for part in wanted)


WML_STRING = re.compile(r'_\s*"((?:[^"]|"")*)"')


def from_wml(text: str) -> str:
    """Strings that Wesnoth shows to a player: dialog, stories and help."""
    return joined(re.sub(r"</?\w+[^>]*>", "", part) for part in WML_STRING.findall(text))


def from_fortunes(text: str) -> str:
    return joined(text.split("\n%\n"))


def from_service_model(text: str) -> str:
    """Descriptions of a cloud service and its calls in JSON, under "documentation" as HTML or under "description" as text."""
    descriptions: list[str] = []

    def collect(value) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("documentation", "description") and isinstance(item, str):
                    descriptions.append(f"<p>{item}</p>")
                else:
                    collect(item)
        elif isinstance(value, list):
            for item in value:
                collect(item)

    collect(json.loads(text))
    return from_html("\n".join(descriptions))


def joined(paragraphs) -> str:
    """The paragraphs that are long enough, one per line."""
    lines = (" ".join(part.split()) for part in paragraphs)
    return "\n".join(line for line in lines if len(line) >= MIN_PARAGRAPH)


READERS: dict[str, Callable[[str], str]] = {
    ".html": from_html,
    ".htm": from_html,
    ".xhtml": from_html,
    ".page": from_xml,
    ".xml": from_xml,
    ".docbook": from_xml,
    ".md": from_markdown,
    ".pod": from_pod,
    ".txt": from_text,
    ".info": from_info,
    ".cfg": from_wml,
    ".fortunes": from_fortunes,
    ".json": from_service_model,
} | {f".{section}": from_roff for section in range(1, 9)}


def decoded(content: bytes, name: str) -> str:
    """Text of a file, unpacked if its name ends in .gz or .dz."""
    if name.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    return content.decode("utf-8", errors="replace").replace("\r\n", "\n").replace("\r", "\n")


def suffix(name: str) -> str:
    """Suffix that selects the reader; for a name in .gz or .dz, that of the unpacked file."""
    path = PurePosixPath(name)
    return PurePosixPath(path.stem).suffix if path.suffix in (".gz", ".dz") else path.suffix

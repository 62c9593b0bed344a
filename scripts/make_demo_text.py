"""Make the demo's training and held-out text from the Jargon File.

    python scripts/make_demo_text.py /usr/share/doc/jargon-text/jargon.txt.gz

Writes `dijiang/data/jargon_train.txt` and `dijiang/data/jargon_heldout.txt`. Same input, same bytes.
"""

import gzip
import hashlib
import itertools
import re
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "dijiang" / "data"
WIDTH = 76  # the file is hard-wrapped at this column
HELD_OUT_ONE_IN = 10

HEADWORD = re.compile(r" {3}:(?P<word>\S.*?):(?P<rest> .*)?")  # "   :ACK: /ak/, interj."
LISTING = re.compile(r"Glossary| {2}[0-9A-Z]")  # opens a list of headwords, of all or of one letter
TITLE = re.compile(r"(?:Chapter \d+\. )?(?P<title>[A-Z].*)")  # of an essay or one of its sections
PRONUNCIATION = re.compile(r"/[^/]*/[, ]*")
CROSS_REFERENCE = re.compile(r"\{([^{}\n]+)\}")
ADDRESS = re.compile(r" ?<[^<>@\s]+@[^<>@\s]+>\}?")
CARTOON = re.compile(r"\((The next|This is the last) cartoon|Figure \d")
SYMBOLS = re.compile(r"[^\w\s.,;:!?'\"()‘’“”—→•-]|(?<=\S)  +(?=\S)")


def blocks(text: str) -> list[list[str]]:
    return [b.split("\n") for b in re.split(r"\n\s*\n", text.strip("\n"))]


def unwrap(lines: list[str]) -> str:
    """Joins a line to the next where the next word would not have fitted: other breaks (verse, dialogue) are meant."""
    out = lines[0].strip()
    for line, following in itertools.pairwise(lines):
        wrapped = len(line) + 1 + len(following.split()[0]) > WIDTH
        out += (" " if wrapped else "\n") + following.strip()
    return out


def is_prose(lines: list[str], paragraph: str) -> bool:
    """Tells running text from screens, code, drawings, tables and captions."""
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    if not 3 <= indent <= 20 or CARTOON.match(paragraph) or sum(map(str.isalpha, paragraph)) < len(paragraph) / 2:
        return False
    set_by_hand = "\n" in paragraph or lines[0].startswith("    ")
    return not set_by_hand or len(SYMBOLS.findall(paragraph)) < 0.04 * len(paragraph)


def entries(text: str) -> dict[str, list[str]]:
    """Returns the paragraphs of each essay section and each lexicon entry, by title or headword."""
    # the appendices are left out: they reprint pieces by other hands
    body = text[text.index("\nChapter 1. ") : text.index("Part III. Appendices")]
    found: dict[str, list[str]] = {}
    current: list[str] = []
    run_in, in_contents = "", False  # a headword waiting for its first paragraph; inside a table of contents
    for lines in blocks(body):
        single = lines[0] if len(lines) == 1 else ""
        if match := HEADWORD.fullmatch(" ".join(lines)):
            current, in_contents = found.setdefault(match["word"], []), False
            grammar = PRONUNCIATION.sub("", match["rest"] or "").split()
            run_in = " ".join([f"{match['word']}:", *grammar, ""])
        elif LISTING.fullmatch(single):
            current, run_in = [], ""  # not in `found`: what follows is dropped
        elif match := TITLE.fullmatch(single):
            current, in_contents = found.setdefault(match["title"], [match["title"]]), False
        elif single.strip() == "Table of Contents":
            in_contents = True
        else:
            in_contents = in_contents and bool(single)
            paragraph = CROSS_REFERENCE.sub(r"\1", ADDRESS.sub("", unwrap(lines)))
            if not in_contents and is_prose(lines, paragraph):
                current.append(run_in + paragraph)
                run_in = ""
    return {name: paragraphs for name, paragraphs in found.items() if paragraphs}


def held_out(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def main(source: str) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        found = entries(file.read().replace("\N{NO-BREAK SPACE}", " "))
    for side, wanted in (("train", False), ("heldout", True)):
        chosen = [paragraphs for name, paragraphs in found.items() if held_out(name) is wanted]
        text = "\n\n".join("\n\n".join(paragraphs) for paragraphs in chosen) + "\n"
        path = DATA / f"jargon_{side}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(chosen)} entries, {len(text.split()):,} words, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

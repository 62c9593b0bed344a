"""
Make the demo's training and held-out text from the Jargon File.

    python scripts/make_demo_text.py /usr/share/doc/jargon-text/jargon.txt.gz

Writes `dijiang/data/jargon_train.txt` and `dijiang/data/jargon_heldout.txt`. Same input, same bytes.
"""

import gzip
import itertools
import re
import sys
from pathlib import Path

from prose import held_out

DATA = Path(__file__).resolve().parent.parent / "dijiang" / "data"
WIDTH = 76  # the file is hard-wrapped at this column

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
    """Join a line to the next where the next word would not have fitted; other breaks (verse, dialogue) are deliberate."""
    text = lines[0].strip()
    for line, following in itertools.pairwise(lines):
        wrapped = len(line) + 1 + len(following.split()[0]) > WIDTH
        text += (" " if wrapped else "\n") + following.strip()
    return text


def is_prose(lines: list[str], paragraph: str) -> bool:
    """Whether a paragraph is running text, not a screen, code, a drawing, a table or a caption."""
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    if not 3 <= indent <= 20 or CARTOON.match(paragraph) or sum(map(str.isalpha, paragraph)) < len(paragraph) / 2:
        return False
    set_by_hand = "\n" in paragraph or lines[0].startswith("    ")
    return not set_by_hand or len(SYMBOLS.findall(paragraph)) < 0.04 * len(paragraph)


def entries(text: str) -> dict[str, list[str]]:
    """Paragraphs of each essay section and each lexicon entry, by title or headword."""
    # the appendices are left out, because they reprint texts of other authors
    body = text[text.index("\nChapter 1. ") : text.index("Part III. Appendices")]
    by_title: dict[str, list[str]] = {}
    current: list[str] = []
    run_in = ""  # a headword that waits for its first paragraph
    in_contents = False  # inside a table of contents
    for lines in blocks(body):
        single = lines[0] if len(lines) == 1 else ""
        if match := HEADWORD.fullmatch(" ".join(lines)):
            current = by_title.setdefault(match["word"], [])
            in_contents = False
            grammar = PRONUNCIATION.sub("", match["rest"] or "").split()
            run_in = " ".join([f"{match['word']}:", *grammar, ""])
        elif LISTING.fullmatch(single):
            current = []  # not in `by_title`, so that the list is dropped
            run_in = ""
        elif match := TITLE.fullmatch(single):
            current = by_title.setdefault(match["title"], [match["title"]])
            in_contents = False
        elif single.strip() == "Table of Contents":
            in_contents = True
        else:
            in_contents = in_contents and bool(single)
            paragraph = CROSS_REFERENCE.sub(r"\1", ADDRESS.sub("", unwrap(lines)))
            if not in_contents and is_prose(lines, paragraph):
                current.append(run_in + paragraph)
                run_in = ""
    return {title: paragraphs for title, paragraphs in by_title.items() if paragraphs}


def main(source: str) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        paragraphs_by_title = entries(file.read().replace("\N{NO-BREAK SPACE}", " "))
    for side, wanted in (("train", False), ("heldout", True)):
        chosen = [paragraphs for title, paragraphs in paragraphs_by_title.items() if held_out(title) is wanted]
        text = "\n\n".join("\n\n".join(paragraphs) for paragraphs in chosen) + "\n"
        path = DATA / f"jargon_{side}.txt"
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {len(chosen)} entries, {len(text.split()):,} words, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])

"""
Make the training and held-out text of the recovery and ablation benchmarks from three packages of Debian 12.

    apt-get download anarchism python3.11-doc debian-handbook
    for package in *.deb; do dpkg-deb --extract $package extracted; done
    python scripts/make_recovery_text.py extracted/usr/share/doc OUTPUT

Writes OUTPUT/NAME_train and NAME_held for NAME in anarchism, python and handbook, each as JSONL (one page per line, under
"text") and as plain text, one page after another. The hash of a page's file name decides whether it is held out, one in ten.
The ablation reads the beginnings of these: OUTPUT/ablation_anarchism.txt, ablation_python.txt and ablation_held.txt.

Same packages, same bytes. The recorded results have those of anarchism 15.3-3, python3.11-doc 3.11.2-6+deb12u9 and
debian-handbook 11.20220922, of which anarchism_held.jsonl has a SHA-256 that begins with 76f5d21fe4172994 and
handbook_held.jsonl one with 1f03e16fc9880899.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from prose import MIN_PAGE, decoded, from_html, from_markdown, held_out

ABLATION = {  # file: (source, bytes)
    "ablation_anarchism.txt": ("anarchism_train.txt", 1_500_000),
    "ablation_python.txt": ("python_train.txt", 800_000),
    "ablation_held.txt": ("anarchism_held.txt", 300_000),
}
SOURCES = {
    "anarchism": ("anarchism/markdown/*.md.gz", from_markdown),
    "python": ("python3.11/html/**/*.html", from_html),
    "handbook": ("debian-handbook/html/en-US/*.html", from_html),
}


def pages(documentation: Path, name: str) -> Iterator[tuple[str, str]]:
    """File name and text of each page of one package that has enough prose."""
    pattern, read = SOURCES[name]
    files = sorted(documentation.glob(pattern))
    if not files:
        sys.exit(f"nothing matches {documentation / pattern}; is the package extracted there?")
    for path in files:
        text = read(decoded(path.read_bytes(), path.name))
        if len(text) > MIN_PAGE:
            yield path.name, text


def main(documentation: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        package = list(pages(documentation, name))
        for side, wanted in (("train", False), ("held", True)):
            texts = [text for file_name, text in package if held_out(file_name) is wanted]
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (output / f"{name}_{side}.jsonl").write_text(lines, encoding="utf-8")
            (output / f"{name}_{side}.txt").write_text("".join(f"{text}\n\n" for text in texts), encoding="utf-8")
            print(f"{name}_{side}: {len(texts)} pages, {sum(map(len, texts)):,} characters")
    for name, (source, size) in ABLATION.items():
        # the cut may go through a character, which is dropped
        text = (output / source).read_bytes()[:size].decode("utf-8", errors="ignore")
        (output / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""
Make a corpus of English prose and manuals from packages, as tokens for training and for held-out perplexity.

    python scripts/make_corpus.py pin PACKAGES
    python scripts/make_corpus.py build PACKAGES OUTPUT --tokenizer MODEL

PACKAGES is a list such as scripts/gpu/packages.tsv; `pin` fills in the versions and hashes it leaves open. MODEL is a GGUF
file or a checkpoint's folder. OUTPUT gets train/, held/NAME/ and sources.json (tokens, version and license of each source).
Packages are cached in --cache, so that a second run downloads nothing. Same packages, same bytes.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import corpus
import corpus_packages

DATA = Path(__file__).resolve().parent.parent / "dijiang" / "data"
TRAIN_TOKENS = 38_500_000  # compressed, they fill three parts together with the weights and wheels
JARGON = {"package": "jargon-text", "version": "4.4.7-4.1", "licence": "public domain"}  # see dijiang/data/README.md


def pin(listed: Path, cache: Path) -> None:
    packages = [corpus_packages.pinned(package, cache) for package in corpus_packages.read_list(listed)]
    corpus_packages.write_list(listed, packages)
    print(f"{listed.name}: {len(packages)} packages with version and hash")


def read_source(package: corpus_packages.Package, cache: Path) -> corpus.Source:
    pages, license_text = corpus_packages.pages(package, cache)
    licence = corpus_packages.license_names(license_text)
    facts = {"package": package.name, "version": package.version, "licence": licence}
    return corpus.Source(name=package.name, pages=pages, held=package.held, facts=facts)


def bundled_source() -> tuple[corpus.Source, str]:
    """The demo's training text in pieces, and its held-out text."""
    lines = [line for line in (DATA / "jargon_train.txt").read_text(encoding="utf-8").split("\n") if line]
    pieces = ["\n".join(lines[start : start + 40]) for start in range(0, len(lines), 40)]
    pages = [(f"jargon_train.txt/{number:04d}", piece) for number, piece in enumerate(pieces)]
    held = (DATA / "jargon_heldout.txt").read_text(encoding="utf-8")
    return corpus.Source(name="jargon", pages=pages, facts=JARGON), held


def build(listed: Path, output: Path, model: Path, cache: Path) -> dict:
    """Write the corpus and return the content of sources.json."""
    from dijiang.checkpoint.source import load_tokenizer, open_source

    packages = corpus_packages.read_list(listed)
    if loose := [package.name for package in packages if corpus_packages.UNPINNED in (package.version, package.sha256)]:
        raise ValueError(
            f"{listed.name} leaves the version or hash of {', '.join(loose)} open; run make_corpus.py pin {listed}"
        )
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:5.0f} s  {text}", flush=True)

    for package in packages:
        corpus_packages.fetch(package, cache)
    say(f"{len(packages)} packages are in {cache.name}/")
    with ProcessPoolExecutor() as pool:
        sources = list(pool.map(read_source, packages, [cache] * len(packages)))
    jargon, jargon_held = bundled_source()
    sources.append(jargon)
    say(f"{sum(len(source.pages) for source in sources):,} pages read")
    documents = corpus.shuffled(corpus.training_documents(sources, [jargon_held]))
    say(f"{len(documents):,} training documents, {sum(len(text) for _, text in documents):,} characters")
    tokenizer = load_tokenizer(open_source(model))
    counts = corpus.write_token_folder(output / "train", [text for _, text in documents], tokenizer, limit=TRAIN_TOKENS)
    documents = documents[: len(counts)]
    for source in sources:
        held = [jargon_held] if source is jargon else corpus.held_pages(source)
        own = [number for number, (name, _) in enumerate(documents) if name == source.name]
        source.facts |= {
            "documents": len(own),
            "characters": sum(len(documents[number][1]) for number in own),
            "tokens": sum(counts[number] for number in own),
            "held_out": source.held or ("jargon" if source is jargon else None),
            "held_out_tokens": 0,
        }
        if held:
            folder = output / "held" / source.facts["held_out"]
            source.facts["held_out_tokens"] = sum(corpus.write_token_folder(folder, held, tokenizer, limit=corpus.HELD_TOKENS))
    facts = sorted((source.facts for source in sources if source.facts["tokens"]), key=lambda entry: -entry["tokens"])
    result = {
        "tokens": sum(counts),
        "held_out_tokens": sum(entry["held_out_tokens"] for entry in facts),
        "documents": len(documents),
        "tokenizer": model.name,
        "sources": facts,
    }
    (output / "sources.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"{result['tokens']:,} training tokens, {result['held_out_tokens']:,} held out")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pin", "build"):
        command = commands.add_parser(name)
        command.add_argument("packages", type=Path)
        command.add_argument(
            "--cache", type=Path, default=Path("gpu-parcel/cache/packages"), help="folder of downloaded packages"
        )
        if name == "build":
            command.add_argument("output", type=Path)
            command.add_argument("--tokenizer", type=Path, required=True, metavar="MODEL")
    arguments = parser.parse_args()
    try:
        if arguments.command == "pin":
            pin(arguments.packages, arguments.cache)
        else:
            build(arguments.packages, arguments.output, arguments.tokenizer, arguments.cache)
    except ValueError as error:
        sys.exit(f"make_corpus: {error}")


if __name__ == "__main__":
    main()

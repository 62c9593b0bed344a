"""Names of licences in a package's copyright file, and the table of the corpus's sources."""

import re

FIELD = re.compile(r"^License(?:-Expression)?:[ \t]*(\S[^\n]*)", re.MULTILINE)
CLASSIFIER = re.compile(r"^Classifier: License :: OSI Approved :: ([^\n]*)", re.MULTILINE)
PHRASES = {  # in copyright files that name no licence in a field of its own
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
MOST = 4  # names shown


def licence_names(text: str) -> str:
    """Licences that a copyright file or a wheel's metadata names, the first few of them."""
    names: dict[str, None] = {}  # in order
    for match in FIELD.finditer(text) or ():
        names.setdefault(match[1].strip().rstrip("."))
    for match in CLASSIFIER.finditer(text):
        names.setdefault(match[1])
    if not names:
        names = {name: None for name, phrase in PHRASES.items() if re.search(phrase, text)}
    shown = list(names)[:MOST] + (["others"] if len(names) > MOST else [])
    return ", ".join(shown) or "see the package"


def corpus_table(facts: dict) -> str:
    """Markdown table of the sources in sources.json."""
    rows = [
        "| package | version | licence | documents | training tokens | held out as | held-out tokens |",
        "|---|---|---|---:|---:|---|---:|",
    ]
    for entry in facts["sources"]:
        licence = entry["licence"].replace("|", "/")
        rows.append(
            f"| {entry['package']} | {entry['version']} | {licence} | {entry['documents']:,} | {entry['tokens']:,} | "
            f"{entry['held_out'] or ''} | {entry['held_out_tokens'] or ''} |"
        )
    rows.append(f"| **all** | | | {facts['documents']:,} | {facts['tokens']:,} | | {facts['held_out_tokens']:,} |")
    return "\n".join(rows)

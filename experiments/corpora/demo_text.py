"""The corpus of the demo models: the prose of Python's documentation, and questions that it answers.

    apt-get install python3.11-doc && pip install beautifulsoup4
    python experiments/corpora/demo_text.py --html=/usr/share/doc/python3.11/html --target=corpora/demo

The same pages are at docs.python.org (download, HTML), under the licence of Python, which allows redistribution. Writes
`prose.jsonl`, one section a line, without code, tables and lists of names, and `questions.jsonl`, a conversation of two
turns for each function, class and term that the documentation explains. Less than a minute.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterator

FOLDERS = ("tutorial", "library", "reference", "howto", "faq", "using", "extending", "distutils", "installing",
         "c-api")
NO_PROSE = ["pre", "table", "script", "style", "a.headerlink", "div.highlight", "div.toctree-wrapper", "nav",
            "p.availability", "p.admonition-title", "div.versionadded", "div.versionchanged", "div.deprecated",
            "aside.footnote", "sup"]
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " "})
SHORTEST, LONGEST_ANSWER = 40, 240


def main() -> None:
    """Reads the pages, writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--html", type=pathlib.Path, required=True, help="directory of the documentation")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="directory to write to")
    arguments = parser.parse_args()
    pages = sorted(page for folder in FOLDERS for page in (arguments.html / folder).rglob("*.html"))
    if not pages:
        sys.exit(f"{arguments.html}: has no pages in {', '.join(FOLDERS)}; give the HTML documentation of Python")
    prose: dict[str, None] = {}  # pages repeat each other
    questions: dict[str, str] = {}
    for page in [*pages, arguments.html / "glossary.html"]:
        body = read(page)
        for question, answer in asked(body):
            questions.setdefault(question, answer)
        prose.update(dict.fromkeys(sections(body)))
    arguments.target.mkdir(parents=True, exist_ok=True)
    write(arguments.target / "prose.jsonl", [{"text": text} for text in prose])
    write(arguments.target / "questions.jsonl", [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in questions.items()])


def read(page: pathlib.Path):
    """The body of a page, without elements that are not prose."""
    from bs4 import BeautifulSoup

    body = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser").select_one("div.body")
    for selector in NO_PROSE:
        for element in body.select(selector):
            element.decompose()
    return body


def sections(body) -> Iterator[str]:
    """Title and paragraphs of each section, without the sections inside it."""
    for section in body.select("section, div.section"):
        lines = []
        for element in section.select("h1, h2, h3, h4, p, dl.py > dt, dl.c > dt, dl.glossary > dt"):
            if element.find_parent(["section", "div.section"]) is section:
                line = plain(element)
                lines.append("" if line.startswith("Source code: ") else line)
        if sum(len(line) > SHORTEST for line in lines) > 0:
            yield "\n".join(line for line in lines if line)


def asked(body) -> Iterator[tuple[str, str]]:
    """Questions about the definitions on a page, each with the first sentences of the definition."""
    for entry in body.select("dl.py, dl.glossary"):
        kinds = set(entry.get("class"))
        for term in entry.find_all("dt", recursive=False):
            meaning = term.find_next_sibling("dd")
            first = meaning and meaning.find("p", recursive=False)
            answer = shortened(plain(first)) if first else ""
            name = plain(term) if "glossary" in kinds else term.get("id", "")
            if len(answer) < SHORTEST // 2 or not name:
                continue
            does = kinds & {"function", "method", "staticmethod", "classmethod"}
            yield f"What does {name} do?" if does else f"What is {name}?", answer


def shortened(text: str) -> str:
    """The first whole sentences within LONGEST_ANSWER characters; empty if there are none."""
    answer = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text):
        if len(answer) + len(sentence) >= LONGEST_ANSWER:
            break
        answer = f"{answer} {sentence}".strip()
    return answer if answer.endswith((".", "!", "?")) else ""


def plain(element) -> str:
    """The text on one line, with ASCII quotes."""
    return " ".join(element.get_text().translate(ASCII).replace("¶", "").split())


def write(path: pathlib.Path, records: list[dict]) -> None:
    """Writes JSON Lines."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records):,} lines, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

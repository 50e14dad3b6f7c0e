"""Cuts prose into documents, gathers problems into documents, and mixes the two."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Callable, NamedTuple

import mathematics
import prose


class Source(NamedTuple):
    name: str
    articles: Callable[[Path], Iterator[prose.Article]]
    share: float  # of the prose, in tokens
    characters_per_token: float  # with a byte-level BPE of 4,096 tokens and single digits, trained on the mix


SOURCES = [
    Source("wikipedia", prose.wikipedia, 0.30, 3.1),
    Source("wikipedia-markup", prose.wikipedia_markup, 0.12, 2.5),
    Source("kjv", prose.kjv, 0.14, 3.5),
    Source("botocore", prose.botocore, 0.24, 3.8),
    Source("networkx", prose.docstrings("networkx"), 0.10, 3.0),
    Source("sqlalchemy", prose.docstrings("sqlalchemy"), 0.10, 3.3),
]
MATHEMATICS_CHARACTERS_PER_TOKEN = 2.9

DOCUMENT_CHARACTERS_MIN = 350
DOCUMENT_CHARACTERS_TYPICAL = (450, 2_000)
DOCUMENT_CHARACTERS_LONG = (3_800, 7_000)
LONG_SHARE = 0.03
# More than any corpus takes from one source, so that what is taken comes from all over it.
PROSE_POOL_DOCUMENTS = 2_500
# Of the groups (articles, services, modules) of a prose source, one in so many is kept for evaluation.
HELD_OUT_ONE_IN = 6


class Mix(NamedTuple):
    name: str
    # Of the mix, in tokens; the rest is the noise inside the mathematics.
    mathematics_share: float
    prose_share: float
    # Of the documents of mathematics, those with noise inside.
    noisy_share: float


MIXED = Mix("mixed", 0.20, 0.76, 1 / 3)
# Mathematics is rarer, and none of it is clean: nearer to what a model is trained on further in Rho-1.
NOISY = Mix("noisy", 0.05, 0.925, 1.0)


# What stands inside the documents of mathematics of the map's streams beside mathematics.
NOISES = ("none", "unrelated", "corrupted-10", "corrupted-30")
# Tokens of a hundred in documents of mathematics, of the map's streams.
RARITIES = (1, 5, 20, 50)


class Document(NamedTuple):
    id: str
    text: str
    source: str


Streams = dict[Source, Iterator[str]]


def target_length(random: Random) -> int:
    long = random.random() < LONG_SHARE
    return random.randint(*(DOCUMENT_CHARACTERS_LONG if long else DOCUMENT_CHARACTERS_TYPICAL))


def prose_texts(source: Source, wheels: Path, held_out: bool) -> Iterator[str]:
    """The source's documents, shuffled; a small corpus takes the first of what a large one takes."""
    pool = islice(_cut(source, wheels, held_out), PROSE_POOL_DOCUMENTS)
    # As keys of a dictionary, because services share some of their documentation word for word.
    return iter(sorted(dict.fromkeys(pool), key=prose.stable_hash))


def _cut(source: Source, wheels: Path, held_out: bool) -> Iterator[str]:
    """Paragraphs of one article, in order, up to a length drawn for each document."""
    random = Random(f"lengths of {source.name}, held out: {held_out}")
    for article in source.articles(wheels):
        if (prose.stable_hash(f"held out {article.group}") % HELD_OUT_ONE_IN == 0) != held_out:
            continue
        wanted = target_length(random)
        gathered: list[str] = []
        length = 0
        for paragraph in (piece for whole in article.paragraphs for piece in prose.split_long(whole)):
            gathered.append(paragraph)
            length += len(paragraph) + 1
            if length >= wanted:
                yield "\n".join(gathered)
                wanted, gathered, length = target_length(random), [], 0
        if length >= DOCUMENT_CHARACTERS_MIN:
            yield "\n".join(gathered)


def mathematics_texts(problems: mathematics.Problems, purpose: str) -> Iterator[str]:
    """Sheets of problems, most of one to three."""
    random = Random(f"lengths of {purpose}")
    while True:
        wanted = target_length(random)
        sheet = [problems.next()]
        # Half the wanted length, because one problem is as long as a short document.
        while sum(map(len, sheet)) < wanted / 2:
            sheet.append(problems.next())
        yield "\n\n".join(sheet)


def up_to(texts: Iterable[str], characters: float) -> Iterator[str]:
    taken = 0
    for text in texts:
        if taken >= characters:
            return
        taken += len(text)
        yield text


def curated(wheels: Path, tokens: int) -> Iterator[Document]:
    problems = mathematics.Problems(wheels, mathematics.TRAINING, "curated")
    texts = up_to(mathematics_texts(problems, "curated"), tokens * MATHEMATICS_CHARACTERS_PER_TOKEN)
    for index, text in enumerate(texts):
        yield Document(f"curated-{index:06}", text, "gsm_symbolic")


def mixed(wheels: Path, tokens: int, mix: Mix = MIXED, streams: "Streams | None" = None) -> list[Document]:
    """Mathematics and prose, and some of the prose put inside some of the mathematics."""
    random = Random("noise")
    streams = streams or prose_streams(wheels)
    problems = mathematics.Problems(wheels, mathematics.TRAINING, mix.name)
    characters = mix.mathematics_share * tokens * MATHEMATICS_CHARACTERS_PER_TOKEN
    texts = up_to(mathematics_texts(problems, mix.name), characters)

    documents = []
    for index, text in enumerate(texts):
        label = "gsm_symbolic"
        if random.random() < mix.noisy_share:
            source = random.choice(SOURCES)
            text = with_noise(text, next(streams[source]), random)
            label = f"gsm_symbolic+{source.name}"
        documents.append(Document(f"{mix.name}-mathematics-{index:06}", text, label))
    return in_one_order([*documents, *prose_documents(streams, mix.name, mix.prose_share * tokens)])


def cell_of_map(wheels: Path, tokens: int, rarity: int, noise: str, prose_texts: "dict[Source, list[str]]") -> list[Document]:
    """A stream of which `rarity` tokens of a hundred are in documents of mathematics, with this noise inside each of them."""
    name = f"map-{rarity:02}-{noise}"
    random = Random(f"noise of {name}")
    streams = {source: iter(texts) for source, texts in prose_texts.items()}
    # The same problems in every stream of one rarity, so that the noise alone tells them apart.
    purpose = f"map-{rarity:02}"
    problems = mathematics.Problems(wheels, mathematics.TRAINING, purpose)
    share = rarity / 100
    texts = up_to(mathematics_texts(problems, purpose), share * tokens * MATHEMATICS_CHARACTERS_PER_TOKEN)
    documents = []
    for index, text in enumerate(texts):
        label = "gsm_symbolic"
        if noise == "unrelated":
            source = random.choice(SOURCES)
            text = with_noise(text, next(streams[source]), random)
            label = f"gsm_symbolic+{source.name}"
        elif noise.startswith("corrupted-"):
            text = corrupted(text, int(noise.rpartition("-")[2]) / 100, random)
            label = f"gsm_symbolic+{noise}"
        documents.append(Document(f"{name}-mathematics-{index:06}", text, label))
    return in_one_order([*documents, *prose_documents(streams, name, (1 - share) * tokens)])


def corrupted(text: str, share: float, random: Random) -> str:
    """The same with this share of its words wrong: other digits in a number, two letters swapped or one changed in a word."""
    return "".join(
        corrupted_word(part, random) if part.strip() and random.random() < share else part
        for part in re.split(r"(\s+)", text)
    )


def corrupted_word(word: str, random: Random) -> str:
    if any(character.isdigit() for character in word):
        return "".join(random.choice("0123456789") if character.isdigit() else character for character in word)
    at = random.randrange(len(word))
    if at + 1 < len(word) and word[at] != word[at + 1]:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + random.choice("abcdefghijklmnopqrstuvwxyz".replace(word[at], "")) + word[at + 1 :]


def mismatched(streams: Streams, tokens: int) -> Iterator[Document]:
    """Curated text of another domain than mathematics: what the streams have left of the documentation of web services."""
    (source,) = (source for source in SOURCES if source.name == "botocore")
    characters = tokens * source.characters_per_token
    for index, text in enumerate(up_to(streams[source], characters)):
        yield Document(f"mismatched-{index:06}", text, source.name)


def general(streams: Streams, tokens: int) -> list[Document]:
    """Prose alone; what it takes of the streams is not taken again."""
    return in_one_order(prose_documents(streams, "general", tokens))


def prose_streams(wheels: Path) -> Streams:
    return {source: prose_texts(source, wheels, held_out=False) for source in SOURCES}


def prose_documents(streams: Streams, name: str, tokens: float) -> Iterator[Document]:
    for source, stream in streams.items():
        characters = tokens * source.share * source.characters_per_token
        for index, text in enumerate(up_to(stream, characters)):
            yield Document(f"{name}-{source.name}-{index:06}", text, source.name)


def in_one_order(documents: Iterable[Document]) -> list[Document]:
    """An order that no run, Python or size of the corpus changes."""
    return sorted(documents, key=lambda document: prose.stable_hash(document.id))


def with_noise(text: str, unrelated: str, random: Random) -> str:
    """Puts the beginning of an unrelated document before, after or between the lines of a sheet of problems."""
    noise = next(prose.split_long(unrelated[: prose.PARAGRAPH_CHARACTERS_MAX // 2]))
    lines = text.split("\n")
    at = random.choice([0, random.randint(1, len(lines) - 1), len(lines)])
    return "\n".join([*lines[:at], noise, *lines[at:]])


def held_out_mathematics(wheels: Path, count: int) -> Iterator[Document]:
    problems = mathematics.Problems(wheels, mathematics.HELD_OUT, "held out")
    for index, text in zip(range(count), mathematics_texts(problems, "held out")):
        yield Document(f"eval-math-{index:06}", text, "gsm_symbolic")


def held_out_problems(wheels: Path, per_template: int) -> Iterator[Document]:
    """Single problems of held-out templates, as many of each; the source names the template."""
    for template in mathematics.HELD_OUT:
        problems = mathematics.Problems(wheels, [template], "held out problems")
        for index in range(per_template):
            yield Document(f"eval-problems-{template:02}-{index:03}", problems.next(), f"gsm_symbolic/{template:02}")


def held_out_answers(wheels: Path, count: int) -> Iterator[dict[str, str]]:
    """Single problems of held-out templates, the answer apart from the question and the worked solution before it."""
    problems = mathematics.Problems(wheels, mathematics.HELD_OUT, "held out answers")
    for index in range(count):
        solution, mark, answer = problems.next().rpartition("#### ")
        yield {"id": f"eval-answers-{index:06}", "context": solution + mark.rstrip(), "text": " " + answer}


def held_out_prose(wheels: Path, count: int) -> list[Document]:
    documents = []
    for source in SOURCES:
        texts = prose_texts(source, wheels, held_out=True)
        for index, text in zip(range(round(count * source.share)), texts):
            documents.append(Document(f"eval-rest-{source.name}-{index:06}", text, source.name))
    return sorted(documents, key=lambda document: prose.stable_hash(document.id))

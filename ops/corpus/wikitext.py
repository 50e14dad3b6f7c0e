"""Wikipedia's markup to plain text: what a reader sees, less tables, boxes and footnotes."""

import html
import re

# Sections that hold lists of links and citations, to the end of the article.
BACK_MATTER = re.compile(
    r"^=+ *(see also|references|notes|footnotes|further reading|external links|bibliography|sources|citations)\b.*",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
HIDDEN = re.compile(
    r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline|table|score|imagemap)\b[^>]*>.*?</\1>", re.DOTALL
)
TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
TABLE = re.compile(r"\{\|.*?^\|\}", re.DOTALL | re.MULTILINE)
# A picture's caption may itself hold links, one level deep.
PICTURE = re.compile(r"\[\[(?:File|Image|Category)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.IGNORECASE)
LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
OUTER_LINK = re.compile(r"\[https?://\S+ ?([^\]]*)\]")
TAG = re.compile(r"</?[a-z][^>]*>", re.IGNORECASE)
HEADING = re.compile(r"^=+ *(.*?) *=+$")


def plain_paragraphs(markup: str) -> list[str]:
    """The paragraphs and headings of one article."""
    text = HIDDEN.sub("", markup)
    # Templates nest; each pass removes the innermost, and the depth is bounded so that broken markup cannot hang us.
    for _ in range(8):
        text, removed = TEMPLATE.subn("", text)
        if removed == 0:
            break
    text = BACK_MATTER.sub("", text)
    for pattern in (TABLE, PICTURE):
        text = pattern.sub("", text)
    for pattern in (LINK, OUTER_LINK):
        text = pattern.sub(r"\1", text)
    text = html.unescape(TAG.sub("", text)).replace("'''", "").replace("''", "").replace("\u00a0", " ")
    # What a removed template leaves: "( ; born 1809)", "word , next".
    text = re.sub(r"\([\s,;:]+", "(", text).replace("()", "")
    text = re.sub(r" +([,.;])", r"\1", re.sub(r"[ \t]+", " ", text))

    paragraphs = []
    for line in text.split("\n"):
        line = HEADING.sub(r"\1", line.strip().lstrip("*#:; ").strip())
        # Rests of broken tables and templates.
        if line and not line.startswith(("|", "!", "{", "}")):
            paragraphs.append(line)
    return paragraphs

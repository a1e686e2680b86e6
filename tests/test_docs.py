"""What README*.md and docs/*.md quote, link to and repeat is so."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/*.md")])
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
OTHERS = "## Messages of other software"
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README_zh-CN.md"

HOLE = "..."
_PERCENT = re.compile(r"%%|%[-+#0]*[\d*]*(?:\.[\d*]+)?[diouxXeEfFgGcrs]")


# ---- messages


def message(node: ast.expr) -> str:
    """What an expression makes, `...` for all that is known only when it runs."""
    match node:
        case ast.Constant(str(text)):
            return _PERCENT.sub(lambda found: "%" if found[0] == "%%" else HOLE, text)
        case ast.JoinedStr(values):
            return "".join(map(message, values))
        case ast.BinOp(left, ast.Add(), right):
            return message(left) + message(right)
    return HOLE


def plain(text: str) -> str:
    """A text on one line, holes that touch each other as one."""
    return re.sub(r"(?:\.\.\.)+", HOLE, " ".join(text.split()))


def messages(source: str) -> Iterator[str]:
    """Every string that a module can make, but for its docstrings."""
    for node in ast.walk(ast.parse(source)):
        for child in ast.iter_child_nodes(node):
            is_text = isinstance(child, (ast.Constant, ast.JoinedStr, ast.BinOp))
            if is_text and not isinstance(node, ast.Expr):
                yield plain(message(child))


@cache
def all_messages() -> str:
    files = [*ROOT.glob("polar_xtuner/**/*.py"), *ROOT.glob("tools/*.py")]
    return "\n".join(text for file in files for text in messages(file.read_text("utf-8")))


def is_said(quoted: str) -> bool:
    """Whether code has a message with these words; a quotation may end anywhere."""
    return plain(quoted).removesuffix(HOLE).strip() in all_messages()


def quoted_messages(page: str) -> list[str]:
    """The code that items of a list begin with: - `first message`, `second message`: what to do."""
    ours = page[: page.index(OTHERS)]
    items = re.findall(r"^ *- ((?:`[^`]+`,?\s+)*`[^`]+`):", ours, re.MULTILINE)
    return [" ".join(text.split()) for item in items for text in re.findall(r"`([^`]+)`", item)]


def test_a_message_is_found_across_joined_strings_and_holes() -> None:
    source = '''
def f(x):
    """A docstring is no message."""
    raise ValueError(f"{x} of {x!r}" "\\n  rows " + f"are {x}{x:.1f} bad" + "!")
    logger.info("%5.1f %% of %s", x)
'''
    said = [*messages(source)]
    assert "... of ... rows are ... bad!" in said
    assert "... % of ..." in said
    assert not any("docstring" in text for text in said)


def test_every_item_of_troubleshooting_that_begins_with_code_quotes_a_message() -> None:
    page = TROUBLESHOOTING.read_text("utf-8")
    ours = page[: page.index(OTHERS)]
    assert len(re.findall(r"^ *- `", ours, re.MULTILINE)) == len(
        re.findall(r"^ *- (?:`[^`]+`,?\s+)*`[^`]+`:", ours, re.MULTILINE)
    )
    assert len(quoted_messages(page)) > 50


def test_every_message_that_troubleshooting_quotes_is_in_the_code() -> None:
    quoted = quoted_messages(TROUBLESHOOTING.read_text("utf-8"))
    assert [text for text in quoted if not is_said(text)] == []


# ---- links


def prose(page: str) -> str:
    """A page without its code."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    page = re.sub(r"(?<=\n\n)(?: {4}.*\n|\n)+", "\n", page)
    return re.sub(r"`[^`]+`", "`code`", page)


def links(page: str) -> list[str]:
    return re.findall(r"\]\(([^()\s]+)\)", prose(page))


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    page = re.sub(r"^ *```.*?^ *```", "", page, flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    made = set()
    for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        made.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return made


def broken(page: Path, link: str) -> bool:
    if re.match(r"https?://|mailto:", link):
        return False
    name, _, anchor = link.partition("#")
    target = (page.parent / name).resolve() if name else page
    if anchor:
        return not target.is_file() or anchor not in anchors(target.read_text("utf-8"))
    return not target.exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    found = links(page.read_text("utf-8"))
    assert [link for link in found if broken(page, link)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_readme_links_to_every_page(page: Path) -> None:
    assert page == ENGLISH or str(page.relative_to(ROOT)) in links(ENGLISH.read_text("utf-8"))


def test_broken_links_are_seen() -> None:
    page = ENGLISH
    assert not broken(page, "docs/data.md#files")
    assert broken(page, "docs/data.md#filez")
    assert broken(page, "docs/none.md")
    assert broken(page, "#none")


# ---- the same in two languages


def sections(page: Path) -> list[str]:
    return re.split(r"^## .*\n", page.read_text("utf-8"), flags=re.MULTILINE)


def code(section: str) -> list[str]:
    """Lines of code, comments aside."""
    lines = re.findall(r"^ {4}.*$", section, re.MULTILINE)
    return [re.sub(r"\s+# .*$", "", line) for line in lines]


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", text)


def tables(section: str) -> list[list[list[str]]]:
    """The numbers of every cell."""
    rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    return [[numbers(cell) for cell in row.split("|")] for row in rows]


def of_both_languages(section: str) -> list[str]:
    return sorted(link for link in links(section) if not link.startswith("README"))


PARTS = {"code": code, "tables": tables, "links": of_both_languages}


@pytest.mark.parametrize("part", PARTS)
def test_the_readmes_have_the_same(part: str) -> None:
    english, chinese = sections(ENGLISH), sections(CHINESE)
    assert [*map(PARTS[part], english)] == [*map(PARTS[part], chinese)]
    assert any(map(PARTS[part], english))


def test_the_readmes_have_the_same_numbers_and_names_in_their_text() -> None:
    for english, chinese in zip(sections(ENGLISH), sections(CHINESE), strict=True):
        assert Counter(numbers(english)) == Counter(numbers(chinese))
        for page in (english, chinese):
            assert page.count("`") % 2 == 0
        spans = (
            Counter(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", page))
            for page in (english, chinese)
        )
        assert next(spans) == next(spans)

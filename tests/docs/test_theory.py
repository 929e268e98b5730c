"""docs/theory.md and the code agree: what the code cites is on the page, and what the page says is computed is."""

import functools
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
PACKAGES = ("entk", "gramian", "transforms")
PROSE = {getattr(tokenize, name) for name in ("STRING", "COMMENT", "FSTRING_MIDDLE") if hasattr(tokenize, name)}
EVIDENCE = "8"  # the one section without mathematics
NUMBER, SECTION = r"I[1-9][′']?|\d{1,2}[ab]?", r"\d(?:\.\d)?"
# What MathJax as GitHub runs it knows without packages, as far as the page uses it.
MACROS = set(
    re.findall(
        r"\w+",
        """
    Bigl Bigr Delta Phi Pi Psi Sigma alpha approx ast bar begin beta bigl bigr cdot delta dot ell end epsilon eta frac
    gamma gt hat infty int ker lVert lambda langle le leftarrow log lvert mapsto mathbf mathrm max min mu nabla ne nu
    odot partial perp pi prod psi qquad quad rVert rangle rho rvert sigma sqrt subset subseteq succeq sum tau text
    tfrac theta times to top varepsilon varphi
    """,
    )
)


# ---------------------------------------------------------------- what a text cites


@functools.cache
def equations_cited(text: str) -> set[str]:
    """Numbers of equations: `(I2)`, `(I1)-(I4)`, `theory I2`, `(9)`, `equations (5)-(8)`, `equations 1-8`."""
    found = set(re.findall(r"(?<!\w)(I[1-9][′']?)(?!\w)", text))
    found |= set(re.findall(rf"(?:^|(?<=[\s\"'(\[]))\(({NUMBER})\)", text, re.MULTILINE))
    for first, last in re.findall(r"\(I(\d)\)(?:[-–]| to )\(I(\d)\)", text):
        found |= {f"I{k}" for k in range(int(first), int(last) + 1)}
    for form in (r"equations (\d+)[-–](\d+)", r"\((\d+)\)[-–]\((\d+)\)"):
        found |= {str(k) for first, last in re.findall(form, text) for k in range(int(first), int(last) + 1)}
    return {number.replace("'", "′") for number in found}


@functools.cache
def sections_cited(text: str) -> set[str]:
    """Numbers of sections: `theory §3`, `theory §1, §4`, `theory §§2, 5 and 6`."""
    lists = re.findall(rf"§§({SECTION}(?:(?:, | and ){SECTION})*)", text)
    return set(re.findall(rf"(?<!§)§({SECTION})", text)) | {n for one in lists for n in re.findall(SECTION, one)}


def prose_of(source: str) -> str:
    """Strings and comments: `f(2)` cites nothing."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string for token in tokens if token.type in PROSE)


@functools.cache
def code() -> dict[str, str]:
    files = sorted(path for folder in (*PACKAGES, "experiments") for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): prose_of(path.read_text(encoding="utf-8")) for path in files}


# ---------------------------------------------------------------- what the page says


class Row(NamedTuple):
    """A row of one of the tables; `computed` is empty where the code does not have it yet."""

    name: str
    anchor: str
    computed: list[str]
    also: list[str]


def equations_of(page: str) -> dict[str, str]:
    """Anchors of the equations, by number."""
    found = re.findall(r'<a id="([\w-]+)"></a>\*\*\((\w+′?)\)\*\*', page)
    assert len({number for _, number in found}) == len(found), "an equation is defined twice"
    return {number: anchor for anchor, number in found}


def sections_of(page: str) -> dict[str, str]:
    """Texts of the sections, by number; a section's includes its subsections'."""
    heads = list(re.finditer(rf"^(#{{2,3}}) (?:({SECTION})\.? )?(.*)$", page, re.MULTILINE))
    found = {}
    for k, head in enumerate(heads):
        behind = (other.start() for other in heads[k + 1 :] if len(other[1]) <= len(head[1]))
        if head[2]:
            found[head[2]] = page[head.end() : next(behind, len(page))]
    return found


def rows_of(page: str, kind: str) -> Iterator[Row]:
    """The table whose first column is headed `kind`."""
    _, _, below = page.partition(f"\n| {kind} | ")
    for line in below.split("\n\n")[0].splitlines()[2:]:
        name, _, computed, also = [cell.strip() for cell in line.strip("|").split("|")] + [""] * (kind == "section")
        ((number, anchor),) = re.findall(r"^(?:\[\(|§)([\w.]+′?)(?:\)\]\(#([\w-]+)\))?$", name)
        files = re.findall(r"`([^`]+)`", computed)
        assert files or computed == "planned", line
        yield Row(number, anchor, files, re.findall(r"`([^`]+)`", also))


# ---------------------------------------------------------------- where they disagree


def faults(page: str, sources: Mapping[str, str]) -> list[str]:
    """Everything in which the page and the code disagree; `sources` are the code's prose by path."""
    return sorted({*of_citations(page, sources), *of_equation_rows(page, sources), *of_section_rows(page, sources)})


def of_citations(page: str, sources: Mapping[str, str]) -> Iterator[str]:
    equations, sections = equations_of(page), sections_of(page)
    for path, text in sources.items():
        for number in equations_cited(text) - {*equations}:
            yield f"{path} cites ({number}), which the page does not define"
        for number in sections_cited(text) - {*sections}:
            yield f"{path} cites §{number}, which is no section"
        for number, phrase in re.findall(rf'theory §({SECTION}), "([^"]+)"', text):
            if number in sections and phrase.lower() not in sections[number].lower():
                yield f'{path} cites "{phrase}", which §{number} does not speak of'
        for mention in re.findall(r"theory (?=[(§I\d]).{1,12}", text):
            if not equations_cited(mention) | sections_cited(mention):
                yield f"{path} says {mention!r}: write theory (9), theory I2 or theory §3"


def of_equation_rows(page: str, sources: Mapping[str, str]) -> Iterator[str]:
    """Both ways: a file that is named cites the number, and a file of the packages that cites it is named."""
    equations, rows = equations_of(page), list(rows_of(page, "equation"))
    for number in {row.name for row in rows} ^ {*equations}:
        yield f"({number}) has no row, or a row and no equation"
    for row in rows:
        if row.anchor != equations.get(row.name):
            yield f"the row of ({row.name}) does not link to its equation"
        named = {*row.computed, *row.also}
        citing = {path for path, text in sources.items() if row.name in equations_cited(text)}
        for path in named - citing:
            yield f"({row.name}) is said to be in {path}, which {lacks(path, sources)}"
        for path in citing - named:
            if path.split("/")[0] in PACKAGES:
                yield f"{path} cites ({row.name}), whose row does not name it"


def of_section_rows(page: str, sources: Mapping[str, str]) -> Iterator[str]:
    """One way alone: whatever draws or reports something cites its section too, for context."""
    sections, rows = sections_of(page), list(rows_of(page, "section"))
    for row in rows:
        if row.name not in sections:
            yield f"a row is of §{row.name}, which is no section"
        for path in row.computed:
            if row.name not in sections_cited(sources.get(path, "")):
                yield f"§{row.name} is said to be in {path}, which {lacks(path, sources)}"
    for name, text in sections.items():
        own = [row for row in rows if row.name == name]
        if name != EVIDENCE and not [row for row in rows if row.name.startswith(name)]:
            yield f"§{name} has no row"
        if text.lstrip().startswith("*Planned") != (bool(own) and not any(row.computed for row in own)):
            yield f"§{name} says *Planned* if and only if nothing of it is in the code"


def lacks(path: str, sources: Mapping[str, str]) -> str:
    return "does not cite it" if path in sources else "does not exist"


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(theory I2), the bound (I6), that of (I6') and (I6′)", {"I2", "I6", "I6′"}),
        ("(I1)-(I4) hold; its number, (I7) to (I9).", {"I1", "I2", "I3", "I4", "I7", "I8", "I9"}),
        ("theory §2, equations 1-3, and §5; equations (5)-(8)", {"1", "2", "3", "5", "6", "7", "8"}),
        ("theory (9), by (10)\n(14a) at the start of a line; equations (11) and (12).", {"9", "10", "14a", "11", "12"}),
        ("f(2), jnp.ones((3, 2)), a pair (0, 1), m^(4), `I` 5, I2C", set()),
    ],
)
def test_every_way_to_cite_an_equation_is_read(text, expected):
    assert equations_cited(text) == expected


def test_every_way_to_cite_a_section_is_read():
    assert sections_cited("(theory §1, §4), theory §7.1; (theory §§2, 5 and 6.2); theory §3.") == {
        *("1", "4", "7.1", "2", "5", "6.2", "3")
    }


def test_code_is_read_in_its_strings_and_comments_only():
    assert equations_cited(prose_of("f (1)  # by (2)\nx = 'theory (3)'\n")) == {"2", "3"}


def test_the_page_and_the_code_agree():
    found = faults(PAGE, code())
    assert not found, "\n".join(found)


def test_every_package_cites_the_page():
    for package in PACKAGES:
        assert any(sections_cited(text) for path, text in code().items() if path.startswith(f"{package}/"))


EQUATION = next(row for row in rows_of(PAGE, "equation") if len(row.also) > 1)
PLANNED = next(row.name for row in rows_of(PAGE, "equation") if not row.computed)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('<a id="eq-I6"></a>**(I6)**', "", r"cites \(I6\), which the page does not define"),
        ("### 7.1 One step", "### One step", r"cites §7\.1, which is no section"),
        ("**Implicit bias**", "", '"implicit bias", which §6 does not speak of'),
        ("| [(I6)](#eq-I6) |", "| [(I6)](#eq-I7) |", "does not link to its equation"),
        (f"`{EQUATION.computed[0]}`", "`gramian/_renamed.py`", "which does not exist"),
        (f"`{EQUATION.computed[0]}`", "`gramian/__init__.py`", "which does not cite it"),
        (f"`{EQUATION.also[0]}`, `{EQUATION.also[1]}`", f"`{EQUATION.also[1]}`", "whose row does not name it"),
        ("*Planned: not in the code yet.*", "", "if and only if"),
    ],
)
def test_a_page_that_is_wrong_is_found_out(old, new, fault):
    assert old in PAGE
    assert any(re.search(fault, one) for one in faults(PAGE.replace(old, new), code()))


@pytest.mark.parametrize(
    ("prose", "fault"),
    [
        ("By (27).", r"cites \(27\), which the page does not define"),
        ("theory §9", "cites §9"),
        ("(theory 9)", "write theory"),
        (f"theory ({PLANNED})", rf"cites \({PLANNED}\), whose row does not name it"),
    ],
)
def test_code_that_cites_what_is_not_there_is_found_out(prose, fault):
    assert any(re.search(fault, one) for one in faults(PAGE, {**code(), "gramian/_new.py": prose}))


def test_links_lead_somewhere():
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    anchors |= set(re.findall(r'<a id="([\w-]+)">', PAGE))
    assert anchors >= set(re.findall(r"\]\(#([^)]+)\)", PAGE))
    for path in re.findall(r"\]\((?!http|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
    for path in re.findall(r"`((?:results|tests|docs|notebooks)/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path
    assert "](docs/theory.md" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_page_cites_only_its_own_equations_and_sections():
    prose = re.sub(r"```math\n.*?```|`[^`\n]*`|\$[^$\n]*\$", "", PAGE, flags=re.DOTALL)
    assert equations_cited(prose) <= {*equations_of(PAGE)}
    assert sections_cited(prose) <= {*sections_of(PAGE)}


def test_mathematics_renders_on_github():
    """Markdown reads inline mathematics first: an underscore behind a bracket, an escaped sign or a < are its own."""
    blocks = re.findall(r"^```math\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```math\n.*?^```$", "", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert "```" not in prose
    inline = []
    for line in re.sub(r"`[^`\n]*`", "", prose).splitlines():
        assert line.count("$") % 2 == 0, line
        for found in re.finditer(r"(.?)\$([^$]*)\$(.?)", line):
            before, formula, behind = found.groups()
            assert re.fullmatch(r"[\s(|\[]?", before), line
            assert re.fullmatch(r"[\s.,;:?)|\]]?", behind), line
            assert formula == formula.strip(), line
            assert not re.search(r"(?<![A-Za-z0-9])_|\\[^A-Za-z]|[*~`<>]", formula), line
            assert not (line.startswith("|") and "|" in formula), line
            inline.append(formula)
    for formula in blocks + inline:
        assert formula.count("{") == formula.count("}"), formula
        assert set(re.findall(r"\\([A-Za-z]+)", formula)) <= MACROS, formula


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_other_pages_cite_what_is_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert equations_cited(text) <= {*equations_of(PAGE)}
    assert sections_cited(text) <= {*sections_of(PAGE)}

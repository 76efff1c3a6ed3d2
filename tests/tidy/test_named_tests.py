"""What a document points at exists: the tests and checks that it calls proofs would be collected, its links lead on."""

import ast
import json
import re
from pathlib import Path

import pytest

from dsec.testing import SANDBOX_CHECKS

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ROOT / "tests/golden/hostile"
PAGES = ("docs/threat_model.md", "docs/track_record.md")
MARKDOWN = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
CHECKS = {check.name for check in SANDBOX_CHECKS}


def collected(path: Path) -> set[str]:
    """The tests of a file, as pytest sees them, also those that need a kernel of some age."""
    top = ast.parse(path.read_text()).body
    body = [*top, *(node for each in top if isinstance(each, ast.If) for node in each.body)]
    return {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


TESTS = {str(path.relative_to(ROOT)): collected(path) for path in (ROOT / "tests").rglob("test_*.py")}
NAMES = set().union(*TESTS.values())


def is_there(name: str) -> bool:
    """A check, `path::test`, a test, a file of tests, or a folder of them."""
    path, _, test = name.partition("::")
    if test:
        return test in TESTS.get(path, set())
    return (
        name in CHECKS or name in NAMES or bool(TESTS.get(name)) or any(file.startswith(f"{name}/") for file in TESTS)
    )


def proofs_of(page: str) -> list[tuple[str, list[str]]]:
    """The rows of a page's tables: what each is about, and what is named in its last column."""
    rows = [line.strip("| ").split(" | ") for line in (ROOT / page).read_text().splitlines() if line.startswith("| ")]
    return [
        (row[0], re.findall(r"`((?:tests/)?[a-z_]+[\w/.:]*)`", row[-1]))
        for row in rows
        if row[-1] not in ("test", "held by")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_proof_of_a_page_is_a_test(page: str) -> None:
    rows = proofs_of(page)
    assert len(rows) > 20
    assert [about for about, names in rows if not names] == []
    assert [name for _, names in rows for name in names if not is_there(name)] == []


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_hostile_case_has_its_proofs_or_says_what_it_waits_for() -> None:
    cases = [json.loads(line)["id"] for line in (HOSTILE / "cases.jsonl").read_text().splitlines()]
    answers = json.loads((HOSTILE / "proofs.json").read_text())
    assert sorted(answers) == sorted(cases)
    for case, answer in answers.items():
        assert len(answer) == 1, case
        proofs, waits_for = answer.get("proved_by", []), answer.get("waits_for", "")
        assert proofs or waits_for, case
        assert [name for name in proofs if not is_there(name)] == [], case

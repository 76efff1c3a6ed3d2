"""What a terminal of 80 columns shows."""

from __future__ import annotations

import io

from rich.console import Console

from rollout.commands.screen import make_table


def test_figures_keep_their_place_beside_the_longest_ids() -> None:
    rollout_id = "1acaf25ffdbf47bcbb17b08a4655c45f/copy-1-000.0/judge.0-1"
    names = ("rollout", "reward", "ended", "turns", "calls", "tokens", "replayed")
    table = make_table("rollouts", *names, texts=("rollout", "ended"))
    table.add_row(rollout_id, "0.125", "infrastructure: VERIFIER_ERROR", "12", "34", "5678", "90")
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    lines = out.getvalue().splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert [name for name in names if name not in lines[2]] == []
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert "".join(row[0] for row in rows) == rollout_id
    assert rows[0][1] == "0.125"
    assert rows[0][3:] == ["12", "34", "5678", "90"]

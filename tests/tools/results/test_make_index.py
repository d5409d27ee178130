"""The index of the measurements: it is current, and what it says of a file."""

from __future__ import annotations

from tools.results import make_index


def test_the_index_is_current():
    assert make_index.main(["--check"]) == 0


def test_what_is_said_of_a_result(tmp_path, capsys):
    text = "# A title\n\n2026-01-02. Command: `python tools/x.py --flag\n1`\n\nsee 2025-12-31\n"
    (tmp_path / "speed-h200x2-2026-01-01.md").write_text(text)
    (tmp_path / "loss-cpu.md").write_text("# Loss\n\n    python a.py | tee b\n")
    (tmp_path / "bare.md").write_text("# Bare\n")
    own = ["--results", str(tmp_path)]
    assert make_index.main([*own, "--check"]) == 1
    assert "is not up to date" in capsys.readouterr().out
    assert make_index.main(own) == 0 and make_index.main([*own, "--check"]) == 0
    rows = [line for line in (tmp_path / "README.md").read_text().splitlines() if "](" in line]
    assert rows == [
        "| [A title](speed-h200x2-2026-01-01.md) | 2026-01-02 | 2 x NVIDIA H200 | "
        "`python tools/x.py --flag 1` |",
        "| [Bare](bare.md) | - | - | - |",
        "| [Loss](loss-cpu.md) | - | CPU | `python a.py \\| tee b` |",
    ]


def test_a_file_without_a_title_is_refused(tmp_path, capsys):
    (tmp_path / "b.md").write_text("no title\n")
    assert make_index.main(["--results", str(tmp_path)]) == 65
    assert "expected '# TITLE'" in capsys.readouterr().err
    assert not (tmp_path / "README.md").exists()

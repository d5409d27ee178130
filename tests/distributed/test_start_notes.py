"""Why a rank does not come to the meeting: told to all that wait, by one that looks for it."""

from __future__ import annotations

from megasparse.distributed.start_notes import StartNotes


def test_one_rank_of_a_host_looks_for_notes_and_all_get_them(tmp_path, monkeypatch):
    variables = {"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "WORLD_SIZE": "5"}
    for name, value in variables.items():  # an address of a run over several hosts
        monkeypatch.setenv(name, value)
    searched: list[int] = []
    search = StartNotes._search

    def counted(self):
        searched.append(self._rank)
        return search(self)

    monkeypatch.setattr(StartNotes, "_search", counted)
    waiting = [StartNotes(tmp_path, rank, "0") for rank in range(3)]
    for _ in range(4):
        assert [notes.find() for notes in waiting] == [None] * 3
    assert set(searched) == {0}
    StartNotes(tmp_path, 4, "0").leave("no data", 65)
    found: dict[int, dict] = {}
    for _ in range(4):
        found |= {n: note for n, notes in enumerate(waiting) if (note := notes.find())}
    assert {n: (note["rank"], note["message"], note["code"]) for n, note in found.items()} == (
        dict.fromkeys(range(3), (4, "no data", 65))
    )
    assert set(searched) == {0}
    waiting[0].close()
    for _ in range(4):
        [notes.find() for notes in waiting[1:]]
    assert len(set(searched)) == 2  # another one takes over

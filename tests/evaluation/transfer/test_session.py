"""Sessions. Oracle: names written by hand, and that each part of a fit's identity changes its file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lcl_megatron.evaluation.transfer.session import FitIdentity, digest, open_session

FIT = FitIdentity({"name": "timm:vit/b 16", "fingerprint": "0af3"}, "full", 3, digest("captioning", [1, 2]))


def test_names_of_fits_are_names_of_files() -> None:
    assert FIT.name == "timm_vit_b_16-full-seed3"
    assert FitIdentity({"name": "x" * 300}, "frozen", 0, "").name == f"{'x' * 100}-frozen-seed0"


def test_states_of_fits_that_differ_have_files_of_their_own(tmp_path: Path) -> None:
    others = [
        dataclasses.replace(FIT, encoder=FIT.encoder | {"fingerprint": "0af4"}),
        dataclasses.replace(FIT, encoder=FIT.encoder | {"name": "timm:vit/b 32"}),
        dataclasses.replace(FIT, mode="frozen"),
        dataclasses.replace(FIT, seed=4),
        dataclasses.replace(FIT, trained_on=digest("captioning", [1, 3])),
    ]
    with open_session(tmp_path, None, lambda _line: None) as session:
        files = {session.state_file(fit) for fit in [FIT, *others]}
        assert len(files) == 6
        assert {file.parent for file in files} == {tmp_path / "states"}
        (tmp_path / "states").mkdir()
        session.state_file(FIT).write_bytes(b"a state")
    assert not (tmp_path / "states").exists()

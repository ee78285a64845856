"""Process groups. Oracle: the rank numbering that ``groups.py`` promises, written out as arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lcl_megatron.config import ConfigError, ParallelConfig
from lcl_megatron.parallel import groups
from tests.distributed import RankError, run_distributed


def _layout(tp: int, pp: int, cp: int = 1) -> ParallelConfig:
    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp)


def _last_two(pipeline: list[int]) -> list[int]:
    return pipeline[-2:]


def _members(group: dist.ProcessGroup | None) -> list[int]:
    return [] if group is None else dist.get_process_group_ranks(group)


@pytest.mark.parametrize(
    ("tp", "cp", "dp", "pp"),
    [
        (1, 1, 4, 1),
        (2, 1, 2, 1),
        (1, 1, 2, 2),
        (2, 1, 1, 2),
        (1, 1, 1, 4),
        (2, 1, 1, 3),
        (1, 2, 2, 1),
        (2, 2, 1, 1),
        (1, 3, 1, 2),
        (1, 2, 2, 2),
    ],
)
def test_groups_when_layout_varies_follow_the_rank_numbering(tp, cp, dp, pp):
    def members(rank: int, world_size: int) -> dict[str, object]:
        made = groups.initialize(_layout(tp, pp, cp), _last_two)
        others: list[object] = [None] * world_size
        dist.all_gather_object(others, made.describe())
        assert [made.describe(other) for other in range(world_size)] == others
        place = made.describe(), (made.tp_size, made.cp_size, made.dp_size, made.pp_size), made.cp_rank
        ranks = torch.tensor([rank])
        dist.all_reduce(ranks, group=made.host)
        made.barrier()
        return {
            "place": place,
            "host": int(ranks),
            "places": [made.describe(other) for other in range(world_size)],
            **{
                name: _members(getattr(made.collection, name))
                for name in ("tp", "pp", "cp", "dp", "dp_cp", "mp", "embd", "pos_embd")
            },
        }

    def number(p: int, d: int, c: int, t: int) -> int:
        return ((p * dp + d) * cp + c) * tp + t

    results = run_distributed(members, tp * cp * pp * dp)
    for rank, got in enumerate(results):
        assert got.pop("places") == [other["place"][0] for other in results]
        t, c, d, p = rank % tp, rank // tp % cp, rank // (tp * cp) % dp, rank // (tp * cp * dp)
        pipeline = [number(stage, d, c, t) for stage in range(pp)]
        embedding = pipeline[-2:]
        context = f"cp{c} " if cp > 1 else ""
        assert got == {
            "place": (f"rank {rank} (dp{d} pp{p} {context}tp{t})", (tp, cp, dp, pp), c),
            "host": sum(range(tp * cp * pp * dp)),
            "tp": [number(p, d, c, i) for i in range(tp)],
            "pp": pipeline,
            "cp": [number(p, d, i, t) for i in range(cp)],
            "dp": [number(p, copy, c, t) for copy in range(dp)],
            "dp_cp": [number(p, copy, i, t) for copy in range(dp) for i in range(cp)],
            "mp": sorted(number(stage, d, c, i) for stage in range(pp) for i in range(tp)),
            "embd": embedding if rank in embedding else [],
            "pos_embd": embedding[:1] if rank == embedding[0] else [],
        }


def test_layout_when_it_does_not_divide_is_refused_with_the_numbers():
    def refuse(rank: int, world_size: int) -> None:
        groups.initialize(_layout(2, 2), _last_two)

    with pytest.raises(
        RankError,
        match=r"ConfigError: 3 processes cannot be split into models of 4 "
        r"\(tensor 2 x pipeline 2 x context 1\); start a multiple of 4",
    ):
        run_distributed(refuse, 3)


def test_lone_process_when_not_launched_makes_groups_of_one_and_leaves_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="1 processes cannot be split into models of 2"):
        groups.initialize(_layout(2, 1), _last_two)
    assert not dist.is_initialized()
    for _ in range(2):  # a second life after destroy
        made = groups.initialize(ParallelConfig(), _last_two)
        assert made.describe() == "rank 0 (dp0 pp0 tp0)"
        assert (made.world_size, made.tp_size, made.pp_size, made.dp_size) == (1, 1, 1, 1)
        made.destroy()
        assert not dist.is_initialized()


def test_groups_when_launched_by_torchrun_span_the_processes(tmp_path):
    script = tmp_path / "report.py"
    script.write_text(
        "from lcl_megatron.config import ParallelConfig\n"
        "from lcl_megatron.parallel import groups\n"
        "made = groups.initialize(ParallelConfig(tensor_model_parallel_size=2), lambda pipeline: pipeline)\n"
        f"open(r'{tmp_path}/' + str(made.rank), 'w').write(made.describe())\n"
        "made.destroy()\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        check=True,
        env=environment,
        capture_output=True,
        timeout=180,
    )
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["rank 0 (dp0 pp0 tp0)", "rank 1 (dp0 pp0 tp1)"]


def _agree(rank: int, world_size: int, values: list[str]) -> str:
    started = groups.initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    try:
        started.require_agreement("the colour", values[rank])
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_were_started_differently_are_named_on_every_rank() -> None:
    assert run_distributed(_agree, 3, ["red", "red", "red"]) == ["", "", ""]
    messages = run_distributed(_agree, 3, ["red", "blue", "red"])
    assert all("the colour of ranks [1] differs from that of rank 0" in message for message in messages)


def _said(rank: int, world_size: int, texts: list[str]) -> tuple[str, list[str], tuple[bool, ...]]:
    made = groups.initialize(ParallelConfig(), lambda pipeline: pipeline[:1])
    flags = made.any_rank(False, rank == 1, True)
    return made.first_rank_text(texts[rank]), made.gather_texts(texts[rank]), flags


@pytest.mark.parametrize(
    "texts", [["a", "b", "c"], ["", "a longer text", ""], ["\u00fcber", "", "x" * 5000], ["", "", ""]]
)
def test_texts_and_flags_of_all_ranks(texts: list[str]) -> None:
    for first, gathered, flags in run_distributed(_said, 3, texts):
        assert first == texts[0]
        assert gathered == texts
        assert flags == (False, True, True)


def test_a_nonce_is_the_same_on_all_ranks_and_never_comes_again():
    def nonces(rank: int, world_size: int) -> list[str]:
        made = groups.initialize(_layout(1, 1), _last_two)
        return [made.shared_nonce() for _ in range(3)]

    first, second = run_distributed(nonces, 2)
    assert first == second
    assert len(set(first)) == 3
    assert all(len(bytes.fromhex(nonce)) == 8 for nonce in first)


def _join(rank: int, world_size: int, port: int, variables: dict[str, str]) -> list[str]:
    """Start the groups of a lone process as under an agent that serves its store at a port; return warnings."""
    dist.destroy_process_group()
    os.environ.update(variables, MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    said: list[str] = []
    groups.logger.addFilter(lambda record: said.append(record.getMessage()) is None)
    made = groups.initialize(ParallelConfig(), lambda pipeline: pipeline)
    assert made.owns_default_group
    made.barrier()
    return said


def test_restarted_ranks_do_not_read_what_dead_ones_have_left_in_the_store() -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    known: set[str] = set()
    for attempt in range(3):
        assert run_distributed(_join, 1, store.port, {"TORCHELASTIC_RESTART_COUNT": str(attempt)}) == [[]]
        keys = set(store.list_keys()) - known
        known |= keys
        # As many new ones every time: none is written, and so none looked for, under the name of an earlier one.
        assert len(known) == (attempt + 1) * len(keys)
        assert len(keys) > 1


@pytest.mark.parametrize(("nodes", "restarts", "warnings"), [("1", "3", 0), ("2", "0", 0), ("2", "3", 1)])
def test_restarts_on_several_nodes_that_could_not_work_are_warned_of(nodes: str, restarts: str, warnings: int) -> None:
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {"GROUP_WORLD_SIZE": nodes, "TORCHELASTIC_MAX_RESTARTS": restarts}
    (said,) = run_distributed(_join, 1, store.port, variables)
    assert len(said) == warnings
    for message in said:
        assert "torchrun --max-restarts 3 on 2 nodes" in message
        assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in message

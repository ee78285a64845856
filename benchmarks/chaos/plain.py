"""The baseline: the same faults on megatron-core's own saving and reading, used as its documentation shows.

``dist_checkpointing.save`` writes into the folder with the final name, ``load`` reads with its strictest mode, and
``IndexedDataset`` reads a corpus's tokens. Each case has a process of its own, since some of them crash it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from benchmarks.chaos.damage import KINDS, damaged, files_of
from benchmarks.chaos.payloads import forms
from benchmarks.chaos.processes import ChildError, call_in_child, call_on_ranks, descendants, fork, join_ranks
from benchmarks.chaos.small_run import make_corpus

SHAPE = (64, 256)
TENSORS = 6
CHECKPOINT_KINDS = tuple(kind for kind in KINDS if kind not in ("manifest of another", "folder renamed", "file added"))
"""Damages that there are: megatron-core has no manifest, and its folders have any name."""
HANG_S = 15.0
LONGEST_SAVE_S = 0.2


def run(seed: int, cases: int, folder: Path) -> dict[str, Any]:
    """Try every fault; return the figures by lane.

    Args:
        seed: of the campaign.
        cases: damages to try; kills are a tenth of them.
        folder: scratch.
    """
    with multiprocessing.get_context("spawn").Manager() as manager:
        saves = _Saves(folder, manager)
        return {
            "checkpoints": _damaged_checkpoints(seed, cases, saves),
            "corpora": _damaged_corpora(seed, cases, folder),
            "kills": _kills_in_place(seed, max(4, cases // 10), saves),
            "writer": saves.kill_a_writer(),
            "payloads": _payloads(saves, most=cases),
        }


class _Saves:
    """Saves and loads, on ranks that share one process for results: each would start its own, for three seconds.

    Args:
        folder: scratch.
        manager: that process.
    """

    def __init__(self, folder: Path, manager: SyncManager) -> None:
        self.folder = folder
        self._manager = manager

    def save(self, rank: int, place: Path, value: int) -> None:
        """Save on this rank, with the default group running."""
        filesystem_async._results_queue = self._manager.Queue()
        if rank == 0:
            place.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(state(rank, value), str(place))

    def load(self, rank: int, place: Path) -> dict[str, Any]:
        """Load on this rank; returns the iteration and the distinct values of every tensor."""
        loaded = dist_checkpointing.load(state(rank, 0), str(place), strict="raise_all")
        tensors = {name: tensor for name, tensor in loaded.items() if isinstance(tensor, torch.Tensor)}
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors.values())).hexdigest()
        first = {int(tensor.flatten()[0]) for tensor in tensors.values()}
        return {"iteration": loaded["iteration"], "digest": digest, "first": first, "object": loaded["object"]}

    def kill_a_writer(self) -> str:
        """Kill the process that writes rank 1's part; returns how the save ends."""

        def save(rank: int) -> None:
            if rank == 1:
                filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_die)
            self.save(rank, self.folder / "writer", 1)

        try:
            call_on_ranks(save, 2, timeout=HANG_S)
        except ChildError as error:
            return "hung" if "did not answer" in str(error) else "ended with an error"
        return "was not noticed"


def _die(*arguments: object, **named: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def state(rank: int, value: int) -> dict[str, Any]:
    """Return a state of which all tensors begin with a value that tells which save it is from.

    Args:
        rank: its part is returned.
        value: number of the save.
    """
    world = dist.get_world_size()
    tensors = {}
    for number in range(TENSORS):
        data = torch.arange(SHAPE[0] * SHAPE[1], dtype=torch.float32).view(SHAPE) % 251 + number
        data[0, 0] = value
        tensors[f"layer{number}"] = ShardedTensor.from_rank_offsets(f"layer{number}", data, (0, rank, world))
    held = {"iteration": value, "object": ShardedObject("object", {"value": value}, (world,), (rank,))}
    return tensors | held


def _damaged_checkpoints(seed: int, cases: int, saves: _Saves) -> dict[str, Any]:
    """Damage a checkpoint; returns by kind whether loading refused it, or what it returned."""
    own, other = saves.folder / "own", saves.folder / "other"
    for place, value in ((own, 1), (other, 2)):
        call_on_ranks(saves.save, 2, place, value)
    whole = call_on_ranks(saves.load, 2, own)
    found: dict[str, Counter[str]] = {}
    for number in range(cases):
        rng = random.Random(f"{seed}/plain checkpoints/{number}")
        kind = CHECKPOINT_KINDS[number % len(CHECKPOINT_KINDS)]
        with damaged(kind, own, other, rng):
            try:
                loaded = call_on_ranks(saves.load, 2, own)
                outcome = "loaded, harmless" if loaded == whole else "loaded, wrong"
            except ChildError:
                outcome = "refused"
        found.setdefault(kind, Counter())[outcome] += 1
    return _summed(found)


def _damaged_corpora(seed: int, cases: int, folder: Path) -> dict[str, Any]:
    """Damage tokens; returns by kind whether opening and reading refused them, or what it returned."""
    own, other = (_tokens(folder / name, number) for name, number in (("own-tokens", 48), ("other-tokens", 40)))
    whole = call_in_child(_read_tokens, own)
    found: dict[str, Counter[str]] = {}
    kinds = [kind for kind in CHECKPOINT_KINDS if kind not in ("edited field", "two files swapped")]
    for number in range(cases):
        rng = random.Random(f"{seed}/plain corpora/{number}")
        kind = kinds[number % len(kinds)]
        with damaged(kind, own, other, rng):
            try:
                outcome = "loaded, harmless" if call_in_child(_read_tokens, own) == whole else "loaded, wrong"
            except ChildError as error:
                outcome = "crashed" if "died" in str(error) else "refused"
        found.setdefault(kind, Counter())[outcome] += 1
    return _summed(found)


def _tokens(place: Path, documents: int) -> Path:
    """Return a folder with the two files of tokens of a corpus."""
    corpus = call_in_child(make_corpus, place / "data", documents)
    (place / "tokens").mkdir()
    for suffix in ("bin", "idx"):
        shutil.copy(corpus / f"tokens.{suffix}", place / "tokens" / f"tokens.{suffix}")
    return place / "tokens"


def _read_tokens(place: Path) -> str:
    """Return a hash of all that a reader gives."""
    logging.disable(logging.CRITICAL)
    dataset = IndexedDataset(str(place / "tokens"))
    digest = hashlib.sha256()
    for sequence in range(len(dataset)):
        digest.update(np.array(dataset[sequence]).tobytes())
    return digest.hexdigest()


def _summed(found: dict[str, Counter[str]]) -> dict[str, Any]:
    total: Counter[str] = sum(found.values(), Counter())
    return {
        "cases": total.total(),
        "detected": total["refused"],
        "wrong": total["loaded, wrong"],
        "crashed": total["crashed"],
        "kinds": found,
    }


def _kills_in_place(seed: int, cases: int, saves: _Saves) -> dict[str, int]:
    """Kill all ranks while they save a second time into the same folder; returns what is loaded afterwards."""
    found: Counter[str] = Counter()
    for number in range(cases):
        rng = random.Random(f"{seed}/plain kills/{number}")
        place = saves.folder / f"killed-{number}"
        call_on_ranks(saves.save, 2, place, 1)
        with _saving(saves, place) as ranks:
            time.sleep(rng.uniform(0, LONGEST_SAVE_S))
            victims = [ranks[1]] if rng.random() < 0.5 else ranks
            for process in victims:
                for writer in [*descendants(process), None]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(writer.pid if writer else process, signal.SIGKILL)
            time.sleep(0.3)
        found[_what_is_there(saves, place)] += 1
        shutil.rmtree(place)
    return dict(found)


@contextlib.contextmanager
def _saving(saves: _Saves, place: Path) -> Iterator[list[int]]:
    """Fork two ranks that save; yields their ids when both have begun, and ends them."""
    store = place.with_name(f"{place.name}-store")

    def save(rank: int) -> Callable[[], int]:
        def body() -> int:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            join_ranks(rank, 2, store, 30.0)
            (place.with_name(f"{place.name}-begun-{rank}")).touch()
            saves.save(rank, place, 2)
            return 0

        return body

    ranks = [fork(save(rank)) for rank in range(2)]
    while not all(place.with_name(f"{place.name}-begun-{rank}").exists() for rank in range(2)):
        time.sleep(0.001)
    try:
        yield ranks
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        store.unlink(missing_ok=True)


def _what_is_there(saves: _Saves, place: Path) -> str:
    try:
        ranks = call_on_ranks(saves.load, 2, place, timeout=HANG_S)
    except ChildError:
        return "neither: it cannot be loaded"
    values = {value for rank in ranks for value in (rank["iteration"], rank["object"]["value"], *rank["first"])}
    return {(1,): "the old one", (2,): "the new one"}.get(tuple(sorted(values)), "a mixture of both")


def _payloads(saves: _Saves, most: int) -> dict[str, int]:
    """Put payloads in the place of every file; returns how many were run.

    Args:
        saves: what loads.
        most: payloads to try.
    """
    own, marker = saves.folder / "own", saves.folder / "marker"
    places = [(own / ".metadata", _hidden((own / ".metadata").read_bytes(), marker))]
    places += [(path, content) for path in files_of(own) for content in forms(marker).values()]
    executed = 0
    for path, content in places[:most]:
        before = path.read_bytes()
        path.write_bytes(content)
        with contextlib.suppress(ChildError):
            call_on_ranks(saves.load, 2, own)
        path.write_bytes(before)
        executed += marker.is_dir()
        shutil.rmtree(marker, ignore_errors=True)
    return {"payloads": len(places[:most]), "executed": executed}


def _hidden(metadata: bytes, marker: Path) -> bytes:
    """Return metadata that can be used as before, and runs something when it is read."""
    holder: Any = pickle.loads(metadata)
    payload = next(iter(forms(marker).values()))
    holder.planner_data = dict(getattr(holder, "planner_data", None) or {}) | {"x": _Ran(payload)}
    return pickle.dumps(holder)


class _Ran:
    """Unpickles something inside of something else.

    Args:
        content: a pickle.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        """Return what the unpickler is to call."""
        return pickle.loads, (self._content,)


__all__: Sequence[str] = ["run"]

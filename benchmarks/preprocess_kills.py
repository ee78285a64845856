"""Preprocessing killed at random moments, resumed, and compared byte for byte with a run that nobody disturbed.

python benchmarks/preprocess_kills.py --kills 200

Makes MMC4 shards with images, some of them bad, and preprocesses them again and again: each run is a process of its
own that gets SIGKILL at a random moment (the parent alone, one of its workers, or all of them; while it starts, works,
or publishes), and is then started anew with one to three workers, until it ends by itself. Every other corpus replaces
an old one, which must stay whole until the new one is there. The last line is one JSON object: ``kills`` sent,
``corpora`` finished, how many of them are ``identical`` to the undisturbed one in the SHA-256 of every file, and
``torn``, the number of times that something else than the old or the new corpus was found at the output.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import psutil
from PIL import Image

from lcl_megatron.data.preprocessing.preprocess import preprocess
from lcl_megatron.data.preprocessing.preprocess_config import PreprocessConfig
from lcl_megatron.data.tokenizer import train_tokenizer

WORDS = [
    f"{a}{b}{c}" for a in ("ka", "lo", "mi", "ste", "ru") for b in ("n", "r", "ndo", "li") for c in ("a", "es", "um")
]
MAX_KILLS_PER_CORPUS = 12
"""After so many, a corpus is left to end in peace."""
TARGETS = ("parent", "worker", "group")


def make_shards(folder: Path, shards: int, documents: int) -> list[Path]:
    """Write shards and images; every seventh image is missing, every eleventh no image, every ninth line broken."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(40):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "JPEG")
        if number % 7:
            data = b"<html>404</html>" if number % 11 == 0 else stream.getvalue()
            (folder / "images" / f"{number}.jpg").write_bytes(data)
    paths = []
    for shard in range(shards):
        lines = []
        for number in range(documents):
            texts = [" ".join(rng.choice(WORDS, 40)) for _ in range(12)]
            infos = [
                {"image_name": f"{rng.integers(40)}.jpg", "matched_text_index": int(place), "matched_sim": 0.3}
                for place in rng.integers(0, len(texts), 3)
            ]
            line = json.dumps({"text_list": texts, "image_info": infos})
            lines.append(line[: len(line) // 2] if number % 9 == 8 else line)
        paths.append(folder / f"docs_shard_{shard}_v2.jsonl")
        paths[-1].write_text("\n".join(lines), encoding="utf-8")
    return paths


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@dataclass
class Attempts:
    """Corpora made under fire, and what came of them."""

    inputs: tuple[Path, ...]
    """Shards."""
    folder: Path
    """Where all files are."""
    random: random.Random
    """Chooses moments, targets and numbers of workers."""
    kills: int = 0
    """SIGKILLs sent."""
    targets: Counter[str] = field(default_factory=Counter)
    """Kills by target."""
    moments: Counter[str] = field(default_factory=Counter)
    """Kills by what was there afterwards: ``start``, ``work`` or ``commit``."""
    torn: int = 0
    """Times that the output was neither the old nor the new corpus."""
    seconds: dict[int, float] = field(default_factory=dict)
    """Duration of an undisturbed run, by number of workers."""

    def config(self, output: Path, workers: int, overwrite: bool = False) -> PreprocessConfig:
        """Return a run."""
        return PreprocessConfig(
            input=self.inputs,
            image_root=self.folder / "images",
            tokenizer_model=self.folder / "tokenizer.model",
            output=output,
            num_workers=workers,
            overwrite=overwrite,
        )

    def undisturbed(self) -> dict[str, str]:
        """Return the hashes of a corpus made in peace, and measure how long that takes."""
        found = []
        for workers in (1, 2, 3):
            begin = time.monotonic()
            status = os.waitpid(start(self.config(self.folder / f"whole{workers}", workers), self.log), 0)[1]
            self.check_status(status, killed=False)
            self.seconds[workers] = time.monotonic() - begin
            found.append(hashes(self.folder / f"whole{workers}"))
        if any(other != found[0] for other in found):
            sys.exit("the number of workers changes the bytes, without any kill")
        return found[0]

    @property
    def log(self) -> Path:
        """Where runs write their errors."""
        return self.folder / "log"

    def one_corpus(self, output: Path, old: Path | None, clean: dict[str, str], max_kills: int) -> bool:
        """Make one corpus under fire; returns whether it is the undisturbed one in every byte."""
        if old is not None:
            shutil.copytree(old, output)
        allowed = [clean] if old is None else [clean, hashes(old)]
        for kill in range(max_kills + 1):
            workers = self.random.randint(1, 3)
            process = start(self.config(output, workers, old is not None), self.log)
            if kill < max_kills:
                target = self.wait_and_kill(process, output, 0.7 * self.seconds[workers])
            status = os.waitpid(process, 0)[1]
            if kill == max_kills or not target:
                self.check_status(status, killed=False)
                break
            self.kills += 1
            self.targets[target] += 1
            self.moments[moment(output)] += 1
            self.check_status(status, killed=True)
            self.torn += self.is_torn(output, allowed, old is not None)
            if output.exists() and hashes(output) == clean and not staging(output).exists():
                break  # the kill came after all work
        left = [path.name for path in output.parent.glob(f".{output.name}.*") if path.suffix != ".done"]
        return hashes(output) == clean and not left

    def wait_and_kill(self, process: int, output: Path, longest: float) -> str:
        """Wait for a random moment and kill; returns whom, or nothing if the run had ended before."""
        deadline = time.monotonic() + self.random.uniform(0, longest)
        commit, pause = self.random.random() < 0.3, self.random.uniform(0, 0.1)
        target = self.random.choice(TARGETS)
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if is_committing(output) if commit else time.monotonic() > deadline:
                time.sleep(pause if commit else 0)
                try:
                    target, victim_id = victim(psutil.Process(process), target, self.random)
                    os.kill(victim_id, signal.SIGKILL)
                except (psutil.NoSuchProcess, ProcessLookupError):
                    return ""  # it has just ended
                return target
            time.sleep(0.001)
        return ""

    def is_torn(self, output: Path, allowed: list[dict[str, str]], replaces: bool) -> bool:
        """Return whether the output is not an allowed corpus; while it is replaced, the old one stands aside."""
        aside = output.with_name(f".{output.name}.replaced")
        found = output if output.exists() else aside
        return hashes(found) not in allowed if found.exists() else replaces

    def check_status(self, status: int, killed: bool) -> None:
        """End the program if a run ended in a way that no kill explains."""
        if killed and (os.WIFSIGNALED(status) or "a worker process ended" in self.log.read_text(encoding="utf-8")):
            return
        if not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0:
            sys.exit(f"a run failed by itself (status {status}):\n{self.log.read_text(encoding='utf-8')}")


def start(config: PreprocessConfig, log: Path) -> int:
    """Fork a process that preprocesses, with a process group of its own; returns its id."""
    log.write_text("")
    process = os.fork()
    if process == 0:
        run(config, log)
    return process


def run(config: PreprocessConfig, log: Path) -> NoReturn:
    """Preprocess, with errors into a file, and end this process."""
    status = 1
    try:
        os.setsid()
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
        preprocess(config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def victim(run: psutil.Process, target: str, rng: random.Random) -> tuple[str, int]:
    """Return whom to kill of a run, and the process id, negative for a group; the parent if there is nobody else."""
    if target == "group" and os.getpgid(run.pid) == run.pid:
        return target, -run.pid
    workers = [child.pid for child in run.children() if "spawn_main" in " ".join(child.cmdline())]
    if target == "worker" and workers:
        return target, rng.choice(workers)
    return "parent", run.pid


def staging(output: Path) -> Path:
    """Return where a corpus is while it is made."""
    return output.with_name(f".{output.name}.partial")


def is_committing(output: Path) -> bool:
    """Return whether a run has begun to complete its corpus."""
    return (staging(output) / "corpus" / "tokens.idx").exists()


def moment(output: Path) -> str:
    """Return what a killed run was doing, from what it has left."""
    partial = staging(output)
    if is_committing(output) or (not partial.exists() and output.exists()):
        return "commit"
    if not (partial / "journal.json").exists():
        return "start"
    if not (partial / "corpus").exists():
        return "commit"
    return "work" if any((partial / "parts").iterdir()) or (partial / "inputs.jsonl").stat().st_size else "start"


def main() -> None:
    """Read the flags, kill, compare, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs to send")
    parser.add_argument("--shards", type=int, default=8, help="shards of each corpus")
    parser.add_argument("--documents", type=int, default=80, help="documents of each shard")
    parser.add_argument("--seed", type=int, default=0, help="seed of moments, targets and numbers of workers")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder, flags.shards, flags.documents)
        train_tokenizer(WORDS * 50, folder / "tokenizer.model", 400)
        attempts = Attempts(tuple(shards), folder, random.Random(flags.seed))
        begin = time.monotonic()
        clean = attempts.undisturbed()
        print(f"undisturbed: {', '.join(f'{s:.1f} s with {w}' for w, s in attempts.seconds.items())} workers")
        old = folder / "old"
        preprocess(PreprocessConfig(**vars(attempts.config(old, 1)) | {"input": attempts.inputs[:1]}))
        corpora = identical = 0
        while attempts.kills < flags.kills:
            output = folder / f"corpus{corpora}" / "corpus"
            output.parent.mkdir()
            most = min(MAX_KILLS_PER_CORPUS, flags.kills - attempts.kills)
            identical += attempts.one_corpus(output, old if corpora % 2 else None, clean, most)
            corpora += 1
            shutil.rmtree(output.parent)
            print(f"{attempts.kills:4} kills, {identical} of {corpora} corpora identical", flush=True)
    result = {"kills": attempts.kills, "corpora": corpora, "identical": identical, "torn": attempts.torn}
    result |= {"targets": attempts.targets, "moments": attempts.moments, "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()

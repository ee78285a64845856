"""The benchmarks by name."""

from __future__ import annotations

from lcl_megatron.evaluation.dialogue.benchmark import Benchmark, BenchmarkError
from lcl_megatron.evaluation.dialogue.benchmarks import multiple_choice, open_answers, yes_no_questions

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        open_answers.VQAV2,
        open_answers.GQA,
        open_answers.VIZWIZ,
        multiple_choice.SCIENCEQA,
        yes_no_questions.POPE,
        yes_no_questions.MME,
        multiple_choice.MMBENCH,
        multiple_choice.SEED,
    )
}
"""Benchmarks by the name that the command line takes."""


def known_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name; raises ``BenchmarkError`` with those there are."""
    if name not in BENCHMARKS:
        raise BenchmarkError(f"there is no benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]

"""The source holds nothing that runs code from a file. Oracle: snippets that do, and snippets that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.code_runners import find_code_runners

ROOT = Path(__file__).parents[1]
PLACES = ("lcl_megatron", "tools", "benchmarks", "examples", "pretrain_lcl.py", "setup.py")
ALLOWED = {
    # After a comparison with the file that this package ships.
    ("lcl_megatron/checkpoint/export_check.py", "exec_module"),
    # What ranks of one job say to each other while they evaluate; no file is read.
    ("lcl_megatron/parallel/replicas.py", "all_gather_object"),
    ("lcl_megatron/parallel/replicas.py", "broadcast_object_list"),
    # The fault campaign runs its own payloads to know that they would do harm, and megatron-core's way for comparison.
    ("benchmarks/chaos/payloads.py", "allow_pickle that is not False"),
    ("benchmarks/chaos/payloads.py", "pickle.loads"),
    ("benchmarks/chaos/payloads.py", "weights_only that is not True"),
    ("benchmarks/chaos/plain.py", "pickle.loads"),
    # Knows the few classes of a checkpoint's plan by name and refuses all others.
}


def test_nothing_in_the_source_runs_code_from_a_file() -> None:
    found = set()
    for place in PLACES:
        path = ROOT / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(ROOT).as_posix()
            found |= {(name, runner.name) for runner in find_code_runners(file.read_text(encoding="utf-8"))}
    assert found <= ALLOWED
    # An entry that nothing needs would hide what comes later; files that are gone need none.
    assert {entry for entry in ALLOWED if (ROOT / entry[0]).exists()} == found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle\npickle.load(f)", "pickle.load"),
        ("import pickle as p\np.loads(b)", "pickle.loads"),
        ("from pickle import loads as read\nread(b)", "pickle.loads"),
        ("import pickle\nclass U(pickle.Unpickler): pass", "pickle.Unpickler"),
        ("import pickle\nmap(pickle.load, files)", "pickle.load"),
        ("import cloudpickle\ncloudpickle.load(f)", "cloudpickle.load"),
        ("import torch\ntorch.load(f)", "torch.load without weights_only=True"),
        ("import torch\ntorch.load(f, weights_only=False)", "weights_only that is not True"),
        ("import torch\ntorch.load(f, weights_only=trusted)", "weights_only that is not True"),
        ("from torch import load\nload(f)", "torch.load without weights_only=True"),
        ("import torch\nread = torch.load", "torch.load passed on"),
        ("import torch\ntorch.hub.load(a, b)", "torch.hub.load"),
        ("import torch\ntorch.jit.load(f)", "torch.jit.load"),
        ("import numpy as np\nnp.load(f)", "numpy.load without allow_pickle=False"),
        ("import numpy\nnumpy.load(f, allow_pickle=True)", "allow_pickle that is not False"),
        ("eval(text)", "eval"),
        ("import builtins\nbuiltins.exec(text)", "builtins.exec"),
        ("__import__(name)", "__import__"),
        ("import yaml\nyaml.load(f, Loader=yaml.FullLoader)", "yaml.load"),
        ("from yaml import unsafe_load", "yaml.unsafe_load"),
        ("import pandas as pd\npd.read_pickle(f)", "pandas.read_pickle"),
        ("import os\nos.system(text)", "os.system"),
        ("import subprocess\nsubprocess.run(text, shell=True)", "shell that is not False"),
        ("Pipeline.deserialize(filename=f)", "deserialize"),
        ("dist.broadcast_object_list(values)", "broadcast_object_list"),
        ("spec.loader.exec_module(module)", "exec_module"),
        ("t.AutoModel.from_pretrained(f)", "AutoModel.from_pretrained without trust_remote_code=False"),
        ("AutoConfig.from_pretrained(f, trust_remote_code=True)", "trust_remote_code that is not False"),
        ("load(f, trust_remote_code=flag)", "trust_remote_code that is not False"),
    ],
)
def test_the_search_finds(source: str, expected: str) -> None:
    assert expected in [runner.name for runner in find_code_runners(source)]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.dumps(a)\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "import torch\ntorch.load(f, map_location='cpu', weights_only=True)",
        "import numpy as np\nnp.load(f, mmap_mode='r', allow_pickle=False)",
        "model.eval()\nre.compile(p)\njson.load(f)\nloader.load(f)",
        "import yaml\nyaml.safe_load(f)",
        "t.AutoModel.from_pretrained(f, trust_remote_code=False)\nCLIPModel.from_pretrained(f)",
        "'eval(text) and pickle.load(f) in a text'",
    ],
)
def test_the_search_passes_over(source: str) -> None:
    assert find_code_runners(source) == []

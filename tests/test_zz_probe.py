import time, dataclasses
import torch
from tests.distributed import run_distributed
from tests.parallel.test_layouts import CONFIG
from lcl_megatron.parallel import engine as engines
from lcl_megatron.training.optimizer import build_optimizer, build_scheduler
from lcl_megatron.checkpoint import native

def _go(rank, ws, root):
    t=[time.time()]
    groups = engines.start(CONFIG)
    engine = engines.build_engine(CONFIG, groups)
    opt = build_optimizer(engine)
    tr = native.Trainable(engine, opt, build_scheduler(CONFIG, opt))
    for p in engine.model.parameters(): p.main_grad.normal_()
    print(opt.step(), flush=True)
    t.append(time.time())
    native.save(root, tr, native.Progress(step=1), b"x")
    t.append(time.time())
    native.save(root, tr, native.Progress(step=2), b"x")
    t.append(time.time())
    engine = engines.build_engine(CONFIG, groups)
    opt = build_optimizer(engine)
    tr = native.Trainable(engine, opt, build_scheduler(CONFIG, opt))
    native.load(native.find_latest(root), tr)
    t.append(time.time())
    return [b-a for a,b in zip(t,t[1:])]

def test_x(tmp_path):
    for w in (1,2):
        a=time.time(); print(run_distributed(_go, w, tmp_path/str(w))); print(time.time()-a)

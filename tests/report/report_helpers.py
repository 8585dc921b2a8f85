"""Run directories as training leaves them, without the training; records as the contract of metrics.jsonl has them."""

import base64
import json
import re
from pathlib import Path

RUN_FILE = """
name: {name}
model: {{name: mlp, hidden: [32, 24]}}
data: {{path: digits.h5, batch_size: 64}}
optimizer: {{name: adamw, lr: {lr}}}
method: {method}
train: {{steps: 400}}
"""
OIALR = "{name: oialr, delay: 100, every: 50, cutoff: 0.2}"
LAYERS = {"hidden.0": (32, 64), "hidden.1": (24, 32), "head": (10, 24)}
BEGAN = 1.7e9  # Unix time


def make_run(place: Path, name: str, lines=None, *, lr=0.003, method=OIALR, summary=None) -> Path:
    """A run directory with these lines, or records, in its metrics."""
    run = place / name
    run.mkdir(parents=True)
    (run / "run.yaml").write_text(RUN_FILE.format(name="run", lr=lr, method=method))
    texts = (line if isinstance(line, str) else json.dumps(line) for line in (records() if lines is None else lines))
    (run / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts))
    if summary is not None:
        (run / "summary.json").write_text(json.dumps(summary))
    return run


def records(steps=400, restart=200, pause=3600.0, layers=tuple(LAYERS)):
    """A run that was requeued at half-time, and waited for an hour."""
    yield {"kind": "attempt", "step": 0, "attempt": 1, "world_size": 2, "device": "cpu", "time": BEGAN}
    for step in range(1, steps + 1):
        time = BEGAN + step + (pause if step > restart else 0)
        if step == restart + 1:
            yield {"kind": "attempt", "step": restart, "attempt": 2, "world_size": 2, "device": "cpu", "time": time - 1}
        yield {"kind": "train", "step": step, "loss": 2 / step**0.5, "lr": 1e-3, "time": time}
        if step % 50 == 0:
            yield check(step, time, layers)
            yield {"kind": "valid", "step": step, "loss": 1 / step**0.5, "accuracy": step / 500, "time": time}
            yield pace(step, time)


def check(step, time, layers=tuple(LAYERS)):
    sizes = {"trainable": 4000 - step, "stored": 5000 - step, "dense": 4000, "gradient_bytes": 16000 - 4 * step}
    ranks = {name: 24 - step // 50 - number for number, name in enumerate(layers)}
    stability = dict.fromkeys(layers, 0.95 + step / 10000)
    frozen = dict.fromkeys(layers, step >= 100)
    facts = {"ranks": ranks, "stability": stability, "frozen": frozen, "failures": 0, "rank_share": 0.5}
    return {"kind": "check", "step": step, "time": time, "optimizer_bytes": 32000, **sizes, **facts}


def pace(step, time):
    spent = {"data": 5.0, "check": 10.0, "save": 2.5, "valid": 2.5}
    return {"kind": "pace", "step": step, "time": time, "steps": 50, "seconds": 50.0, **spent, "memory": 10**8 + step}


def summary(accuracy=0.9, trainable=3600, layers=LAYERS):
    sizes = {"trainable": trainable, "stored": 4600, "dense": 4000, "gradient_bytes": 14400, "optimizer_bytes": 32000}
    listed = [{"name": name, "shape": list(shape), "rank": 8, "converted": True} for name, shape in layers.items()]
    return {
        "name": "run", "method": "oialr", "steps": 400, "seconds": 400.0, "test": {"loss": 0.3, "accuracy": accuracy},
        "best_validation": {"loss": 0.2, "accuracy": accuracy, "step": 400}, "layers": listed,
        "sizes": sizes | {"flops": 1000, "dense_flops": 2000, "flops_samples": 1},
        "cost": {"training_flops": 1e12, "dense_training_flops": 2e12, "peak_memory_bytes": 1e8},
    }  # fmt: skip


def saved(page: str, ending: str) -> dict[str, str]:
    """The files that a page offers: name → content."""
    links = re.findall(r'<a href="data:[^;]+;base64,([^"]*)" download="([^"]*)\.' + ending + '"', page)
    return {name: base64.b64decode(content).decode() for content, name in links}

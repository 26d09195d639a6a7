"""Memory of a prediction: row groups that stream by, against everything read at once.

Both run in a process of their own, so the clock covers their start too; the price is what their memory rose by at most
while they predicted, after imports and the model were loaded. Models are small, as memory of the data is the question.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from geo_yield.checkpoint import save_model
from geo_yield.crossfit import CrossFit
from geo_yield.dfyp import DFYPConfig
from geo_yield.histograms import YieldTensor, write_histograms
from geo_yield.modis import MODIS_LAYOUT
from geo_yield.training import DFYPRegressor, TrainConfig
from geo_yield.yields import join_yields

CLAIM = "predict needs no more memory for 3,000 regions than for 1,000; reading everything at once grows with them."
SWEEP = {"regions": (100, 1000, 3000)}
BASELINE = "everything at once"
DEVICES = ("cpu",)
SLOW = True
ROUNDS = 1  # memory is what is claimed, and each turn starts a process
THREADS = 2  # by the wall clock, which child processes run under too

_CHILD = """
import sys
from pathlib import Path
from geo_yield.checkpoint import load_model
from geo_yield.histograms import HistogramStore
from geo_yield.prediction import predict_yields
from geo_yield.yields import join_yields, read_yields
import numpy, torch

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

how, folder = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)
store, yields, model = HistogramStore(folder / "hist"), read_yields(folder / "yields.csv"), load_model(folder / "model")
model.predict(join_yields(next(store.batches(2)), yields))  # what the first call allocates once is not the data's
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
if how == "ours":
    predict_yields(store, folder / "model", folder / "out.parquet", yields=yields, workers=1)
    import pyarrow.parquet
    said = pyarrow.parquet.read_table(folder / "out.parquet")["prediction"].to_numpy()
else:
    said = model.predict(join_yields(store.read(), yields)).mean
peak = kilobytes("VmHWM")
numpy.save(folder / f"{how}.npy", said)
print((peak - before) / 1024)
"""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    folder: Path
    owner: tempfile.TemporaryDirectory
    """Removes the files with the inputs."""


def make(regions: int) -> Inputs:
    """A season of histograms of 9 bands, 32 composites and 32 bins, past yields, and a model."""
    owner = tempfile.TemporaryDirectory(prefix="predict-")
    folder = Path(owner.name)
    ids = [f"{number:05d}" for number in range(1, regions + 1)]
    write_histograms(folder / "hist" / "2022.parquet", MODIS_LAYOUT, _blocks(ids))
    rng = np.random.default_rng(0)
    parts = [
        pd.DataFrame({"region_id": ids, "year": y, "yield": rng.uniform(30, 60, regions)}) for y in range(2012, 2022)
    ]
    table = pd.concat(parts).assign(crop="soybean", unit="bu/acre", source="plain")
    table.to_csv(folder / "yields.csv", index=False)
    small = DFYPRegressor(DFYPConfig.small(9), TrainConfig.small(history="residual", max_steps=2))
    few = next(_blocks(ids[:16]))
    known = table[table["region_id"].isin(ids[:16])]
    training = join_yields(few, pd.concat([known, known[known["year"] == 2021].assign(year=2022)]))
    ensemble = CrossFit(lambda: small, folds=2)
    ensemble.fit(training, seed=0)
    save_model(ensemble, folder / "model")
    return Inputs(folder=folder, owner=owner)


def _blocks(ids: list[str]):
    rng = np.random.default_rng(1)
    C, T, K = MODIS_LAYOUT.shape
    for start in range(0, len(ids), 64):
        block = ids[start : start + 64]
        image = rng.random((len(block), C, T, K), dtype=np.float32)
        yield YieldTensor(
            layout=MODIS_LAYOUT,
            image=image / image.sum(axis=-1, keepdims=True),
            region_id=np.array(block),
            year=np.full(len(block), 2022, np.int16),
            lon=np.full(len(block), -92, np.float32),
            lat=np.full(len(block), 41, np.float32),
            valid_count=np.full((len(block), C, T), 50, np.int32),
            pixel_count=np.full(len(block), 60, np.int32),
        )


def _in_a_process(how: str, inputs: Inputs) -> tuple[np.ndarray, float]:
    (inputs.folder / "out.parquet").unlink(missing_ok=True)  # a finished prediction would not be repeated
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, how, str(inputs.folder)], capture_output=True, text=True, check=True
    )
    return np.load(inputs.folder / f"{how}.npy"), float(json.loads(done.stdout))


RIVALS = {
    "everything at once": lambda inputs: _in_a_process("whole", inputs),
    "ours": lambda inputs: _in_a_process("ours", inputs),
}


def check(out):
    assert np.allclose(out["ours"][0], out[BASELINE][0], atol=1e-3)


def price(out):
    return {f"MiB more, {name}": round(memory, 1) for name, (_, memory) in out.items()}

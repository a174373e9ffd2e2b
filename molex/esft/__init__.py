"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): adapters that replace a few experts of a mixture-of-experts
model, found by what a task's tokens are routed to.

    selection = molex.esft.select(model, batches, score="token")
    tuning = molex.esft.tune(model, selection);  ...  tuning.save("law/");  tuning.revert()
    tuning = molex.esft.load(model, "law/")
"""

from molex.esft.layers import ExpertWeights, find_layers
from molex.esft.selecting import Selection, choose, select
from molex.esft.training import Tuning, load, tune

__all__ = ["ExpertWeights", "Selection", "Tuning", "choose", "find_layers", "load", "select", "tune"]

"""Regression on a table: scikit-learn's diabetes data, a network of its own width, judged by the mean absolute error.

tune-amp search examples/tabular.yaml --task examples.tabular:Diabetes
"""

import numpy as np
from sklearn.datasets import load_diabetes
from torch import nn

import tune_amp


class Diabetes(tune_amp.Task):
    metric = ("mae", "min")

    def data(self):
        table, progression = load_diabetes(return_X_y=True)
        inputs, targets = (table * 20).astype(np.float32), progression[:, None].astype(np.float32) / 100
        order = np.random.RandomState(0).permutation(len(inputs))
        parts = order[:300], order[300:370], order[370:]
        return tuple((inputs[part], targets[part]) for part in parts)

    def model(self, width, dropout):
        return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 1))

    def loss(self, model, batch):
        inputs, targets = batch
        return nn.functional.smooth_l1_loss(model(inputs), targets)

    def score(self, model, batch):
        inputs, targets = batch
        return {"mae": (model(inputs) - targets).abs().sum()}

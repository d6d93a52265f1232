"""The loop of PyTorch's tutorial on automatic mixed precision; the two lines that make scaler and autocast are ours.

    tune-amp search examples/amp_tutorial.yaml --train examples.amp_tutorial:train --objective val_loss

https://docs.pytorch.org/tutorials/recipes/recipes/amp_recipe.html
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

IMAGES, LABELS = torch.from_numpy(load_digits().data).float() / 16, torch.from_numpy(load_digits().target)
TRAIN, VALIDATION, TEST = torch.utils.data.random_split(
    TensorDataset(IMAGES, LABELS), [1297, 250, 250], generator=torch.Generator().manual_seed(0)
)


def make_model(in_size, out_size, num_layers):
    layers = []
    for _ in range(num_layers - 1):
        layers.append(torch.nn.Linear(in_size, in_size))
        layers.append(torch.nn.ReLU())
    layers.append(torch.nn.Linear(in_size, out_size))
    return torch.nn.Sequential(*tuple(layers))


def evaluate(net, loss_fn, examples, device):
    with torch.no_grad():
        input, target = examples[:]
        return loss_fn(net(input.to(device)), target.to(device))


def train(trial):
    net = make_model(64, 10, trial.own["num_layers"]).to(trial.device)
    loss_fn = torch.nn.CrossEntropyLoss()
    opt = torch.optim.SGD(net.parameters(), lr=trial.lr)
    scaler = trial.scaler  # torch.amp.GradScaler("cuda") in the tutorial
    trial.keep(net=net, opt=opt)
    for _ in trial.epochs():
        for input, target in DataLoader(TRAIN, batch_size=trial.batch_size, shuffle=True):
            with trial.autocast():  # torch.autocast(device_type="cuda", dtype=torch.float16) in the tutorial
                output = net(input.to(trial.device))
                loss = loss_fn(output, target.to(trial.device))
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
        metrics = {"train_loss": loss, "val_loss": evaluate(net, loss_fn, VALIDATION, trial.device)}
        if trial.confirming:
            metrics["test_loss"] = evaluate(net, loss_fn, TEST, trial.device)
        yield metrics

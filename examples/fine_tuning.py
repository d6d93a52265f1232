"""Fine-tuning of a torchvision network: only the last block and the classifier are trained, channels last.

Its weights are random here, so that nothing is downloaded: ``resnet18(weights="DEFAULT")`` fetches ImageNet's.

    tune-amp search examples/fine_tuning.yaml --train examples.fine_tuning:train --objective val_accuracy
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

IMAGES = nn.functional.interpolate(torch.from_numpy(load_digits().images).float()[:, None] / 16, size=32)
EXAMPLES = TensorDataset(IMAGES.expand(-1, 3, -1, -1), torch.from_numpy(load_digits().target))
TRAIN, VALIDATION, TEST = torch.utils.data.random_split(
    EXAMPLES, [600, 300, 897], generator=torch.Generator().manual_seed(0)
)


def measure(model, examples, device):
    model.eval()
    with torch.inference_mode():
        right = [(model(x.to(device)).argmax(1).cpu() == y) for x, y in DataLoader(examples, batch_size=300)]
    return torch.cat(right).float().mean()


def train(trial):
    model = resnet18(weights=None)
    model.requires_grad_(False)
    model.layer4.requires_grad_(True)
    model.fc = nn.Sequential(nn.Dropout(trial.own["dropout"]), nn.Linear(512, 10))
    model = model.to(trial.device, memory_format=torch.channels_last)
    groups = [
        {"params": model.layer4.parameters(), "lr": trial.lr * trial.own["backbone_lr"]},
        {"params": model.fc.parameters()},
    ]
    optimizer = torch.optim.AdamW(groups, lr=trial.lr)
    trial.keep(model=model, optimizer=optimizer)
    for _ in trial.epochs():
        model.train()
        for x, y in DataLoader(TRAIN, batch_size=trial.batch_size, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            with trial.autocast():
                outputs = model(x.to(trial.device, memory_format=torch.channels_last))
                loss = nn.functional.cross_entropy(outputs, y.to(trial.device))
            trial.scaler.scale(loss).backward()
            trial.scaler.step(optimizer)
            trial.scaler.update()
        metrics = {"train_loss": loss, "val_accuracy": measure(model, VALIDATION, trial.device)}
        if trial.confirming:
            metrics["test_accuracy"] = measure(model, TEST, trial.device)
        yield metrics

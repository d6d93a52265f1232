"""The program that one writes from Ray Tune's and PyTorch's documentation: on purpose, it uses nothing of ours.

``python -m benchmarks.search_speed.obvious --plan PLAN.json --data-dir DIR --output DIR`` trains the configurations
of a plan, in order, each for its number of epochs. Optuna is given them to begin with, and ASHA's grace period is an
epoch longer than any trial: both do their work, and decide nothing. Each trial leaves a line in ``trials.jsonl``.

Where its lines are from: function trainable, ``OptunaSearch`` and ``ASHAScheduler`` as in Ray Tune's guides;
transforms, and on CUDA a worker and pinned memory for each loader, as in PyTorch's MNIST example
(https://github.com/pytorch/examples/blob/main/mnist/main.py); the loop with ``loss.item()`` at every step as in its
"Training a Classifier", with autocast and ``GradScaler`` as in its AMP recipe. That the workers live on between epochs
is ours, in the program's favour.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from torch import nn
from torch.utils.data import DataLoader, random_split
from torchvision import datasets, transforms  # type: ignore[import-untyped]

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


class SimpleNet(nn.Module):
    """784-256-10, as ``simple_net``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 256)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, 10] of images [n, 1, 28, 28]."""
        x = torch.flatten(x, 1)
        x = torch.relu(self.fc1(x))
        return self.fc2(x)  # type: ignore[no-any-return]


def loader_options(device: str) -> dict[str, Any]:
    """What the example gives its loaders where there is a GPU."""
    return {"num_workers": 1, "pin_memory": True, "persistent_workers": True} if device == "cuda" else {}


def load_data(data_dir: str, batch_size: int, device: str) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation images, one in twelve for validation."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    images = datasets.MNIST(data_dir, train=True, transform=transform)
    validation_size = len(images) // 12
    split = torch.Generator().manual_seed(0)
    train, validation = random_split(images, [len(images) - validation_size, validation_size], generator=split)
    options = {"batch_size": batch_size, **loader_options(device)}
    return DataLoader(train, shuffle=True, **options), DataLoader(validation, **options)


def train_mnist(config: dict[str, Any], precision: str, data_dir: str, output: str) -> None:
    """One trial."""
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train_loader, validation_loader = load_data(data_dir, config["batch_size"], device)
    model = SimpleNet().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    fp16 = precision == "fp16"
    scaler_settings = {"init_scale": config["init_scale"], "growth_interval": config["growth_interval"]} if fp16 else {}
    scaler = torch.amp.GradScaler(device, enabled=fp16, **scaler_settings)

    def autocast() -> torch.autocast:
        return torch.autocast(device, AUTOCAST.get(precision), enabled=precision in AUTOCAST)

    first_step = time.time()
    train_seconds = 0.0
    accuracies = []
    for _ in range(config["epochs"]):
        epoch_started = time.time()
        model.train()
        total_loss = 0.0
        for images, labels in train_loader:
            images, labels = images.to(device), labels.to(device)  # noqa: PLW2901
            optimizer.zero_grad()
            with autocast():
                loss = criterion(model(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total_loss += loss.item()
        train_seconds += time.time() - epoch_started

        model.eval()
        correct = total = 0
        with torch.no_grad():
            for images, labels in validation_loader:
                images, labels = images.to(device), labels.to(device)  # noqa: PLW2901
                with autocast():
                    predicted = model(images).argmax(dim=1)
                correct += (predicted == labels).sum().item()
                total += len(labels)
        accuracies.append(correct / total)
        tune.report({"train_loss": total_loss / len(train_loader), "val_accuracy": accuracies[-1]})

    times = {"started": started, "first_step": first_step, "ended": time.time(), "train_seconds": train_seconds}
    with (Path(output) / "trials.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"config": config, "val_accuracies": accuracies, **times}) + "\n")


def main() -> None:
    """Run the search of a plan."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_speed.obvious")
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="torchvision's: it holds MNIST/raw")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    plan = json.loads(arguments.plan.read_text(encoding="utf-8"))
    output = arguments.output.resolve()

    space = {
        "lr": tune.loguniform(1e-4, 3e-2),
        "batch_size": tune.choice([64, 128, 256, 512, 1024]),
        "epochs": tune.randint(1, plan["max_epochs"] + 1),
    }
    if plan["precision"] == "fp16":
        space["init_scale"] = tune.choice([2.0**exponent for exponent in range(25)])
        space["growth_interval"] = tune.lograndint(1, 10_000)

    trainable = tune.with_parameters(
        train_mnist, precision=plan["precision"], data_dir=str(arguments.data_dir.resolve()), output=str(output)
    )
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, "gpu": plan["gpus_per_trial"]}),
        param_space=space,
        tune_config=tune.TuneConfig(
            metric="val_accuracy",
            mode="max",
            num_samples=len(plan["configs"]),
            max_concurrent_trials=plan["slots"],
            search_alg=OptunaSearch(points_to_evaluate=plan["configs"]),
            # A rung at the last epoch would end a trial inside its last report.
            scheduler=ASHAScheduler(max_t=plan["max_epochs"] + 1, grace_period=plan["max_epochs"] + 1),
        ),
        run_config=tune.RunConfig(name="obvious", storage_path=str(output)),
    )
    tuner.fit()


if __name__ == "__main__":
    main()

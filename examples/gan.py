"""A GAN on scikit-learn's digits: two networks and two optimizers share one loss scaler.

tune-amp search examples/gan.yaml --train examples.gan:train --objective val_distance --mode min
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

DIGITS = torch.from_numpy(load_digits().data).float() / 8 - 1  # [1797, 64], from -1 to 1
TRAIN, VALIDATION, TEST = DIGITS.split([1297, 250, 250])
NOISE = 16


def build(inputs, outputs, width, last):
    return nn.Sequential(nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, outputs), last)


def distance(fake, real):
    """Energy distance of two sets of images: 0 if they have the same distribution."""
    return 2 * torch.cdist(fake, real).mean() - torch.cdist(fake, fake).mean() - torch.cdist(real, real).mean()


def train(trial):
    generator = build(NOISE, 64, trial.own["width"], nn.Tanh()).to(trial.device)
    critic = build(64, 1, trial.own["width"], nn.Identity()).to(trial.device)
    for_generator = torch.optim.Adam(generator.parameters(), lr=trial.lr, betas=(0.5, 0.999))
    for_critic = torch.optim.Adam(critic.parameters(), lr=trial.lr * trial.own["critic_lr"], betas=(0.5, 0.999))
    trial.keep(generator=generator, critic=critic, for_generator=for_generator, for_critic=for_critic)
    judge = nn.BCEWithLogitsLoss()
    for _ in trial.epochs():
        for batch in torch.randperm(len(TRAIN)).split(trial.batch_size):
            real = TRAIN[batch].to(trial.device)
            noise = torch.randn(len(real), NOISE, device=trial.device)
            yes, no = torch.ones(len(real), 1, device=trial.device), torch.zeros(len(real), 1, device=trial.device)
            for_critic.zero_grad()
            with trial.autocast():
                fake = generator(noise)
                critic_loss = judge(critic(real), yes) + judge(critic(fake.detach()), no)
            trial.scaler.scale(critic_loss).backward()
            trial.scaler.step(for_critic)
            for_generator.zero_grad()
            with trial.autocast():
                generator_loss = judge(critic(fake), yes)
            trial.scaler.scale(generator_loss).backward()
            trial.scaler.step(for_generator)
            trial.scaler.update()
        with torch.no_grad():
            fake = generator(torch.randn(250, NOISE, device=trial.device)).float()
        metrics = {"train_loss": generator_loss, "val_distance": distance(fake, VALIDATION.to(trial.device))}
        if trial.confirming:
            metrics["test_distance"] = distance(fake, TEST.to(trial.device))
        yield metrics

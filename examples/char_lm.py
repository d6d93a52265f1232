"""A language model of characters: a transformer with a warm-up schedule and clipped gradients, in a loop of its own.

tune-amp search examples/char_lm.yaml --train examples.char_lm:train --objective val_loss
"""

import inspect

import torch
from torch import nn

LENGTH, WIDTH, STEPS = 32, 32, 30
TEXT = torch.frombuffer(bytearray(inspect.getsource(inspect).encode()), dtype=torch.uint8).long() % 128
PARTS = dict(zip(("train", "val", "test"), TEXT.split(len(TEXT) // 3 + 1), strict=True))


class Model(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.token, self.place = nn.Embedding(128, WIDTH), nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=tokens.device)
        return self.head(self.blocks(self.token(tokens) + self.place, mask, is_causal=True))


def draw(part, count, generator, device):
    starts = torch.randint(len(part) - LENGTH - 1, (count, 1), generator=generator)
    return part[starts + torch.arange(LENGTH + 1)].to(device)


def measure(model, text):
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def train(trial):
    model = Model(trial.own["dropout"]).to(trial.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.lr, weight_decay=trial.config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, trial.lr, total_steps=trial.max_epochs * STEPS)
    order = torch.Generator().manual_seed(trial.seed)
    trial.keep(model=model, optimizer=optimizer, schedule=schedule, order=order)
    for _ in trial.epochs():
        model.train()
        for _ in range(STEPS):
            optimizer.zero_grad()
            with trial.autocast():
                loss = measure(model, draw(PARTS["train"], trial.batch_size, order, trial.device))
            trial.scaler.scale(loss).backward()
            trial.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            trial.scaler.step(optimizer)
            trial.scaler.update()
            schedule.step()
        model.eval()
        fixed, names = torch.Generator().manual_seed(0), ("val", "test")[: 1 + trial.confirming]
        with torch.no_grad():
            losses = {f"{name}_loss": measure(model, draw(PARTS[name], 256, fixed, trial.device)) for name in names}
        yield {"train_loss": loss, **losses}

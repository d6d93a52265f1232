"""Uses of a winner: train it for use, replay its trial, compare precisions on it, describe it in a card."""

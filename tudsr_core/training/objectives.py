"""The two losses of adversarial training as sums of named terms (TUDSR sec. 3.2).

L_G = 5 edge-aware DISTS + 0.5 L_gen + 0.5 MAE, L_D = 0.5 (L_real + L_fake), with soft labels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import Discriminator, load_features
from .augment import draw_augment
from .config import TrainingConfig
from .losses import Dists, edge_aware_dists, mean_absolute_error, read_balance, soft_label_loss
from .networks import frozen
from .stages import FAKE, FAKE_SEEN_BY_GENERATOR, REAL, Chunk

Terms = dict[str, Tensor]


def build_dists(config: TrainingConfig) -> Dists | None:
    """Return DISTS with its extractor, or None where it has no weight in the loss."""
    loss = config.loss
    if not loss.dists:
        return None
    balance = read_balance(loss.dists_balance) if loss.dists_balance else None
    return Dists(load_features(loss.dists_features, loss.dists_weights), balance)


def build_critic(config: TrainingConfig) -> Discriminator | None:
    """Return the discriminator, its heads fresh from the seed, or None where it has no weight in the loss."""
    if not config.loss.adversarial:
        return None
    features = load_features(config.discriminator.features, config.discriminator.weights)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        return Discriminator(features, config.data.size)


class Objectives:
    """Both losses of one run; pictures are `B 3 R R` in 0..1, terms come weighted."""

    def __init__(self, config: TrainingConfig, dists: nn.Module | None) -> None:
        self.config, self.dists = config, dists

    def of_generator(self, made: Tensor, chunk: Chunk, critic: nn.Module | None) -> Terms:
        """Return the terms of L_G. No gradient is left on `critic`, which must be the module itself, unwrapped."""
        weights, terms = self.config.loss, {}
        if weights.mae:
            terms["mae"] = weights.mae * mean_absolute_error(made, chunk.sharp)
        if self.dists is not None:
            distance = edge_aware_dists(self.dists, made, chunk.sharp, weights.edge_colors)
            terms["dists"] = weights.dists * distance
        if critic is not None:
            with frozen(critic):
                logits = critic(self._seen(made, chunk, FAKE_SEEN_BY_GENERATOR))
            terms["adversarial"] = weights.adversarial * soft_label_loss(logits, self.config.discriminator.real_label)
        return terms

    def of_critic(self, made: Tensor, chunk: Chunk, critic: nn.Module) -> Terms:
        """Return the terms of L_D. No gradient reaches what has made the pictures."""
        labels = self.config.discriminator
        fake = critic(self._seen(made.detach(), chunk, FAKE))
        real = critic(self._seen(chunk.sharp, chunk, REAL))
        return {
            "critic_fake": 0.5 * soft_label_loss(fake, labels.fake_label),
            "critic_real": 0.5 * soft_label_loss(real, labels.real_label),
        }

    def _seen(self, pictures: Tensor, chunk: Chunk, use: int) -> Tensor:
        """Return pictures in -1..1, each augmented by draws of its own."""
        pictures = pictures * 2 - 1
        if not self.config.discriminator.augment:
            return pictures
        draws = chunk.draws(self.config.seed, use)
        size = tuple(pictures.shape[-2:])
        parts = zip(pictures.split(1), draws, strict=True)
        return torch.cat([draw_augment(1, size, rng)(one) for one, rng in parts])

"""A character language model that trains in seconds: plain, as the other models of the recipes."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from groundwire.recipes.models import CrossEntropyModule, LRSchedulerCallable, OptimizerCallable, Schedule, adam


class CausalSelfAttention(nn.Module):
    """Every position attends to itself and to those before it.

    Written out with a softmax, so that it can be differentiated twice and per sample.

    Args:
        width: Features of a position.
        num_heads: Heads, each of ``width / num_heads`` features.

    Raises:
        ValueError: If ``num_heads`` does not divide ``width``.

    Reference:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, Section 3.2. arXiv:1706.03762

    Example:
        >>> CausalSelfAttention(8, num_heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or width % num_heads:
            raise ValueError(f"`num_heads` must divide `width`, got {num_heads} heads for width={width}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, T, width)`` to the same shape."""
        length = x.shape[-2]
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for part in self.qkv(x).chunk(3, dim=-1))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(future, -math.inf).softmax(dim=-1) @ v
        attended: Tensor = self.out(mixed.transpose(-3, -2).flatten(-2))
        return attended


class TransformerBlock(nn.Module):
    """Attention, then a GELU network four times as wide, each normalised before and added to its input.

    Args:
        width: Features of a position.
        num_heads: Heads of the attention.

    Raises:
        ValueError: If ``num_heads`` does not divide ``width``.

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, Section 2.3.

    Example:
        >>> TransformerBlock(8, num_heads=2)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Features ``(B, T, width)`` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class TinyTransformer(CrossEntropyModule):
    """A decoder-only transformer that predicts the next token: 111,416 parameters as it is, without dropout.

    Token and learned position embeddings, blocks with the normalisation before each part, a last normalisation and a
    head of its own. With V tokens, T positions, width w and L blocks it has ``L (12 w^2 + 13 w) + 2 V w + V + T w + 2 w``
    parameters. The defaults fit :class:`groundwire.datamodules.DatasetDescriptions`.

    Batches are ``(x, y)``, both int64 of shape ``(B, T)``. Losses are nats and accuracies fractions, per token; see
    :class:`~groundwire.recipes.CrossEntropyModule`.

    Args:
        vocab_size: Number of tokens; they are 0 to ``vocab_size - 1``.
        seq_len: Longest sequence; shorter ones are fine.
        width: Features of a position.
        num_layers: Blocks.
        num_heads: Heads of the attention; they divide ``width``.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

    Raises:
        ValueError: If an argument is out of range; in ``forward``, if a sequence is too long, or (on the CPU, where the
            look-up says so) a token is out of range.
        MisconfigurationException: At setup, if the datamodule has more tokens or longer sequences, on any device.

    Reference:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, Section 2.3, with a head that is
        not tied to the embedding.

    Example:
        >>> model = TinyTransformer()
        >>> sum(p.numel() for p in model.parameters())
        111416
        >>> model(torch.zeros(2, 10, dtype=torch.int64)).shape
        torch.Size([2, 10, 56])
    """

    def __init__(
        self,
        vocab_size: int = 56,
        seq_len: int = 64,
        width: int = 64,
        num_layers: int = 2,
        num_heads: int = 4,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "width": width, "num_layers": num_layers}
        smallest = {"vocab_size": 2}  # of one token there is nothing to learn
        for name, value in sizes.items():
            if value < smallest.get(name, 1):
                raise ValueError(f"`{name}` must be at least {smallest.get(name, 1)}, got {value}.")
        super().__init__(vocab_size, optimizer, lr_scheduler, schedule)
        self.vocab_size = vocab_size
        self.seq_len = seq_len
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(seq_len, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def setup(self, stage: str) -> None:
        """Compare the sizes with those of the datamodule, where it tells them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        while not hasattr(data, "vocab_size") and hasattr(data, "datamodule"):  # wrapped, as by ForgetRetain
            data = data.datamodule
        for name in ("vocab_size", "seq_len"):
            ours, theirs = getattr(self, name), getattr(data, name, None)
            if isinstance(theirs, int) and theirs > ours:
                raise MisconfigurationException(
                    f"{type(data).__name__} has {name}={theirs}, and this {type(self).__name__} has {name}={ours}: "
                    f"build the model with {name}={theirs}."
                )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, T)``, int64, to the logits of the next token at each position, ``(B, T, vocab_size)``."""
        if x.ndim != 2 or x.dtype != torch.int64:
            raise ValueError(f"Tokens must be int64 of shape (B, T), got {x.dtype} of shape {tuple(x.shape)}.")
        if x.shape[1] > self.seq_len:
            raise ValueError(
                f"Sequences of {x.shape[1]} tokens are longer than seq_len={self.seq_len}: build the model with "
                f"seq_len={x.shape[1]}, or cut the sequences."
            )
        # one row of positions for each sequence: the first dimension is that of the samples in every layer
        positions = torch.arange(x.shape[1], device=x.device).expand_as(x)
        features = self._look_up(x) + self.positions(positions)
        logits: Tensor = self.head(self.norm(self.blocks(features)))
        return logits

    def _look_up(self, x: Tensor) -> Tensor:
        try:
            found: Tensor = self.tokens(x)
        except IndexError as error:  # no comparison beforehand: it would cost a synchronisation, and vmap refuses it
            raise ValueError(
                f"A token is outside [0, {self.vocab_size}): build the model with `vocab_size` at least the largest "
                "token + 1 (DatasetDescriptions has it as `vocab_size`)."
            ) from error
        return found

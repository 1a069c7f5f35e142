"""CMI, Gamma and NCMI as a metric that streams."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from groundwire.callbacks.checks import check_logits
from groundwire.callbacks.information.functional import Q_MIN, Separation, log_probs
from groundwire.callbacks.logits import as_rows, check_values

_CHUNK = 1 << 16  # numbers worked on at a time on a CPU: what comes between stays in the cache
_LARGE = 4096  # classes from which a matrix of C x C float64 is worth a question


class NormalizedCMI(Metric):
    """Conditional mutual information, separation and their ratio over a whole data set, exactly, batch by batch.

    It keeps the sums of ``p`` and of ``log p`` of each class, ``O(C^2)`` numbers, and takes ``O(B C)`` work a batch: the
    result does not depend on how the data is split into batches or processes. CMI, Gamma and NCMI never look at whether
    class ``c`` is predicted as ``c``, hence the accuracy among the results; and NCMI falls with over-confidence alone:
    compare models at a stated temperature.

    ``compute`` gives a dict:

    * ``cmi``: ``I(X; Y_hat | Y)``; ``cmi_per_class``: shape ``(C,)``, NaN for classes without a sample,
    * ``gamma``: separation; ``ncmi``: ``cmi / gamma``,
    * ``h_yhat_given_y``: entropy of the prediction within the classes, an upper bound of ``cmi``,
    * ``accuracy``: share of samples whose most likely output is the label; ``recall_per_class``: of each class,
    * ``n``: samples.

    Args:
        num_classes: Classes ``C``.
        from_probs: Update takes probabilities instead of logits.
        binary: Update takes one logit for two classes.
        flatten: Update takes outputs ``(B, C, ...)`` and labels ``(B, ...)``.
        ignore_index: Samples of this label are left out.
        temperature: Outputs are ``softmax(logits / temperature)``.
        separation: ``"ce"`` for cross entropy between outputs of different classes, ``"kl"`` for divergence, None to
            leave it out, which halves the memory.
        estimator: ``"plugin"``, biased low for few samples a class; or ``"bessel"``, which multiplies each class by
            ``n_c / (n_c - 1)`` and leaves out classes with one sample.
        log_base: ``"e"`` for nats, ``"2"`` for bits.
        strict: Raise, instead of giving NaN, where there are fewer than two classes.
        validate_args: Check the values of every batch; waits for an accelerator.
        allow_large: Allow more than 4,096 classes with separation: ``2 C^2`` numbers of 8 bytes.
        accumulate: Floating dtype of the sums; float32 for devices without float64.
        **kwargs: Of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is out of range, or a batch does not fit.
        RuntimeError: If a batch holds logits that are NaN or infinite.

    Example:
        >>> metric = NormalizedCMI(num_classes=2)
        >>> metric.update(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0, 1]))
        >>> {name: round(float(metric.compute()[name]), 4) for name in ("cmi", "gamma", "ncmi", "accuracy")}
        {'cmi': 0.0122, 'gamma': 0.7289, 'ncmi': 0.0167, 'accuracy': 1.0}

    Reference:
        Yang, Mohajer Hamidi, Ye, Tan, Yang, "Conditional Mutual Information Constrained Deep Learning for
        Classification", 2023. arXiv:2309.09123
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    p_sums: Tensor
    log_sums: Tensor
    count: Tensor
    neg_entropy: Tensor
    correct: Tensor

    def __init__(
        self,
        num_classes: int,
        from_probs: bool = False,
        binary: bool = False,
        flatten: bool = False,
        ignore_index: int | None = None,
        temperature: float = 1.0,
        separation: Separation | None = "ce",
        estimator: Literal["plugin", "bessel"] = "plugin",
        log_base: Literal["e", "2"] = "e",
        strict: bool = False,
        validate_args: bool = True,
        allow_large: bool = False,
        accumulate: torch.dtype = torch.float64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(
                f"CMI needs at least 2 classes, got num_classes={num_classes}; for one-logit binary heads pass "
                "num_classes=2 and binary=True."
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"`temperature` must be positive, got {temperature}.")
        for name, value, allowed in (
            ("separation", separation, ("ce", "kl", None)),
            ("estimator", estimator, ("plugin", "bessel")),
            ("log_base", log_base, ("e", "2")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}.")
        if num_classes > _LARGE and separation is not None and not allow_large:
            raise ValueError(
                f"{num_classes} classes take {2 * 8 * num_classes**2 / 1e9:.1f} GB of sums. Pass separation=None, which "
                "halves that and gives CMI alone, or allow_large=True."
            )
        self.num_classes = num_classes
        self.from_probs = from_probs
        self.binary = binary
        self.flatten = flatten
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.separation = separation
        self.estimator = estimator
        self.log_base = log_base
        self.strict = strict
        self.validate_args = validate_args
        self._has_warned = False
        square = (num_classes, num_classes)
        self.add_state("p_sums", torch.zeros(square, dtype=accumulate), dist_reduce_fx="sum")
        if separation is not None:
            self.add_state("log_sums", torch.zeros(square, dtype=accumulate), dist_reduce_fx="sum")
        for name in ("count", "neg_entropy", "correct"):
            self.add_state(name, torch.zeros(num_classes, dtype=accumulate), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: Shape ``(B, C)`` (see the options for other forms).
            target: Labels, shape ``(B,)``, int64.

        Raises:
            ValueError: If they do not fit together or to ``num_classes``.
            RuntimeError: If a logit is NaN or infinite.
        """
        if self.from_probs and not self._has_warned and (zeros := int((logits == 0).sum())):
            self._has_warned = True
            rank_zero_warn(f"{zeros} probabilities are exactly 0 and are clamped, or Gamma would be infinite.")
        if self.from_probs and logits.is_floating_point():  # in float16, Q_MIN would be 0
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).clamp_min(Q_MIN)
        logits, target = as_rows(logits, target, from_probs=self.from_probs, binary=self.binary, flatten=self.flatten)
        if self.ignore_index is not None:
            kept = target != self.ignore_index
            logits, target = logits[kept], target[kept]
        found = check_logits(logits, target)
        if found != self.num_classes:
            raise ValueError(f"NormalizedCMI(num_classes={self.num_classes}) got logits with {found} columns.")
        if self.validate_args:
            check_values(logits, target, warn=not (self.from_probs or self._has_warned))
            self._has_warned |= not self.from_probs
        rows = max(1, _CHUNK // self.num_classes if logits.device.type == "cpu" else len(logits))
        for part, labels in zip(torch.split(logits, rows), torch.split(target, rows), strict=True):
            self._add(part, labels)

    def _add(self, logits: Tensor, target: Tensor) -> None:
        log_p = log_probs(logits, 1.0 if self.temperature == 1.0 else 1 / self.temperature)
        p, dtype = log_p.exp(), self.p_sums.dtype
        self.p_sums.index_add_(0, target, p.to(dtype))
        if self.separation is not None:
            self.log_sums.index_add_(0, target, log_p.to(dtype))
        self.neg_entropy.index_add_(0, target, (p * log_p).sum(dim=1).to(dtype))
        self.correct.index_add_(0, target, (logits.argmax(dim=1) == target).to(dtype))
        self.count.index_add_(0, target, torch.ones_like(target, dtype=dtype))

    def compute(self) -> dict[str, Tensor]:
        """The results; see the class.

        Raises:
            ValueError: With ``strict``, if there are fewer than two classes in the data.
        """
        n = self.count.sum()
        present = self.count > 0
        if self.separation is not None and int(present.sum()) < 2:
            seen = ", ".join(map(str, present.nonzero().flatten().tolist())) or "none"
            message = f"NCMI needs at least two classes in the data, saw {seen}."
            if self.strict:
                raise ValueError(message)
            rank_zero_warn(message)
        centroids = self.centroids
        entropy = -torch.special.xlogy(centroids, centroids).sum(dim=1)
        per_class = (entropy + self.neg_entropy / self.count).clamp_min(0.0)  # rounding may leave it just below
        usable = present
        if self.estimator == "bessel":
            usable = self.count > 1
            if bool((self.count == 1).any()):
                rank_zero_warn("Classes with a single sample say nothing about their spread and are left out.")
            per_class = torch.where(usable, per_class * self.count / (self.count - 1), torch.nan)
        share = self.count / n
        cmi = (share * per_class)[usable].sum() / share[usable].sum()  # NaN where a NaN came in unchecked
        unit = math.log(2) if self.log_base == "2" else 1.0
        result = {
            "cmi": cmi / unit,
            "cmi_per_class": per_class / unit,
            "h_yhat_given_y": (share * entropy)[present].sum() / unit,
            "accuracy": self.correct.sum() / n,
            "recall_per_class": self.correct / self.count,
            "n": n,
        }
        if self.separation is not None:
            pairs = (self.p_sums * self.log_sums).sum() - self.p_sums.sum(dim=0) @ self.log_sums.sum(dim=0)
            if self.separation == "kl":
                pairs = pairs + ((n - self.count) * self.neg_entropy).sum()
            gamma = pairs / n**2
            several = present.sum() > 1
            result |= {"gamma": gamma / unit, "ncmi": torch.where(several, cmi / gamma, torch.nan)}
        return result

    @property
    def centroids(self) -> Tensor:
        """Mean output distribution of each class so far, shape ``(C, C)``; NaN for classes without a sample."""
        return self.p_sums / self.count[:, None]

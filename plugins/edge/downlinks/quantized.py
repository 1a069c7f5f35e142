"""LFL, and the baselines that quantise the model itself: LGM and LTGM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from groundwire.plugins.compression import Compressor, Message
from groundwire.plugins.compression.functional import hadamard_transform, next_power_of_two
from groundwire.plugins.edge.downlink import Downlink
from groundwire.plugins.edge.downlinks.estimates import Estimates, relative_error, server_key
from groundwire.plugins.edge.round import Round
from groundwire.plugins.ledger import Cost


class QuantizedDownlink(Downlink, ABC):
    """One compressed message to all devices over an error-free link: they all hold the same estimate of the model.

    Args:
        compressor: What compresses it; None sends the model as it is.
        server_base: What the server adds the devices' updates to: ``"estimate"``, the model at which they were computed,
            or its own ``"model"``.

    Raises:
        ValueError: If ``server_base`` is neither.
    """

    def __init__(self, compressor: Compressor | None, server_base: Literal["estimate", "model"] = "estimate") -> None:
        super().__init__()
        if server_base not in ("estimate", "model"):
            raise ValueError(f"`server_base` must be 'estimate' or 'model', got {server_base!r}.")
        self.compressor = compressor
        self.server_base = server_base
        self._cost = Cost()
        self._error: Tensor | None = None

    @property
    def exact(self) -> bool:  # type: ignore[override]
        """Whether nothing is compressed."""
        return self.compressor is None

    @property
    def moves_server(self) -> bool:  # type: ignore[override]
        """Whether the server goes on from the estimate."""
        return self.server_base == "estimate"

    @override
    def setup(self, *, numel: int, num_devices: int) -> None:
        if self.compressor is not None:
            self.compressor.reset_state()
            self.compressor.setup({"downlink": torch.Size((self._length(numel),))})

    @override
    def forward(self, model: Tensor, round: Round) -> Tensor:
        """What all devices hold, shape ``(d,)``."""
        if self.compressor is None:
            return model
        estimate, message = self._send(self.compressor, model, round)
        self._cost = Cost(bits=message.bits_wire, bits_ideal=message.bits_ideal)
        self._error = relative_error(estimate, model)
        return estimate

    @abstractmethod
    def _send(self, compressor: Compressor, model: Tensor, round: Round) -> tuple[Tensor, Message]:
        """The devices' new estimate ``(d,)``, and the message that made it."""

    def _length(self, numel: int) -> int:
        """Entries that are compressed."""
        return numel

    @override
    def cost(self, numel: int, round: Round) -> Cost:
        """One broadcast of the message; of a model as it is, 32 bits a parameter."""
        return Cost(bits=32 * numel, bits_ideal=32 * numel) if self.exact else self._cost

    @override
    def metrics(self, round: Round) -> Mapping[str, Tensor | float]:
        """How far the devices' model is from the server's, relative to its norm."""
        return {"downlink/model_error": 0.0 if self._error is None else self._error}


class LFL(QuantizedDownlink):
    """Lossy federated learning: the server quantises how its model differs from what the devices hold.

    All devices listen in every round, those that do not take part as well, so that they share one estimate of the model;
    the first is the model of the first round, which a shared seed gives them. With ``server_base="estimate"`` what the
    quantiser loses is forgotten; with ``"model"`` the server keeps it, and sends it with the next difference.

    The paper's uplink is ``Digital(ErrorFeedback(LFLQuantizer(q)))``, and its devices take several local steps.

    Args:
        compressor: What compresses the difference; the paper's is :class:`LFLQuantizer`. None sends the model as it is.
        server_base: As in :class:`QuantizedDownlink`.

    Raises:
        ValueError: If ``server_base`` is unknown.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, "Federated Learning With Quantized Global Model Updates", 2020.
        arXiv:2006.10672; the choice of ``server_base`` is ours.

    Example:
        >>> from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
        >>> downlink = LFL(LFLQuantizer(num_levels=2))
    """

    def __init__(self, compressor: Compressor | None, server_base: Literal["estimate", "model"] = "estimate") -> None:
        super().__init__(compressor, server_base)
        self.estimates = Estimates()

    @override
    def setup(self, *, numel: int, num_devices: int) -> None:
        super().setup(numel=numel, num_devices=num_devices)
        self.estimates.reset_state()

    @override
    def _send(self, compressor: Compressor, model: Tensor, round: Round) -> tuple[Tensor, Message]:
        estimate = self.estimates.of(model)
        message = compressor.roundtrip((model - estimate).unsqueeze(0), server_key(round))
        return estimate.add_(message.values[0]), message


class LGM(QuantizedDownlink):
    """Lossy global model: the server quantises its model, a baseline of :class:`LFL`.

    Args:
        compressor: What compresses the model. None sends it as it is.
        server_base: As in :class:`QuantizedDownlink`.

    Raises:
        ValueError: If ``server_base`` is unknown.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, arXiv:2006.10672, who compare with it.

    Example:
        >>> from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
        >>> downlink = LGM(LFLQuantizer(num_levels=2))
    """

    @override
    def _send(self, compressor: Compressor, model: Tensor, round: Round) -> tuple[Tensor, Message]:
        message = compressor.roundtrip(model.unsqueeze(0), server_key(round))
        return message.values[0], message


class LTGM(QuantizedDownlink):
    """Lossy transformed global model: the server quantises a random rotation of its model, a baseline of :class:`LFL`.

    The rotation is a Walsh-Hadamard transform after random signs, drawn anew in every round from a shared seed; zeros
    fill the model up to a power of two. It spreads large entries, which cost the quantiser its resolution.

    Args:
        compressor: What compresses the rotated model. None sends the model as it is.
        server_base: As in :class:`QuantizedDownlink`.

    Raises:
        ValueError: If ``server_base`` is unknown.

    Reference:
        Mohammadi Amiri, Gündüz, Kulkarni, Poor, arXiv:2006.10672, who compare with it; this rotation is that of Suresh,
        Yu, Kumar, McMahan, "Distributed Mean Estimation with Limited Communication", ICML 2017. arXiv:1611.00429

    Example:
        >>> from groundwire.plugins.compression.lfl_quantizer import LFLQuantizer
        >>> downlink = LTGM(LFLQuantizer(num_levels=2))
    """

    @override
    def _length(self, numel: int) -> int:
        return next_power_of_two(numel)

    @override
    def _send(self, compressor: Compressor, model: Tensor, round: Round) -> tuple[Tensor, Message]:
        numel, on = len(model), model.device
        generator = server_key(round).shared("rotation", on=on)
        signs = torch.randint(0, 2, (self._length(numel),), generator=generator, device=on).to(model.dtype) * 2 - 1
        padded = torch.nn.functional.pad(model, (0, len(signs) - numel)) * signs
        message = compressor.roundtrip(hadamard_transform(padded.unsqueeze(0)), server_key(round))
        return (hadamard_transform(message.values)[0] * signs)[:numel], message

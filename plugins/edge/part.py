"""What all replaceable parts of a round share."""

from __future__ import annotations

from torch import Tensor, nn


class Part(nn.Module):
    """A part whose representation tells its settings, so that a checkpoint can be compared with a configuration."""

    def extra_repr(self) -> str:
        """Public attributes that are plain settings."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith("_")
            and name != "training"
            and not isinstance(value, nn.Module | Tensor)
            and type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
        )

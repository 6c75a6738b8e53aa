"""The old name of `vaopd.vlm.torchvision_compat`; goes with the next release."""

from vaopd.vlm.torchvision_compat import ensure_torchvision

__all__ = ["ensure_torchvision"]

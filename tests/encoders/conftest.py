from __future__ import annotations

from medssl._compat import torchvision_ops

torchvision_ops.ensure()  # these tests import timm themselves, and any of them may run first

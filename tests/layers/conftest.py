from __future__ import annotations

from medssl._compat import torchvision_ops

torchvision_ops.ensure()  # some of these tests import timm themselves, and any of them may run first

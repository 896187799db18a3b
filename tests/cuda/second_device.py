"""A second device without a card: `pytest -p tests.cuda.second_device --device second:0 tests/cuda`.

It computes as the CPU does and is another device all the same (second_device.cpp): a tensor left on the CPU, or handed
to numpy, is found. It needs a C++ compiler and ninja. Of CUDA's kernels, rounding and memory it tells nothing.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils import cpp_extension

NAME = "second"
_made = cpp_extension.load("fedclaw_second_device", [str(Path(__file__).with_suffix(".cpp"))], extra_cflags=["-O1"])


def _module() -> ModuleType:
    """What torch looks for as `torch.second`."""
    generator = _made.generator()
    module: Any = ModuleType(f"torch.{NAME}")
    module.is_available, module._is_in_bad_fork = lambda: True, lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.synchronize = lambda _device=None: None
    module.manual_seed = module.manual_seed_all = generator.manual_seed
    module.get_rng_state = lambda _device=None: generator.get_state()
    module.set_rng_state = lambda state, _device=None: generator.set_state(state)
    module.memory_allocated = lambda _device=None: _made.allocated()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    found: ModuleType = module
    return found


torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, _module())
torch.utils.generate_methods_for_privateuse1_backend()

_kept = SimpleNamespace(group_norm=torch.group_norm, choose=import_module("fedclaw.site.device").choose_device)


def _choose(wanted: str) -> torch.device:
    return torch.device(NAME, 0) if wanted != "cpu" else _kept.choose("cpu")


def _group_norm(inputs: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
    """As on CUDA; of a device that it does not know torch keeps the order of the axes."""
    return _kept.group_norm(inputs.contiguous() if inputs.device.type == NAME else inputs, *more, **options)


torch.group_norm = _group_norm
for _place in ("site.device", "compress.proxy", "simulation.run", "site.directory"):
    import_module(f"fedclaw.{_place}").choose_device = _choose  # type: ignore[attr-defined]

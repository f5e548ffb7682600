"""One low-rank adapter for many tasks: UnoLoRA and UnoLoRA* as a PEFT method, and what trains and runs them."""

from unolora.config import UnoLoraConfig
from unolora.errors import CheckpointError, InputError
from unolora.model import UnoLoraModel, register

__version__ = "0.1.0"
__all__ = ["CheckpointError", "InputError", "UnoLoraConfig", "UnoLoraModel", "register"]

register()

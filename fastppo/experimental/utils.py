"""trl.experimental.utils' name for the frozen reference."""

from fastppo.models import create_reference_model

__all__ = ["create_reference_model"]

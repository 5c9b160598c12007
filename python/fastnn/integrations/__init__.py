"""What other packages need to run on fastnn. The modules here import their package only when they are asked to."""

from . import transformers

__all__ = ["transformers"]

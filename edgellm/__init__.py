"""Language and vision-language models on robots."""

__version__ = "0.1.0"

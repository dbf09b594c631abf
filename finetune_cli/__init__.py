"""ftune: config-driven fine-tuning whose every run can prove what it did."""

__version__ = "0.1.0"

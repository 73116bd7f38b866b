"""Scripts that write pages of docs/ or check this package against others; run as `python -m scripts.NAME`."""

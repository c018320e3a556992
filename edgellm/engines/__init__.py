"""Execution backends behind one protocol (`base.py`), one file each, imported when chosen."""

"""Image preprocessing and encoder calls, one file per visual runner family; `base.load_visual_runner` picks one."""

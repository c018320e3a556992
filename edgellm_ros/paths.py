"""Where the files that come with the package are, and the middleware profile that images need."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PROFILE_VARIABLES = ("FASTRTPS_DEFAULT_PROFILES_FILE", "FASTDDS_DEFAULT_PROFILES_FILE")


def share_file(name: str) -> Path | None:
    """A file of share/edgellm_ros (for example config/fastdds.xml): in the source tree, in this Python's prefix, or in
    a sourced ROS workspace; None if it is in none of them."""
    prefixes = [sys.prefix, *os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)]
    folders = [Path(__file__).resolve().parents[1], *(Path(p) / "share/edgellm_ros" for p in prefixes if p)]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def use_fastdds_profile() -> None:
    """Give Fast DDS a shared-memory segment that holds images (its default is smaller than one VGA frame).

    To be called before rclpy.init(). A profile that the user has chosen stays.
    """
    profile = share_file("config/fastdds.xml")
    if profile and not any(os.environ.get(variable) for variable in PROFILE_VARIABLES):
        os.environ[PROFILE_VARIABLES[0]] = str(profile)

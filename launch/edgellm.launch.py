"""The model node, and a simulated camera if asked for.

ros2 launch edgellm_ros edgellm.launch.py engine_dir:=/path/to/engine
ros2 launch edgellm_ros edgellm.launch.py engine_dir:=/path/to/engine camera:=sim namespace:=robot1
ros2 launch edgellm_ros edgellm.launch.py --show-args
"""

import os

from ament_index_python.packages import get_package_share_directory
from launch.actions import DeclareLaunchArgument, OpaqueFunction, SetEnvironmentVariable
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from launch import LaunchContext, LaunchDescription, LaunchDescriptionEntity

CONFIG = os.path.join(get_package_share_directory("edgellm_ros"), "config")
BOOLEANS = ["true", "false"]
LEVELS = ["debug", "info", "warn", "error", "fatal"]
ARGUMENTS = [
    DeclareLaunchArgument("namespace", default_value="", description="Namespace of the nodes and their topics."),
    DeclareLaunchArgument(
        "params_file",
        default_value=os.path.join(CONFIG, "tiny_vlm.yaml"),
        description="Parameters of the nodes; this file chooses the model.",
    ),
    DeclareLaunchArgument(
        "engine_dir", default_value="", description="Engine directory; empty: the one in params_file."
    ),
    DeclareLaunchArgument(
        "use_sim_time", default_value="false", choices=BOOLEANS, description="Take the time from /clock."
    ),
    DeclareLaunchArgument("log_level", default_value="info", choices=LEVELS, description="Log level of the nodes."),
    DeclareLaunchArgument(
        "autostart",
        default_value="true",
        choices=BOOLEANS,
        description="Configure and activate the model node at once; false leaves that to a lifecycle manager.",
    ),
    DeclareLaunchArgument(
        "camera",
        default_value="none",
        choices=["none", "sim"],
        description="sim: a simulated camera publishes on `image`; none: a camera of your own does.",
    ),
]


def make_nodes(context: LaunchContext) -> list[LaunchDescriptionEntity]:
    """The nodes that the arguments ask for."""

    def argument(name: str) -> str:
        return LaunchConfiguration(name).perform(context)

    def node(executable: str, parameters: dict[str, object]) -> Node:
        return Node(
            package="edgellm_ros",
            executable=executable,
            name=executable,
            namespace=argument("namespace"),
            parameters=[argument("params_file"), {"use_sim_time": argument("use_sim_time") == "true", **parameters}],
            ros_arguments=["--log-level", f"{executable}:={argument('log_level')}"],
            output="screen",
        )

    model: dict[str, object] = {"autostart": argument("autostart") == "true"}
    if argument("engine_dir"):
        model["engine_dir"] = argument("engine_dir")
    camera = [node("sim_camera", {})] if argument("camera") == "sim" else []
    return [*camera, node("vlm_node", model)]


def generate_launch_description() -> LaunchDescription:
    """Called by `ros2 launch`."""
    # Without its profile Fast DDS loses most frames (see config/fastdds.xml); a profile that the user chose stays.
    chosen = os.environ.get("FASTRTPS_DEFAULT_PROFILES_FILE") or os.environ.get("FASTDDS_DEFAULT_PROFILES_FILE")
    profile = SetEnvironmentVariable("FASTRTPS_DEFAULT_PROFILES_FILE", os.path.join(CONFIG, "fastdds.xml"))
    return LaunchDescription([*ARGUMENTS, *([] if chosen else [profile]), OpaqueFunction(function=make_nodes)])

"""ROS 2 nodes of EdgeLLM: the model node, a simulated camera and a terminal chat.

The interfaces (`edgellm_ros.msg`, `edgellm_ros.action`) are generated into this package when it is built. Nothing here
imports ROS: `edgellm_ros.scenes` works without it.
"""

#!/bin/sh
# Installed as lib/edgellm_ros/<module>, where `ros2 run` and launch files look for executables: runs
# edgellm_ros.<module> with the Python of the prefix it is installed in (a virtual environment), else with python3.
prefix=$(cd "$(dirname "$0")/../.." && pwd)
python=$prefix/bin/python3
[ -x "$python" ] || python=python3
exec "$python" -m "edgellm_ros.$(basename "$0")" "$@"

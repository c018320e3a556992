"""Settings of every test run."""

import os
import random

# A ROS domain of its own, whatever the caller's environment says: tests must neither hear nor move a robot on the same
# network, nor a second test run on the same machine. Above 101 the ports would meet Linux's ephemeral ones.
os.environ["ROS_DOMAIN_ID"] = str(random.SystemRandom().randint(1, 101))

"""`python -m tests.server.fake_up up MANNER ...`: the real command and a real etcd over pretended instances and routers."""

import sys

from xllm.cli import main
from xllm.server import up_plan

if __name__ == "__main__":
    up_plan._COMMAND = (sys.executable, "-m", "tests.server.fake_child")
    sys.exit(main(sys.argv[1:]))

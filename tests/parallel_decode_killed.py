"""`t3.decode` on one of several ranks, of which rank 1 is killed in the middle of its tiles."""

import os
import signal
import sys

from t3 import decode
from t3.vae import WanDecoder

plain = WanDecoder.pixels


def pixels(self, *arguments):
    yield from plain(self, *arguments)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)


WanDecoder.pixels = pixels
sys.exit(decode.main(sys.argv[1:]))

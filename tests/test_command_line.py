"""How every entry ends when its output cannot be written."""

import os
import subprocess
import sys

import pytest
from entries import ROOT, environment

PROGRAM = "from halonet_jax import command_line; command_line.run(lambda: print('x' * {size}))"


@pytest.mark.parametrize("output, size, code, message", [
    ("pipe", 10, 141, ""),
    ("pipe", 1_000_000, 141, ""),
    ("/dev/full", 10, 74, "error: a file could not be written"),
], ids=["no reader at the end", "no reader", "full disk"])  # fmt: skip
def test_output_that_nobody_takes(output, size, code, message):
    """A pipe's reader, such as `head`, may end first."""
    if output == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY)
    command = [sys.executable, "-c", PROGRAM.format(size=size)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr.count("\n")) == (code, bool(message)) and done.stderr.startswith(message)

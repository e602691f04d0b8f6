"""How every entry ends when its output cannot be written, or a number is none."""

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


def test_a_flag_that_is_no_number():
    program = "from absl import flags; flags.DEFINE_float('share', 0.5, 'A share.', 0, 1); " + PROGRAM.format(size=1)
    command = [sys.executable, "-c", program, "--share=nan"]  # within absl's range
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: --share=nan is not a finite number; A share.\n")

"""What a user sees of the facade with tab completion: the public names, and nothing of its own."""

import subprocess
import sys

import fedproc


def test_dir_lists_the_public_names_alone():
    assert dir(fedproc) == sorted([*fedproc.__all__, "__version__"])


def test_what_was_used_before_changes_nothing():
    code = "import fedproc; fedproc.Cluster; fedproc.errors; print(*dir(fedproc))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted([*fedproc.__all__, "__version__"])

"""triton is an extra: molex never imports it by itself, and says what to install where it is asked for."""

import subprocess
import sys


def python(program: str) -> str:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_molex_does_not_import_triton() -> None:
    program = "import sys, molex, molex.kernels; print({'triton', 'molex.kernels.triton'} & set(sys.modules))"
    assert python(program) == "set()"


def test_molex_works_without_triton() -> None:
    program = "import sys; sys.modules['triton'] = None; import molex, molex.kernels; print('fine')"
    assert python(program) == "fine"


def test_without_triton_the_kernels_say_what_to_install() -> None:
    program = """
import sys
sys.modules["triton"] = None
import molex
try:
    import molex.kernels.triton
except molex.errors.BackendError as error:
    print(error)
"""
    assert python(program) == "the Triton kernels need the package triton: pip install 'molex[kernels]'"
